"""Attackers: a share of the clients, drawn once from the seed, that do not send what they learnt.

    [attack]
    kind = "sign_flip"     # a name of `ATTACKS`, or module:function of your own
    share = 0.2

An attack wraps whatever client the config names. It changes what the client returns before that is encoded, so that its bytes
are real ones. BatchNorm statistics are sent as they are. A mask is that of the honest update: an attacker sends no more
coordinates than others do. Attackers that collude pool their data (`ctx.peer`) and compute each other's updates themselves,
so that no message passes between processes and every engine gives the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import torch
from torch import Tensor

from fl_sim.core.lookup import find
from fl_sim.core.process_state import seeded
from fl_sim.core.seeding import Purpose, derive, generator, numpy_generator
from fl_sim.core.types import Params, Task, Update, UserError
from fl_sim.training.client import Around, Client, ClientContext

STATISTICS = ("running_mean", "running_var")
"""Ends of the names of BatchNorm statistics: a negative variance would only make the model not a number."""


@dataclass(frozen=True)
class Attackers:
    """The attackers of a federation, and what they know of it.

    Attributes:
        members: their numbers, sorted.
        cohort_size: clients of a round.
        num_clients: clients of the federation.
        classes: of the task; 0 where it has none.
        scale: strength of the attack; None = the attack's own.
        pooled: of `members`, those whose data colluding attackers pool. Each of them trains once for each of these.
    """

    members: tuple[int, ...]
    cohort_size: int
    num_clients: int
    classes: int = 0
    scale: float | None = None
    pooled: int = 5

    def strength(self, default: float) -> float:
        """The configured strength, or the attack's own."""
        return default if self.scale is None else self.scale

    @property
    def crew(self) -> tuple[int, ...]:
        """The attackers that pool their data."""
        return self.members[: self.pooled]


Attack = Callable[[Client, Task, ClientContext, Attackers], Update]
"""(honest client, task, context, attackers) -> what the attacker sends."""
Forge = Callable[[Tensor, Tensor], Tensor]
"""(received parameter, honest one) -> what is sent in its place."""


def _forged(honest: Update, task: Task, forge: Forge) -> Update:
    """An update whose trained parameters are replaced; statistics and integer entries stay."""
    known = {name: value for name, value in honest.params.items() if name in task.params}
    return replace(honest, params={n: _entry(n, task.params[n], v, forge) for n, v in known.items()})


def _entry(name: str, received: Tensor, value: Tensor, forge: Forge) -> Tensor:
    return value if name.endswith(STATISTICS) or not value.is_floating_point() else forge(received, value)


def sign_flip(honest: Client, task: Task, ctx: ClientContext, attackers: Attackers) -> Update:
    """The opposite of what was learnt, `scale` times (1): received - scale (trained - received)."""
    scale = attackers.strength(1.0)
    return _forged(honest(task, ctx), task, lambda received, value: received - scale * (value - received))


def scaled(honest: Client, task: Task, ctx: ClientContext, attackers: Attackers) -> Update:
    """What was learnt, `scale` times (10), as in model replacement (Bagdasaryan et al., 2020)."""
    scale = attackers.strength(10.0)
    return _forged(honest(task, ctx), task, lambda received, value: received + scale * (value - received))


def gaussian(honest: Client, task: Task, ctx: ClientContext, attackers: Attackers) -> Update:
    """Gaussian noise in the place of each tensor's change, `scale` times (10) as long as the change."""
    rng, scale = generator(ctx.seed, Purpose.ATTACK), attackers.strength(10.0)

    def noise(received: Tensor, value: Tensor) -> Tensor:
        drawn = torch.randn(value.shape, generator=rng).to(value)
        length = float(torch.linalg.vector_norm(value - received)) / max(float(torch.linalg.vector_norm(drawn)), 1e-12)
        return received + scale * length * drawn

    return _forged(honest(task, ctx), task, noise)


def label_flip(honest: Client, task: Task, ctx: ClientContext, attackers: Attackers) -> Update:
    """Trains on flipped labels: class c of C becomes C - 1 - c (Fung et al., 2018). `scale` means nothing here."""
    data = ctx.data
    ctx.data = replace(data, labels=attackers.classes - 1 - data.labels)
    try:
        return honest(task, ctx)
    finally:
        ctx.data = data


def colluding(honest: Client, task: Task, ctx: ClientContext, attackers: Attackers) -> Update:
    """All attackers send the same: the first one's update with its sign flipped, `scale` times (1).

    Equal updates are each other's nearest neighbours, which rules that choose by distance take for a majority.
    """
    scale, leader = attackers.strength(1.0), attackers.crew[:1]
    (update,) = _honest(honest, task, ctx, leader)
    return _forged(update, task, lambda received, value: received - scale * (value - received))


