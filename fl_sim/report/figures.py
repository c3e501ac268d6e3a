"""Charts as values: each view of a figure is plotly's own JSON, without plotly. Colours and legends belong to the page.

Text that comes from runs is escaped for plotly's pseudo-HTML; the page escapes its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from fl_sim.config.toml import Json
from fl_sim.report.by_round import accuracy_by_round, loss_by_round
from fl_sim.report.charts import (
    COLOURS,
    COLUMNS,
    PATTERNS,
    TRAFFIC_COLOURS,
    Chart,
    Figure,
    Quantity,
    Style,
    bar,
    bars,
    every_nth,
    heat,
    lines,
    plain,
    tooltip,
)
from fl_sim.report.flows import TRAFFIC_KINDS
from fl_sim.report.groups import Group
from fl_sim.report.label_sample import LabelSample
from fl_sim.report.measures import ACCURACY, TOTAL, metric_axis, score_of
from fl_sim.report.numbers import (
    Axis,
    accuracy_curve,
    at_megabytes,
    densities,
    pareto,
)
from fl_sim.report.small_models import is_dense
from fl_sim.report.summary import Report
from fl_sim.report.times import by_time


def _lines(groups: Sequence[Group], axis: Axis, x: Quantity, *, scale: str = "linear") -> Chart:
    drawn = [accuracy_curve(group, axis) for group in groups]
    return lines(groups, drawn, x, metric_axis(groups), scale=scale)


def accuracy(groups: Sequence[Group]) -> list[Figure | None]:
    """The task's metric, such as accuracy, against rounds, bytes and simulated time, and the losses."""
    metric = score_of(groups).title
    band = "Bands are 95 % confidence intervals over the seeds. " if any(len(g.reports) > 1 for g in groups) else ""
    size = Quantity("sent and received by the server", "MB", 3)
    caption = band + "Both directions, everything included. MB = 10^6 bytes."
    views = {
        "linear": _lines(groups, at_megabytes, size),
        "logarithmic": _lines(groups, at_megabytes, size, scale="log"),
    }
    return [
        accuracy_by_round(groups, band),
        Figure(f"{metric} by traffic", caption, views, "groups"),
        by_time(groups, band),
        loss_by_round(groups, band),
    ]


def bytes_by_part(groups: Sequence[Group]) -> Figure:
    """Stacked bars of bytes by section, two bars a group."""
    labels, sizes = [], []
    for group in groups:
        totals = [report.flows.parts for report in group.reports]
        for direction in ("up", "down"):
            mean = {part: sum(t[direction, part] for t in totals) / len(totals) / 1e6 for part in TRAFFIC_KINDS}
            labels.append(f"{plain(group.name, longest=24)}, <b>{direction}</b> {sum(mean.values()):.3f} MB")
            sizes.append(mean)
    data: list[Chart] = []
    for part in TRAFFIC_KINDS:
        if not any(size[part] for size in sizes):
            continue
        look: Chart = {"fgcolor": "#1b1f24", "bgcolor": TRAFFIC_COLOURS[part], "size": 7, "solidity": 0.15}
        pattern: Chart = {"shape": PATTERNS[part], **look}
        marker: Chart = {"color": TRAFFIC_COLOURS[part], "line": {"width": 0}, "pattern": pattern}
        shares: list[Json] = [size[part] for size in sizes]
        data.append(bar(part, shares, marker, tooltip(part, "%{customdata}", Quantity("encoded", "MB", 4).at("x"))))
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


