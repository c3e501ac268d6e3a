"""The chart of features that BatchNorm has switched off."""

from __future__ import annotations

from collections.abc import Sequence

from fl_sim.config.toml import Json
from fl_sim.report.charts import Chart, Figure, Style, plain
from fl_sim.report.groups import Group


def disabled_features(groups: Sequence[Group]) -> Figure | None:
    """Share of channels with |gamma| below 0.01 by BatchNorm layer, one view a group; None where there are none."""
    views: dict[str, Chart] = {}
    for index, group in enumerate(groups):
        shares = group.reports[0].results.disabled_features
        if not any(shares.values()):
            continue
        names: list[Json] = [plain(name, longest=22) for name in shares]
        heights: list[Json] = [100 * share for share in shares.values()]
        hover = "<b>%{x}</b><br>disabled: %{y:.1f} % of the channels<extra></extra>"
        marker: Chart = {"color": Style(index).colour}
        trace: Chart = {"type": "bar", "x": names, "y": heights, "marker": marker, "hovertemplate": hover}
        x: Chart = {"type": "category", "automargin": True, "tickangle": -60}
        y: Chart = {"title": {"text": "disabled [%]"}, "rangemode": "tozero"}
        views[group.name] = {"data": [trace], "layout": {"xaxis": x, "yaxis": y}}
    if not views:
        return None
    caption = (
        "Share of each BatchNorm layer's channels whose |gamma| ended below 0.01, first seed of each group; the input side "
        "is on the left. `fl-sim prune RUN --method batchnorm` cuts them out."
    )
    return Figure("Features that training switched off", caption, views, height=380)