def alie(honest: Client, task: Task, ctx: ClientContext, attackers: Attackers) -> Update:
    """A Little Is Enough (Baruch et al., 2019, algorithm 3): mean - z std of the attackers' own honest updates.

    Mean and standard deviation are over the pooled attackers, coordinate by coordinate. `scale` is z; without it z is the
    largest shift that still hides among the honest updates of a cohort of n clients, m of them attackers:
    Phi(z) = (n - m - s) / (n - m) with s = floor(n / 2 + 1) - m.
    """
    z, updates = attackers.strength(_hidden_shift(attackers)), _honest(honest, task, ctx, attackers.crew)
    mine = updates[0]
    means, spreads = _moments([update.params for update in updates], mine.params)
    forged = {n: _entry(n, means[n] - z * spreads[n], v, _first) for n, v in mine.params.items()}
    return replace(mine, params=forged, num_examples=ctx.num_examples)


def _first(forged: Tensor, value: Tensor) -> Tensor:
    return forged


def _hidden_shift(attackers: Attackers) -> float:
    n = attackers.cohort_size
    m = round(n * len(attackers.members) / attackers.num_clients)
    share = (n - m - (n // 2 + 1 - m)) / max(1, n - m)
    return NormalDist().inv_cdf(min(max(share, 0.5), 0.999))


def _moments(every: Sequence[Params], like: Params) -> tuple[Params, Params]:
    stacked = {name: torch.stack([params[name].double() for params in every]) for name in like}
    spread = {name: values.std(dim=0, correction=0).to(like[name].dtype) for name, values in stacked.items()}
    return {name: values.mean(dim=0).to(like[name].dtype) for name, values in stacked.items()}, spread


def _honest(honest: Client, task: Task, ctx: ClientContext, members: Sequence[int]) -> list[Update]:
    """The honest updates of several clients for this task, on their own data, each from its own seed."""
    updates = []
    for member in members:
        seed = derive(task.seed, task.round, member, Purpose.CLIENT)
        own = ClientContext(
            ctx.model,
            ctx.peer(member),
            torch.Generator().manual_seed(seed),
            seed=seed,
            loss=ctx.loss,
            personal=ctx.personal,
            client=member,
        )
        with seeded(seed):
            updates.append(honest(task, own))
    return updates


ATTACKS: Mapping[str, Attack] = {
    "sign_flip": sign_flip,
    "label_flip": label_flip,
    "scaled": scaled,
    "gaussian": gaussian,
    "alie": alie,
    "colluding": colluding,
}
NEED_CLASSES = ("label_flip",)


@dataclass(frozen=True)
class Attacked(Around):
    """A client that is honest, or one of the attackers."""

    client: Client
    attack: Attack
    attackers: Attackers

    def __call__(self, task: Task, ctx: ClientContext) -> Update:
        if ctx.client not in self.attackers.members:
            return self.client(task, ctx)
        return self.attack(self.client, task, ctx, self.attackers)


def attackers_of(*, share: float, seed: int, num_clients: int) -> tuple[int, ...]:
    """The numbers of the attackers: a share of the clients, drawn once from the seed.

    Raises:
        UserError: a share above 0 that is that of no client.
    """
    count = round(share * num_clients)
    if share > 0 and count < 1:
        raise UserError(
            f"attack.share = {share} of {num_clients} clients is no client; needed: at least {1 / num_clients:g}"
        )
    return tuple(sorted(numpy_generator(seed, Purpose.ATTACK).permutation(num_clients)[:count].tolist()))


def attacked(
    honest: Client,
    *,
    kind: str,
    share: float,
    scale: float | None,
    seed: int,
    num_clients: int,
    cohort_size: int,
    classes: int,
) -> Client:
    """The client of a federation some of whose clients attack.

    Raises:
        UserError: no such attack, one that needs classes where the task has none, or a share that is no client.
    """
    attack = find("attack.kind", kind, ATTACKS)
    if kind in NEED_CLASSES and not classes:
        raise UserError(f"attack.kind = {kind!r}: flips labels; allowed: task = 'classification'")
    members = attackers_of(share=share, seed=seed, num_clients=num_clients)
    if attack is alie and len(members) == 1:
        raise UserError(
            f"attack.kind = 'alie': shifts by the spread of several attackers' updates, and attack.share = {share} of "
            f"{num_clients} clients is one of them; needed: at least {2 / num_clients:g}"
        )
    return (
        honest
        if not members
        else Attacked(honest, attack, Attackers(members, cohort_size, num_clients, classes, scale))
    )