def macs(groups: Sequence[Group]) -> Figure | None:
    """MACs of one sample, masked and dense; None where no mask saves any: the table has the number."""
    data: list[Chart] = []
    masked = [group.spread(lambda r: r.results.macs.mean / 1e6).mean or 0.0 for group in groups]
    dense = [group.spread(lambda r: r.results.macs.dense / 1e6).mean or 0.0 for group in groups]
    rest: list[Json] = [max(0.0, d - m) for m, d in zip(masked, dense, strict=True)]
    if not any(rest):
        return None
    left: list[Json] = [*masked]
    for x, colour, name in ((left, COLOURS[0], "left"), (rest, "#8a8f9855", "masked away")):
        marker: Chart = {"color": colour, "line": {"width": 0}}
        data.append(
            bar(name, x, marker, tooltip(name, "%{customdata}", Quantity("MACs of a sample", "million", 3).at("x")))
        )
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
    score, means = score_of(groups), []
    for index, group in enumerate(groups):
        style, cost, gain = Style(index), TOTAL.spread(group), ACCURACY.spread(group)
        means.append((cost.mean or 0.0, gain.mean or 0.0))
        told = (Quantity("total traffic", "MB", 3).at("x"), metric_axis(groups, "final test").at("y"))
        shared: Chart = {"mode": "markers", "legendgroup": group.name, "name": plain(group.name)}
        if len(group.reports) > 1:
            light: Chart = {"color": style.colour, "symbol": style.symbol, "size": 7, "opacity": 0.45}
            single: Chart = {"marker": light, "hovertemplate": tooltip(f"{group.name}, one seed", *told)}
            data.append({**shared, **single, "x": [*cost.values], "y": [*gain.values], "showlegend": False})
        marker: Chart = {"color": style.colour, "symbol": style.symbol, "size": 13}
        mean: Chart = {"marker": marker, "hovertemplate": tooltip(group.name, *told)}
        data.append({**shared, **mean, "x": [means[-1][0]], "y": [means[-1][1]]})
    sign = 1 if score.higher else -1
    best = [(cost, sign * gain) for cost, gain in pareto([(cost, sign * gain) for cost, gain in means])]
    line: Chart = {"color": "#8a8f98", "width": 1.5, "shape": "hv", "dash": "dot"}
    edge: Chart = {"mode": "lines", "line": line, "hoverinfo": "skip", "showlegend": False}
    data.insert(0, {**edge, "x": [c for c, _ in best], "y": [g for _, g in best]})
    dense = sorted(mean for mean, group in zip(means, groups, strict=True) if is_dense(group))
    steps = [(cost, sign * max(sign * gain for least, gain in dense if least <= cost)) for cost, _ in dense]
    if len(steps) > 1:
        small: Chart = {"color": "#8a8f98", "width": 1.5, "shape": "hv", "dash": "dash"}
        data.insert(0, {**edge, "line": small, "x": [c for c, _ in steps], "y": [g for _, g in steps]})
    views: dict[str, Chart] = {}
    for name, scale in (("linear", "linear"), ("logarithmic", "log")):
        x: Chart = {"title": {"text": "total traffic [MB]"}, "type": scale}
        views[name] = {
            "data": data,
            "layout": {"xaxis": x, "yaxis": {"title": {"text": f"final test {score.heading}"}}},
        }
    caption = "Large: mean over the seeds; small: single seeds. The dotted line joins what no other beats in both."
    caption += (
        " The dashed steps are the best dense model that was run for at most so many bytes." if len(steps) > 1 else ""
    )
    return Figure(f"{score.title} and traffic: the Pareto front", caption, views, "groups")


def layers(groups: Sequence[Group]) -> Figure | None:
    """Density per layer over rounds: alive in the global model, and sent by clients that choose; None without either."""
    views: dict[str, Chart] = {}
    tallest, some = 0, False
    for group in groups:
        report = group.reports[0]
        for prefix, word in (("density", "alive"), ("sent", "sent up")):
            kept = every_nth(len(report.rounds))
            rounds, shares = densities(report, prefix, kept)
            if not shares:
                continue
            tallest = max(tallest, len(shares))
            some |= len(kept) < len(report.rounds)
            rows = [[_percent(share) for share in row] for row in shares.values()]
            names: list[Json] = [plain(name, longest=22) for name in shares]
            hover = f"<b>%{{y}}</b><br>round: %{{x}}<br>{word}: %{{z:.1f}} %<extra></extra>"
            views[f"{group.name}: {word}"] = heat([*rounds], names, rows, ("round", "", f"{word} [%]"), hover)
    if not views:
        return None
    caption = "Share of each layer's prunable weights, first seed of each group; the input side is on top."
    caption += f" Evenly spaced {COLUMNS} rounds are shown." if some else ""
    return Figure("Density by layer and round", caption, views, height=120 + 18 * max(8, tallest))


def _percent(share: float | None) -> float | None:
    return None if share is None else round(100 * share, 2)


def labels(groups: Sequence[Group]) -> Figure | None:
    """Training samples by client and class, one view a distinct partition; None where no run kept its partition."""
    named: dict[str, tuple[Report, LabelSample, list[str]]] = {}
    for report, name in ((group.reports[0], group.name) for group in groups):
        if (sample := LabelSample.of(report)) is not None:
            named.setdefault(sample.same, (report, sample, []))[2].append(name)
    views: dict[str, Chart] = {}
    some = False
    for report, sample, names in named.values():
        if len(sample.rows[0]) < 2:
            continue  # targets that are no classes
        some |= len(sample.kept) < sample.clients
        rows = [list(map(float, row)) for row in zip(*sample.rows, strict=True)]
        whose = "all" if len(named) == 1 else ", ".join(names)
        titles = ("client", "class", "samples")
        hover = "client: %{x}<br>class: %{y}<br>training samples: %{z}<extra></extra>"
        classes: list[Json] = [str(c) for c in range(len(rows))]
        views[f"{whose}, seed {report.results.seed}"] = heat([*sample.kept], classes, rows, titles, hover)
    caption = "Training samples by client and class."
    caption += f" Evenly spaced {COLUMNS} clients are shown." if some else ""
    return Figure("Labels of the clients", caption, views) if views else None
