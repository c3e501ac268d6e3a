"""Proposals of configs that fit a budget of bytes: from one short recorded run, encoded again under other settings.

advice = advise(Experiment.load("configs/quickstart.toml"), 20_000_000)
advice.proposals[0].experiment                  # can be run
"""

from __future__ import annotations

import itertools
import re
import tempfile
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from fl_sim.communication.exchange import Coding
from fl_sim.communication.ledger import Ledger
from fl_sim.communication.payload_log import FOLDER
from fl_sim.config.experiment import Experiment
from fl_sim.core.observer import Observer
from fl_sim.core.types import UserError
from fl_sim.simulation.advised_settings import EXACT, Predicted, Setting, Sizes, left_out, require_plain
from fl_sim.simulation.federation import Federation
from fl_sim.simulation.loop import run
from fl_sim.simulation.parts import check
from fl_sim.simulation.recorded_rounds import first_and_last
from fl_sim.simulation.server import build_server

RECORDED = 3
"""Rounds of the short run, where the experiment has as many."""
RECORDED_MEGABYTES = 20_000
"""Disk that the short run's payloads may take."""
RESERVE = 0.03
"""Share of the budget that stays free: what a prediction may be wrong by."""
PROPOSALS = 3
DOWN = (EXACT, Coding("bfloat16"))
"""Encodings of the downlink whose sizes hardly change with training; those of int8 models do, by up to 5 %."""
UP = (EXACT, Coding("bfloat16"), *(Coding(values, "difference") for values in ("int8", "int4", "int2")))
PAIRS = ((EXACT, EXACT), (EXACT, UP[2]), (DOWN[1], UP[2]))
"""(down, up) of sparse uploads, from the exact one on."""
SHORTEST = (DOWN[-1], UP[-1])
SHARES = (0.7, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.02, 0.01)
"""Shares of the weights that are uploaded or stay, the largest first."""
LEAST_DENSITY = 0.05
"""A model pruned further after one round hardly learns any more."""
UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True)
class Proposal:
    """A config that fits the budget.

    Attributes:
        setting: what it changes.
        experiment: the whole of it.
        predicted: bytes of its run.
        change: how far one of its rounds moves the outputs, as `Sizes.change`.
        reason: why this one, in a sentence.
    """

    setting: Setting
    experiment: Experiment
    predicted: Predicted
    change: float
    reason: str


@dataclass(frozen=True)
class Advice:
    """What `advise` found.

    Attributes:
        recorded: rounds of the short run.
        as_it_is: predicted bytes of the config without a change.
        proposals: up to three, of different kinds where those fit.
        left_out: why a kind is not among them.
    """

    recorded: int
    as_it_is: Predicted
    proposals: tuple[Proposal, ...]
    left_out: tuple[str, ...]


