"""What clients that evaluate answer: their metrics, or why there are none; and the distribution of a metric over clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from flwr.app import Message

from fl_sim.codecs import CorruptPayload
from fl_sim.communication import messages as wire
from strategies.round_log import Unusable, require_content


def measured(client: int, reply: Message) -> tuple[int, Mapping[str, float]]:
    """(number of test samples, metrics) that a client answered.

    Raises:
        Unusable: the client or its process failed, or what it answered are no metrics.
    """
    require_content(client, reply)
    try:
        return wire.read_metrics(reply.content)
    except CorruptPayload as error:
        raise Unusable("rejected", f"client {client}: rejected metrics: {error}") from error


def distribution(each: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of each metric but the loss, such as accuracy, `accuracy_p10`, `_p50` and `_p90`, what a tenth, half and nine tenths of
    the clients are below, and the extremes, `accuracy_min` and `_max`."""
    names = dict.fromkeys(name for metrics in each for name in metrics if name not in ("loss", "examples"))
    values = {name: [metrics[name] for metrics in each if name in metrics] for name in names}
    shares = {"min": 0, "p10": 10, "p50": 50, "p90": 90, "max": 100}
    return {
        f"{name}_{word}": float(np.percentile(own, share))
        for name, own in values.items()
        for word, share in shares.items()
    }
