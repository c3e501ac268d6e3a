"""Context of a server algorithm for one model, and the state that it saves between rounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from fl_sim.communication.exchange import Exchange
from fl_sim.communication.ledger import Ledger
from fl_sim.communication.mask_log import MaskRecorder
from fl_sim.communication.payload_log import PayloadRecorder
from fl_sim.communication.schedule import Schedule
from fl_sim.communication.sparse_broadcast import SparseBroadcast
from fl_sim.communication.traces import Availability, Device
from fl_sim.communication.virtual_clock import Network
from fl_sim.core.types import FlatParams, Mask, Params
from fl_sim.data import Split
from fl_sim.runtime.grids.faults import Faults
from fl_sim.runtime.worlds import World


@dataclass(frozen=True)
class FlightSnapshot:
    """A client that trains while the server is saved: an update that is still under way in virtual time.

    Attributes:
        client: its number.
        version: rounds that were finished when it was sent its model.
        order: number of its task among all tasks.
        sent_s: virtual time at which its task was sent.
        down_bytes: payload bytes of the task.
        message_id: of the task.
        reply: what the client will answer, with its payloads.
        holds: version of the published model that the task brought, under a sparse broadcast.
    """

    client: int
    version: int
    order: int
    sent_s: float
    down_bytes: int
    message_id: str
    reply: bytes
    holds: int = 0


@dataclass(frozen=True)
class ServerSnapshot:
    """The state of one model's server between two rounds.

    Attributes:
        round: rounds finished.
        params: global parameters.
        mask: global mask, or None while the model is dense.
        memory: tensors that the server optimizer keeps, of any names, shapes and dtypes.
        held_masks: client -> the pruning mask that it holds.
        answered: clients that have answered since they last failed, so that they know the frozen weights.
        simulated_s: seconds on the virtual clock.
        failures: failed client tasks so far, by kind.
        published: tensors of a sparse broadcast (`strategies.published_model.SparseBroadcastServer`).
        client_versions: client -> version of the published model that it holds.
        codec_state: what a codec of the user's own on the downlink keeps.
        flights: updates under way, where the server does not wait for a cohort.
        bases: version -> parameters and mask that some of them started from.
        dispatched: tasks sent so far.
    """

    round: int
    params: Params
    mask: Mask | None = None
    memory: Params = field(default_factory=dict)
    held_masks: Mapping[int, Mask] = field(default_factory=dict)
    answered: frozenset[int] = frozenset()
    simulated_s: float = 0.0
    failures: Mapping[str, int] = field(default_factory=dict)
    published: Params = field(default_factory=dict)
    client_versions: Mapping[int, int] = field(default_factory=dict)
    codec_state: Params = field(default_factory=dict)
    flights: Sequence[FlightSnapshot] = ()
    bases: Mapping[int, tuple[Params, Mask | None]] = field(default_factory=dict)
    dispatched: int = 0


@dataclass(frozen=True)
class Sampling:
    """Client sampling: how many clients take part in a round, drawn without replacement.

    Attributes:
        cohort_size: clients that train in a round.
        seed: seed of the run.
        members: partitions that may be drawn; None = all.
        sizes: training samples of each client of the federation, by partition; empty = not known.
        evaluate_size: clients that evaluate the new model after each round; 0 = none.
        faults: how many clients of a cohort may fail.
        world: hashes of what the server has built, which foreign nodes are compared with.
    """

    cohort_size: int
    seed: int
    members: Sequence[int] | None = None
    evaluate_size: int = 0
    faults: Faults = field(default_factory=Faults)
    world: World = field(default_factory=dict)
    sizes: Sequence[int] = ()

    @property
    def clients(self) -> int:
        """Number of clients that may be drawn; 0 = not known."""
        return len(self.sizes) if self.members is None else len(self.members)


@dataclass(frozen=True)
class Accounting:
    """Accounting of a run's bytes and virtual time.

    Attributes:
        ledger: one row for each message and section.
        network: links, speeds and deadline of the simulated clients; without links there is no clock.
        recorder: keeps the masks of training messages for `fl-sim replay`; None = keeps none.
        payloads: keeps the payloads of chosen rounds for `fl-sim replay`; None = keeps none.
    """

    ledger: Ledger
    network: Network = field(default_factory=Network)
    recorder: MaskRecorder | None = None
    payloads: PayloadRecorder | None = None


@dataclass(frozen=True)
class ServerContext:
    """The server's side of one model in one run, apart from the algorithm.

    Attributes:
        exchange: which tensors travel, and how they are encoded.
        initial: parameters of the seeded model, which every party can build by itself.
        model: parameters -> the server's own model with them, on its device, with BatchNorm statistics that fit; made at
            the first call.
        sampling: who takes part in a round.
        accounting: where bytes and time are counted.
        start: first global parameters; None = `initial`.
        proxy: images that the server holds, on its device; None = none.
        precision: a name of `fl_sim.training.precision.PRECISIONS`, for algorithms that compute.
        broadcast: sends clients only what changed; None sends the whole model.
        label: name of the model where a federation has several.
        schedule: when clients train and the server steps.
        availability: when each client is reachable; None = always.
        devices: client -> its link and speed; None = as `accounting.network` draws them.
        scratch: folder for running sums that are too large for memory; None = they lie in memory.
    """

    exchange: Exchange
    initial: FlatParams
    model: Callable[[Params], nn.Module]
    sampling: Sampling
    accounting: Accounting
    start: FlatParams | None = None
    proxy: Split | None = None
    precision: str = "float32"
    broadcast: SparseBroadcast | None = None
    label: str = ""
    schedule: Schedule = field(default_factory=Schedule)
    availability: Availability | None = None
    devices: Sequence[Device] | None = None
    scratch: Path | None = None

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return self.sampling.seed