def budget_of(text: str) -> int:
    """Bytes of "50MB"; MB = 10^6 bytes.

    Raises:
        UserError: no number with a unit, or none above 0.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(B|kB|MB|GB|TB)\s*", text)
    size = int(float(found[1]) * UNITS[found[2]]) if found and len(found[1]) < 20 else 0
    if not size:
        raise UserError(f"--budget {text[:40]!r}: allowed: a number above 0 and {', '.join(UNITS)}, for instance 50MB")
    return size


def advise(experiment: Experiment, budget: int, observer: Observer) -> Advice:
    """Run the first rounds of an experiment, and propose up to three configs of at most `budget` bytes.

    Args:
        experiment: what shall become cheaper.
        budget: bytes of both directions over the whole run.
        observer: of the short run.

    Raises:
        UserError: the config cannot be predicted, or no proposal fits.
    """
    require_plain(experiment)
    recorded = min(RECORDED, experiment.rounds)
    with tempfile.TemporaryDirectory() as folder:
        short = changed(
            experiment,
            f"rounds={recorded}",
            'wire.uplink={values="float32", content="parameters"}',
            'wire.downlink={values="float32", content="parameters"}',
            "wire.record_payloads=1",
            f"wire.record_megabytes={RECORDED_MEGABYTES}",
            f"evaluate.every={recorded}",
            "checkpoint.every=0",
            f"out={folder}",
        )
        report = run(short, observer)
        federation = Federation.build(short, precision=report.results.precision, quiet=True)
        rounds = first_and_last(report.folder / FOLDER, report.ledger, federation.first.exchange.schema)
    sizes = Sizes(federation, *rounds)
    search = _Search(experiment, sizes, budget * (1 - RESERVE))
    own = Setting("as it is", experiment.rounds, experiment.wire.downlink, experiment.wire.uplink)
    found = search.proposals()
    if not found:
        raise UserError(
            f"--budget {budget / 1e6:g}MB: one round with the smallest value types moves {search.least / 1e6:.3f} MB; needed: "
            f"at least {search.least / (1 - RESERVE) / 1e6:.3f}MB"
        )
    return Advice(recorded, sizes.of(own), tuple(found), tuple(search.missing(found)))


def changed(experiment: Experiment, *overrides: str) -> Experiment:
    """The experiment with some keys changed."""
    return Experiment.from_tree(tomllib.loads(experiment.to_toml()), overrides)


@dataclass
class _Search:
    """Looks for settings that fit, kind by kind, and says why each."""

    experiment: Experiment
    sizes: Sizes
    room: float

    def fits(self, setting: Setting) -> bool:
        return self.sizes.of(setting).total <= self.room

    @cached_property
    def impossible(self) -> Mapping[str, str]:
        """Kinds that this config cannot have, with the reason: left out by rule, or refused as a run would refuse them."""
        rounds = self.experiment.rounds
        tried = (
            Setting("rounded", rounds, *PAIRS[-1]),
            Setting("sparse", rounds, *PAIRS[-1], share=SHARES[-1]),
            Setting("pruned", rounds, density=LEAST_DENSITY),
        )
        reasons = left_out(self.experiment, self.sizes.federation.first.exchange.schema.prunable_size)
        refused = {each.kind: reason for each in tried if (reason := self._refused(each)) is not None}
        return refused | reasons

    def _refused(self, setting: Setting) -> str | None:
        """Why a run with this setting stops before its first round; None where it does not."""
        try:
            experiment = self._config(setting)
            check(experiment)
            build_server(replace(self.sizes.federation, experiment=experiment), Ledger())
        except UserError as error:
            return f"{setting.kind}: {error}"
        return None

    def _config(self, setting: Setting) -> Experiment:
        name = f"{self.experiment.name}-{setting.kind}"[-64:]
        return changed(self.experiment, f"name={name}", *setting.overrides)

    def settings(self) -> list[Setting]:
        """The best of each kind, then the next ones, until there are `PROPOSALS`."""
        reasons = self.impossible
        queues = [kind() for name, kind in self.kinds.items() if name not in reasons]
        found: list[Setting] = []
        while queues and len(found) < PROPOSALS:
            for queue in list(queues):
                setting = next(queue, None)
                if setting is None:
                    queues.remove(queue)
                elif len(found) < PROPOSALS:
                    found.append(setting)
        return found

    @property
    def kinds(self) -> Mapping[str, Callable[[], Iterator[Setting]]]:
        """Name -> settings that fit, the best first."""
        return {"rounded": self.rounded, "sparse": self.sparse, "pruned": self.pruned, "shorter": self.shorter}

    def rounded(self) -> Iterator[Setting]:
        """All weights, as shorter numbers; those that move the outputs least first."""
        pairs = [Setting("rounded", self.experiment.rounds, down, up) for down in DOWN for up in UP]
        yield from sorted(filter(self.fits, pairs[1:]), key=self.sizes.change)

    def sparse(self) -> Iterator[Setting]:
        """Uploads of the largest changes; for each share the first of `PAIRS` that fits."""
        for share in SHARES:
            settings = (Setting("sparse", self.experiment.rounds, down, up, share=share) for down, up in PAIRS)
            yield from itertools.islice(filter(self.fits, settings), 1)

    def pruned(self) -> Iterator[Setting]:
        """A model pruned after the first round.

        Its weights stay float32: those that pruning leaves are all large, and what shorter numbers of them take changes by
        up to a tenth while they train on.
        """
        densities = (share for share in SHARES if share >= LEAST_DENSITY)
        yield from filter(self.fits, (Setting("pruned", self.experiment.rounds, density=each) for each in densities))

    def shorter(self) -> Iterator[Setting]:
        """Fewer rounds, with shorter numbers and without; a single round only where no more fit."""
        seen: set[tuple[int, float]] = set()
        for down, up in (PAIRS[-1], PAIRS[0], SHORTEST):
            one, two = (self.sizes.of(Setting("shorter", n, down, up)).total for n in (1, 2))
            rounds = 1 + int((self.room - one) / (two - one)) if self.room >= one else 0
            if rounds == 1 and seen:
                continue
            if 0 < rounds < self.experiment.rounds and (rounds, one) not in seen:
                seen.add((rounds, one))  # where nothing can be rounded, shorter numbers are the same messages
                yield Setting("shorter", rounds, down, up)

    @property
    def least(self) -> float:
        """Bytes of one round with the shortest numbers."""
        return self.sizes.of(Setting("shorter", 1, *SHORTEST)).total

    def missing(self, found: Collection[Proposal]) -> Iterator[str]:
        """Why a kind has no proposal."""
        yield from dict.fromkeys(self.impossible.values())
        asked = {"shorter", *self.impossible, *(each.setting.kind for each in found)}
        for name, kind in self.kinds.items():
            if name not in asked and next(kind(), None) is None:
                yield f"{name}: no setting of {self.experiment.rounds} rounds fits"

    def proposals(self) -> list[Proposal]:
        """The chosen settings as configs; of a second one of a kind the reason says that it is the next best."""
        chosen = self.settings()
        kinds = [setting.kind for setting in chosen]
        return [self._proposal(setting, again=setting.kind in kinds[:at]) for at, setting in enumerate(chosen)]

    def _proposal(self, setting: Setting, *, again: bool) -> Proposal:
        reason = ("the next best: " if again else "") + self._reasons[setting.kind](setting)
        return Proposal(setting, self._config(setting), self.sizes.of(setting), self.sizes.change(setting), reason)

    @property
    def _reasons(self) -> Mapping[str, Callable[[Setting], str]]:
        return {
            "rounded": lambda s: (
                f"every weight travels, {_types(s)}: value types are chosen by how little they move the outputs"
            ),
            "sparse": lambda s: (
                f"each client uploads the {100 * s.share:g} % of its weights that changed most, {_types(s)}; they hold "
                f"{100 * self.sizes.carried(s.share):.0f} % of the updates' squared length, and error feedback sends the rest "
                "later"
            ),
            "pruned": lambda s: (
                f"after round 1 {100 * s.density:g} % of the weights stay and travel, {_types(s)}; {self._layers(s.density)}"
            ),
            "shorter": lambda s: f"it ends after round {s.rounds} of {self.experiment.rounds}, sent {_types(s)}",
        }

    def _layers(self, density: float) -> str:
        mask = self.sizes.mask(density)
        kept = {name: float(each.float().mean()) for name, each in mask.items()}
        most, least = max(kept, key=kept.__getitem__), min(kept, key=kept.__getitem__)
        return (
            f"the distortion curves leave {100 * kept[most]:.0f} % of {most} and {100 * kept[least]:.0f} % of {least}"
        )


def _types(setting: Setting) -> str:
    ways = (("down", setting.down), ("up", setting.up))
    told = [
        f"{way} as {coding.values}{' differences' * (coding.content == 'difference')}"
        for way, coding in ways
        if coding != EXACT
    ]
    return " and ".join(told) or "as float32"
