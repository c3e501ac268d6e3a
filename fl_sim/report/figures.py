"""Charts as values: each view of a figure is plotly's own JSON, without plotly. Colours and legends belong to the page.

Text that comes from runs is escaped for plotly's pseudo-HTML; the page escapes its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from fl_sim.communication.virtual_clock import PRESETS
from fl_sim.config.toml import Json
from fl_sim.report.charts import COLOURS, TRAFFIC_COLOURS, Chart, Figure, Style, bar, bars, heat, lines, plain
from fl_sim.report.groups import Group
from fl_sim.report.measures import ACCURACY, TOTAL
from fl_sim.report.numbers import (
    TRAFFIC_KINDS,
    Axis,
    BehindLink,
    accuracy_curve,
    at_clock,
    at_megabytes,
    at_round,
    densities,
    pareto,
    traffic,
)
from fl_sim.report.summary import Report


def _lines(groups: Sequence[Group], axis: Axis, x_title: str, *, scale: str = "linear") -> Chart:
    drawn = [accuracy_curve(group, axis) for group in groups]
    return lines(groups, drawn, x_title, "test accuracy [%]", scale=scale)


def accuracy(groups: Sequence[Group]) -> list[Figure]:
    """Accuracy against rounds, bytes and simulated time."""
    band = "Bands are 95 % confidence intervals over the seeds. " if any(len(g.reports) > 1 for g in groups) else ""
    size = "sent and received by the server [MB]"
    times = {name: _lines(groups, BehindLink(link), f"time behind {name} [s]") for name, link in PRESETS.items()}
    links = "; ".join(f"{n} {k.down_mbps:g} down, {k.up_mbps:g} up, {k.latency_ms:g} ms" for n, k in PRESETS.items())
    if all(at_clock(report) for group in groups for report in group.reports):
        times["the run's own clock"] = _lines(groups, at_clock, "simulated time [s]")
    return [
        Figure("Accuracy by round", band, {"": _lines(groups, at_round, "round")}, "groups"),
        Figure(
            "Accuracy by traffic",
            band + "Both directions, everything included. MB = 10^6 bytes.",
            {
                "linear": _lines(groups, at_megabytes, size),
                "logarithmic": _lines(groups, at_megabytes, size, scale="log"),
            },
            "groups",
        ),
        Figure(
            "Accuracy by simulated time",
            f"{band}The encoded bytes over nominal links (Mbit/s, one-way latency: {links}); every client has its own link, "
            "a round lasts as long as its slowest client, and computing takes no time.",
            times,
            "groups",
        ),
    ]


def bytes_by_part(groups: Sequence[Group]) -> Figure:
    """Stacked bars of bytes by section, two bars a group."""
    labels, sizes = [], []
    for group in groups:
        totals = [traffic(report.ledger) for report in group.reports]
        for direction in ("up", "down"):
            mean = {part: sum(t[direction, part] for t in totals) / len(totals) / 1e6 for part in TRAFFIC_KINDS}
            labels.append(f"{plain(group.name, longest=24)}, <b>{direction}</b> {sum(mean.values()):.3f} MB")
            sizes.append(mean)
    data: list[Json] = []
    for part in TRAFFIC_KINDS:
        if not any(size[part] for size in sizes):
            continue
        marker: Chart = {"color": TRAFFIC_COLOURS[part], "line": {"width": 0}}
        if part == "waste":
            marker["pattern"] = {"shape": "/", "fgcolor": "#1b1f24"}
        shares: list[Json] = [size[part] for size in sizes]
        hover = f"{part}: %{{x:.4f}} MB<extra></extra>"
        data.append(bar(shares, marker, hover))
    many = "Means over the seeds. " if any(len(g.reports) > 1 for g in groups) else ""
    return Figure(
        "Where the bytes went",
        f"{many}Values: weights. Dense: biases and BatchNorm. Buffers: BatchNorm statistics. Evaluation: clients that "
        "measured the model or its distortion curves. Waste: tasks and answers of clients that failed, were rejected, "
        "late or lost.",
        {"": bars(data, labels, "encoded bytes [MB]")},
        "traffic",
        height=90 + 48 * len(labels),
    )


def macs(groups: Sequence[Group]) -> Figure:
    """MACs of one sample, masked and dense."""
    data: list[Json] = []
    masked = [group.spread(lambda r: r.results.macs.mean / 1e6).mean or 0.0 for group in groups]
    dense = [group.spread(lambda r: r.results.macs.dense / 1e6).mean or 0.0 for group in groups]
    rest: list[Json] = [max(0.0, d - m) for m, d in zip(masked, dense, strict=True)]
    left: list[Json] = [*masked]
    for x, colour, name in ((left, COLOURS[0], "left"), (rest, "#8a8f9855", "masked away")):
        marker: Chart = {"color": colour, "line": {"width": 0}}
        hover = f"{name}: %{{x:.3f}} million<extra></extra>"
        data.append(bar(x, marker, hover))
    labels = [f"{plain(g.name, longest=26)} {m:.2f} of {d:.2f}" for g, m, d in zip(groups, masked, dense, strict=True)]
    return Figure(
        "Multiply-accumulates of one sample",
        "Blue is what the final mask leaves, grey what it saves. 1 MAC = 2 FLOPs. Counted, not timed: masks do not speed "
        "up dense kernels.",
        {"": bars(data, labels, "MACs [million]")},
        height=90 + 48 * len(groups),
    )


def front(groups: Sequence[Group]) -> Figure:
    """Final accuracy against total bytes, one point a run, the Pareto front of the groups' means."""
    data: list[Json] = []
    means = []
    for index, group in enumerate(groups):
        style, cost, gain = Style(index), TOTAL.spread(group), ACCURACY.spread(group)
        means.append((cost.mean or 0.0, gain.mean or 0.0))
        hover = plain(group.name) + "<br>%{x:.3f} MB, %{y:.2f} %<extra></extra>"
        if len(group.reports) > 1:
            light: Chart = {"color": style.colour, "symbol": style.symbol, "size": 7, "opacity": 0.45}
            data.append(
                {"x": [*cost.values], "y": [*gain.values], "mode": "markers", "marker": light, "hovertemplate": hover}
            )
        marker: Chart = {"color": style.colour, "symbol": style.symbol, "size": 13}
        data.append(
            {"x": [means[-1][0]], "y": [means[-1][1]], "mode": "markers", "marker": marker, "hovertemplate": hover}
        )
    best = pareto(means)
    line: Chart = {"color": "#8a8f98", "width": 1.5, "shape": "hv", "dash": "dot"}
    data.insert(
        0, {"x": [c for c, _ in best], "y": [g for _, g in best], "mode": "lines", "line": line, "hoverinfo": "skip"}
    )
    views: dict[str, Chart] = {}
    for name, scale in (("linear", "linear"), ("logarithmic", "log")):
        x: Chart = {"title": {"text": "total traffic [MB]"}, "type": scale}
        views[name] = {"data": data, "layout": {"xaxis": x, "yaxis": {"title": {"text": "final test accuracy [%]"}}}}
    caption = "Large: mean over the seeds; small: single seeds. The dotted line joins what no other beats in both."
    return Figure("Accuracy and traffic: the Pareto front", caption, views, "groups")


