"""What a run gives its server strategy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn

from fl_sim.communication.ledger import Ledger
from fl_sim.communication.mask_log import MaskRecorder
from fl_sim.communication.messages import Exchange
from fl_sim.communication.sparse_broadcast import SparseBroadcast
from fl_sim.communication.virtual_clock import Network
from fl_sim.core.types import FlatParams, Mask, Params
from fl_sim.data import Split
from fl_sim.runtime.grids.faults import Faults


def unseen(answered: int, cohort: int) -> None:
    """A progress display that shows nothing."""


@dataclass(frozen=True)
class ServerSnapshot:
    """What a server strategy carries from one round to the next.

    Attributes:
        round: rounds finished.
        params: global parameters.
        mask: global mask, or None while the model is dense.
        memory: the server optimiser's tensors.
        held: client -> the mask it holds.
        answered: clients that have answered since they last failed, so that they know the frozen weights.
        simulated_s: the virtual clock.
        failures: failed client tasks so far, by kind.
        published, holders: of a sparse broadcast: what `strategies.published_model.Published` keeps, and client -> version held.
    """

    round: int
    params: Params
    mask: Mask | None = None
    memory: Params = field(default_factory=dict)
    held: Mapping[int, Mask] = field(default_factory=dict)
    answered: frozenset[int] = frozenset()
    simulated_s: float = 0.0
    failures: Mapping[str, int] = field(default_factory=dict)
    published: Params = field(default_factory=dict)
    holders: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Setup:
    """The surroundings of a method in one run.

    Attributes:
        exchange: what travels, and how it is encoded.
        initial: the seeded model, which every party can build by itself.
        ledger: where every payload is booked.
        cohort_size: clients per round, drawn without replacement.
        seed: the run's seed.
        model: parameters -> the server's own copy of the model with them, on its device, for strategies that compute; it
            has statistics that fit, and is made when first asked for.
        start: the server's first parameters; None = the seeded model.
        precision: how strategies compute, a name of `fl_sim.training.precision.PRECISIONS`.
        proxy: images that the server holds, on that device; None = none.
        members: partitions that take part; None = all.
        label: a word for the model, where a federation has several.
        broadcast: how the global model is published; None sends it as it is.
        evaluate_size: clients that evaluate the new model after each round; 0 = the server evaluates alone.
        network: links, speeds and deadline of the simulated clients; without links there is no clock.
        faults: how many clients of a cohort may fail.
        recorder: keeps the masks that travel in training messages, for `fl-sim replay`; None = keep none.
        on_reply: called after each reply with (answered, cohort).
    """

    exchange: Exchange
    initial: FlatParams
    ledger: Ledger
    cohort_size: int
    seed: int
    model: Callable[[Params], nn.Module]
    start: FlatParams | None = None
    precision: str = "float32"
    proxy: Split | None = None
    members: tuple[int, ...] | None = None
    label: str = ""
    broadcast: SparseBroadcast | None = None
    evaluate_size: int = 0
    network: Network = field(default_factory=Network)
    faults: Faults = field(default_factory=Faults)
    recorder: MaskRecorder | None = None
    on_reply: Callable[[int, int], None] = unseen
