"""What an experiment was, in a few rows of words: data, model, clients, strategy, codecs, training, and its identity.

facts(report)["cohort"]      # "10 of 20 clients a round, 30 rounds"
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from fl_sim.communication.schedule import ROUNDS
from fl_sim.config.toml import Json
from fl_sim.report.groups import Group, defaults, resolved
from fl_sim.report.summary import Report

PARTITION_KEYS: Mapping[str, tuple[str, ...]] = {"dirichlet": ("alpha",), "quantity": ("alpha",), "shards": ("shards",)}
"""Partition of fl-sim's own -> the keys of `[data]` that it reads; one of the user's may read any."""
UNSET: tuple[Json, ...] = (None, [], "", False, 0, "none")
UNKNOWN = "not recorded"


@dataclass(frozen=True)
class Config:
    """The resolved config of a run, by dotted key."""

    values: Mapping[str, Json]

    def text(self, key: str) -> str:
        """A value for a reader; a list in brackets."""
        value = self.values.get(key)
        return str(value) if not isinstance(value, float) else f"{value:g}"

    def under(self, table: str) -> str:
        """`key = value, ...` of a table's keys that are set."""
        return ", ".join(self._pairs(table, (), self.is_set))

    def changed(self, table: str, skip: Iterable[str]) -> str:
        """`key = value, ...` of a table's keys that are not at their default."""
        return ", ".join(self._pairs(table, skip, self.differs))

    def options(self, table: str) -> str:
        """`, key = value` for every option of a target, as the user gave it."""
        return _listed(self._pairs(table, ("target",), lambda key: True))

    def _pairs(self, table: str, skip: Iterable[str], wanted: Callable[[str], bool]) -> list[str]:
        start = table + "."
        keys = [key for key in self.values if key.startswith(start) and key.removeprefix(start) not in skip]
        return [f"{key.removeprefix(start)} = {self.text(key)}" for key in keys if wanted(key)]

    def differs(self, key: str) -> bool:
        """Whether a key has a value other than its default, nothing, no and 0."""
        return self.is_set(key) and self.values.get(key) != defaults().get(key)

    def is_set(self, key: str) -> bool:
        """Whether a key has a value other than nothing, no and 0."""
        return self.values.get(key) not in UNSET


def facts(report: Report) -> dict[str, str]:
    """Row -> what it says, in the order of a reader's questions.

    Raises:
        UserError: a file of the run folder is damaged.
    """
    config = Config(resolved(report))
    return {
        "data": config.text("data.source") + _listed(_options(config, "data", ("proxy", "noise", "augment"))),
        "partition": f"{config.text('data.clients')} clients, {_partition(config)}",
        "model": f"{config.text('model.name')}, {report.results.params:,} parameters{_listed(_model(config))}",
        "cohort": f"{config.text('cohort.size')} of {config.text('data.clients')} clients a round, "
        f"{report.results.rounds} round{'' if report.results.rounds == 1 else 's'}",
        "client": _target(config, "client") + _attack(config),
        "training": _training(config),
        "strategy": _target(config, "strategy"),
        "codecs": _codecs(config),
        "network": _network(config),
        **_identity(report),
    }


def told_apart(groups: Sequence[Group]) -> tuple[list[tuple[str, str]], list[list[str]]]:
    """(what is the same in all groups, rows of what is not: its name and a cell for each group)."""
    every = [{**facts(group.reports[0]), "seeds": group.seeds} for group in groups]
    rows = [(name, [each[name] for each in every]) for name in every[0]]
    shared = [(name, cells[0]) for name, cells in rows if len(set(cells)) == 1]
    return shared, [[name, *cells] for name, cells in rows if len(set(cells)) > 1]


def _listed(texts: Iterable[str]) -> str:
    return "".join(f", {text}" for text in texts if text)


def _options(config: Config, table: str, keys: Iterable[str]) -> list[str]:
    return [f"{key} = {config.text(f'{table}.{key}')}" for key in keys if config.is_set(f"{table}.{key}")]


def _partition(config: Config) -> str:
    kind = config.text("data.partition")
    keys = PARTITION_KEYS.get(kind, ("alpha", "shards") if ":" in kind else ())
    return kind + _listed(_options(config, "data", (*keys, "min_size")))


def _model(config: Config) -> list[str]:
    more = ["gating." + text for text in [config.under("gating")] if text]
    if adapter := config.under("model.adapter"):
        more.append(f"adapter ({adapter})")
    capacities = config.values.get("capacities")
    if isinstance(capacities, list) and capacities:
        more.append(f"{len(capacities)} further capacities")
    return [
        *_options(config, "model", ("width", "trainable", "personal", "statistics", "batchnorm_init", "weights")),
        *more,
    ]


def _target(config: Config, table: str) -> str:
    return config.text(f"{table}.target") + config.options(table)


def _network(config: Config) -> str:
    rounds = config.values.get("schedule.kind", ROUNDS) == ROUNDS
    if not config.under("network.links") and rounds:
        return "no virtual clock"
    return config.under("network") + ("" if rounds else f"; schedule: {config.under('schedule')}")


def _attack(config: Config) -> str:
    """What a share of the clients does instead; empty where all are honest."""
    return f"; attack: {config.under('attack')}" if config.is_set("attack.kind") else ""


def _training(config: Config) -> str:
    epochs, steps = config.values.get("training.epochs"), config.values.get("training.steps")
    count, unit = (steps, "step") if steps else (epochs, "epoch")
    length = f"{count} {unit}{'' if count == 1 else 's'}"
    others = config.changed(
        "training", skip=("lr", "epochs", "steps", "batch_size", "optimizer", "precision", "clip", "schedule")
    )
    return (
        f"learning rate {config.text('training.lr')}, {config.text('training.optimizer')}, {length} a round, "
        f"batches of {config.text('training.batch_size')}, {config.text('training.schedule')} schedule{_listed([others])}"
    )


def _codecs(config: Config) -> str:
    ways = [
        f"{way} {config.under(f'wire.codec.{link}') or config.text(f'wire.{link}.values')} "
        f"{config.text(f'wire.{link}.content')}"
        for way, link in (("up", "uplink"), ("down", "downlink"))
    ]
    broadcast, budget = config.under("wire.broadcast"), config.under("wire.budget")
    more = [
        f"value types by tensor under a byte budget of a round ({budget})" if budget else "",
        f"sparse broadcast ({broadcast})" if broadcast else "",
        "error feedback" * config.is_set("wire.error_feedback"),
    ]
    return "; ".join(ways) + _listed(more)


def _identity(report: Report) -> dict[str, str]:
    origin = report.origin
    if origin is None:
        return {"code": UNKNOWN, "data hash": UNKNOWN}
    parts = [f"{key}: {file} {digest[:8]}" for key, hashed in origin.code.items() for file, digest in hashed.items()]
    return {"code": "; ".join(parts) or UNKNOWN, "data hash": origin.data[:16] or UNKNOWN}