def layers(groups: Sequence[Group]) -> Figure | None:
    """Density per layer over rounds: alive in the global model, and sent by clients that choose; None without either."""
    views: dict[str, Chart] = {}
    tallest = 0
    for group in groups:
        report = group.reports[0]
        for prefix, word in (("density", "alive"), ("sent", "sent up")):
            rounds, shares = densities(report, prefix)
            if not shares:
                continue
            tallest = max(tallest, len(shares))
            rows = [[None if v is None else 100 * v for v in row] for row in shares.values()]
            names: list[Json] = [plain(name, longest=22) for name in shares]
            hover = "%{y}, round %{x}: %{z:.1f} %<extra></extra>"
            views[f"{group.name}: {word}"] = heat([*rounds], names, rows, ("round", "", f"{word} [%]"), hover)
    if not views:
        return None
    caption = "Share of each layer's prunable weights, first seed of each group; the input side is on top."
    return Figure("Density by layer and round", caption, views, height=120 + 18 * max(8, tallest))


def labels(groups: Sequence[Group]) -> Figure | None:
    """Training samples by client and class, one view a distinct partition; None where no run kept its partition."""
    named: dict[str, tuple[Report, list[str]]] = {}
    for group in groups:
        report = group.reports[0]
        if report.label_counts:
            named.setdefault(str(report.label_counts), (report, []))[1].append(group.name)
    views: dict[str, Chart] = {}
    for report, names in named.values():
        counts = report.label_counts
        rows = [list(map(float, row)) for row in zip(*counts, strict=True)]
        whose = "all" if len(named) == 1 else ", ".join(names)
        titles, hover = ("client", "class", "samples"), "client %{x}, class %{y}: %{z} samples<extra></extra>"
        classes: list[Json] = [str(c) for c in range(len(rows))]
        views[f"{whose}, seed {report.results.seed}"] = heat([*range(len(counts))], classes, rows, titles, hover)
    return Figure("Labels of the clients", "Training samples by client and class.", views) if views else None
