"""What a foreign app's run says in numbers: metrics by round, and bytes by phase."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fl_sim.communication.ledger import Ledger

Curves = Mapping[str, Mapping[int, float]]
"""Metric -> round -> value."""
RESULT = {
    "train_metrics_clientapp": "train",
    "evaluate_metrics_clientapp": "evaluate",
    "evaluate_metrics_serverapp": "server",
}
"""Tables of Flower's `Result`, round -> metrics -> where they come from."""
LOSSES = {"losses_distributed": "evaluate: loss", "losses_centralized": "server: loss"}
HISTORY = {"metrics_distributed_fit": "train", "metrics_distributed": "evaluate", "metrics_centralized": "server"}
"""Of a legacy server's `History`: losses, and metrics -> list of (round, value)."""


def curves(result: object) -> Curves:
    """The numbers by round that a strategy returned; empty for what is neither a `Result` nor a `History`."""
    found: dict[str, dict[int, float]] = {}
    for attribute, origin in RESULT.items():
        for number, metrics in dict(getattr(result, attribute, None) or {}).items():
            for name, value in metrics.items():
                _add(found, f"{origin}: {name}", number, value)
    for attribute, name in LOSSES.items():
        for number, value in getattr(result, attribute, None) or ():
            _add(found, name, number, value)
    for attribute, origin in HISTORY.items():
        for name, values in dict(getattr(result, attribute, None) or {}).items():
            for number, value in values:
                _add(found, f"{origin}: {name}", number, value)
    return found


def _add(found: dict[str, dict[int, float]], name: str, number: int, value: object) -> None:
    """Add a number, or each number of a list under its place."""
    if isinstance(value, (int, float)):
        found.setdefault(name, {})[number] = float(value)
    elif isinstance(value, (list, tuple)):
        for place, one in enumerate(value):
            _add(found, f"{name}[{place}]", number, one)


def traffic(ledger: Ledger) -> Iterable[tuple[str, str, int, int, int, int, int]]:
    """(phase, direction, messages, bytes of arrays, of configs, of metrics, of Flower's protocol), in order of size."""
    sizes = ledger.total(by=("phase", "direction", "section"))
    protocol = ledger.total(by=("phase", "direction"), column="protocol_bytes")
    rows = []
    for phase, direction in protocol:
        moved = [sizes.get((phase, direction, section), 0) for section in ("dense", "config", "metrics")]
        count = ledger.messages(phase=str(phase)).get(str(direction), 0)
        rows.append((str(phase), str(direction), count, moved[0], moved[1], moved[2], protocol[phase, direction]))
    return sorted(rows, key=lambda row: -row[-1])
