"""What several clients of a process upload, made together where that takes less time: chosen, corrected and encoded.

Whatever is made here is bit for bit what a client makes by itself (`ClientHost.answer`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from fl_sim.communication.error_feedback import ErrorFeedback, RowsFeedback
from fl_sim.communication.exchange import Exchange
from fl_sim.core.types import FlatParams, Mask, Task

Choose = Callable[[Tensor, Tensor], Tensor | None]
"""(received prunable parameters, 1-D; those of all clients after training, as rows) -> their upload masks as rows; None = each
client chooses by itself, or sends all."""


@dataclass(frozen=True)
class Made:
    """What was made of one client's upload; None of each = the client makes it.

    Attributes:
        mask: the upload mask.
        sent: the parameters to encode, with the residual of error feedback.
        payload: the same, encoded.
        left_out: the next residual.
    """

    mask: Mask | None = None
    sent: FlatParams | None = None
    payload: bytes | None = None
    left_out: Tensor | None = None


NOTHING = Made()


def together(
    exchange: Exchange,
    tasks: Sequence[Task],
    feedbacks: Sequence[ErrorFeedback | None],
    rows: Tensor,
    *,
    seeds: Sequence[int],
    choose: Choose,
    sends_all: bool,
) -> list[Made]:
    """What can be made together of clients' uploads.

    Args:
        exchange: what travels and how.
        tasks: of each client.
        feedbacks: of each client; None without error feedback.
        rows: their parameters after training, float32 (clients, values) in schema order.
        seeds: of each client.
        choose: chooses the upload masks.
        sends_all: whether clients for whom it chooses none send everything.
    """
    schema, first = exchange.schema, tasks[0]
    if first.mask is not None or any(task.params is not first.params for task in tasks):
        return [NOTHING] * len(tasks)
    received, count = schema.flat(first.params), schema.prunable_size
    known = [feedback.residual for feedback in feedbacks if feedback is not None]
    feedback = RowsFeedback(received[:count], known) if known else None
    sent = rows if feedback is None else feedback.corrected(rows)
    masks = choose(received[:count], sent[:, :count])
    if masks is None and not sends_all:
        return [NOTHING] * len(tasks)
    payloads = exchange.encode_up_all(sent, received, seeds=seeds, masks=masks)
    if masks is None and payloads is None and feedback is None:
        return [NOTHING] * len(tasks)
    arrived = None
    if feedback is not None and exchange.uplink.is_exact:
        arrived = sent
    elif feedback is not None and payloads is not None:
        arrived = exchange.decode_up_all(payloads, first.params)
    left = None if feedback is None or arrived is None else feedback.left_out(rows, arrived, masks)
    return [
        Made(
            None if masks is None else schema.view_mask(masks[i]),
            schema.view(sent[i]) if payloads is None else None,
            None if payloads is None else payloads[i],
            None if left is None else left[i],
        )
        for i in range(len(tasks))
    ]
