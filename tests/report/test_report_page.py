"""The HTML report: laws of its numbers, nothing unescaped, and and charts as values."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from federation import FOUR, WHOLE, run_tiny

from fl_sim import Report, UserError
from fl_sim.communication.estimates import ESTIMATES, SOURCES
from fl_sim.communication.ledger import Ledger
from fl_sim.communication.virtual_clock import PRESETS
from fl_sim.report import write_page
from fl_sim.report.by_density import by_density, families_of
from fl_sim.report.flows import Flows
from fl_sim.report.groups import Spread, grouped
from fl_sim.report.headline import headline
from fl_sim.report.measures import MEASURES
from fl_sim.report.numbers import accuracy_curve, at_megabytes, densities, pareto
from fl_sim.report.overfitting import overfitting


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[Report]:
    """Dense and top-k, two seeds each, one of them with a client that is always late; loaded from their folders."""
    out = tmp_path_factory.mktemp("runs")
    topk = ("name=topk", "client=clients.presets:topk", "wire.error_feedback=true")
    runs = [run_tiny(out, "model.name=mlp", f"seed={seed}", *extra) for seed in (0, 1) for extra in ((), topk)]
    return [Report.load(run.folder) for run in runs]


def test_every_byte_is_in_exactly_one_part(reports: list[Report]) -> None:
    for report in reports:
        assert sum(report.flows.parts.values()) == report.summary["total_bytes"]


def test_rounds_say_what_was_saved_so_far(reports: list[Report]) -> None:
    for report in reports:
        saved = [row["saved_bytes"] for row in report.rounds]
        assert saved[-1] == pytest.approx(report.summary["saving"] * report.summary["dense_total_bytes"], abs=1e-3)
        assert saved == sorted(saved)
    assert {report.rounds[-1]["saved_bytes"] > 0 for report in reports} == {False, True}


def test_waste_is_what_led_to_no_update(tmp_path: Path) -> None:
    late = run_tiny(
        tmp_path, *WHOLE, *FOUR, "network.links.3G=1", "network.deadline_s=2.1", "rounds=3", "training.epochs=1"
    )
    assert late.summary["failures"]["late"] > 0
    parts, ledger = late.flows.parts, late.ledger
    rows = zip(
        *(ledger.column(c).tolist() for c in ("round", "client", "direction", "status", "payload_bytes")), strict=True
    )
    up, down, ok = 0, {}, set()
    for number, client, direction, status, size in rows:
        if direction == 0:
            down[number, client] = down.get((number, client), 0) + size
        elif status == 0:
            ok.add((number, client))
        else:
            up += size
    assert parts["up", "waste"] == up
    assert up > 0
    assert parts["down", "waste"] == sum(size for task, size in down.items() if task not in ok) > 0


def test_link_time_is_the_slowest_clients_transfers(reports: list[Report]) -> None:
    report, link = reports[0], PRESETS["3G"]
    size = report.ledger.total(by=("round", "client", "direction"))
    slowest = {
        number: max(
            link.down_s(size[number, client, "down"]) + link.up_s(size[number, client, "up"])
            for n, client, d in size
            if n == number and d == "up"
        )
        for number in (1, 2)
    }
    assert report.flows.seconds(link) == pytest.approx({1: slowest[1], 2: slowest[1] + slowest[2]})


def test_spread_is_students() -> None:
    spread = Spread.of([1.0, 2.0, None, 3.0])
    assert (spread.mean, spread.seeds) == (2.0, 4)
    assert spread.ci == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    assert spread.text(1) == "2.0 ± 2.5 (3 of 4)"
    assert Spread.of([None]).mean is None
    assert Spread.of([5.0]).ci is None


def test_no_point_of_the_front_is_beaten() -> None:
    points = [tuple(p) for p in np.random.default_rng(0).integers(0, 20, (40, 2)).tolist()]
    beaten = [p for p in points if any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in points)]
    assert set(pareto(points)) == set(points) - set(beaten)


def test_seeds_make_one_group_and_other_settings_another(reports: list[Report], tmp_path: Path) -> None:
    groups = grouped([*reports, reports[0]])
    assert [(g.name, g.seeds) for g in groups] == [("tiny", "0, 1"), ("topk", "0, 1")]
    assert grouped(reports[:1] * 2)[0].reports == (reports[0],)
    other = run_tiny(tmp_path, "model.name=mlp", "training.lr=0.05", "rounds=1")
    assert [g.name for g in grouped([reports[0], other])] == [
        "tiny rounds=2 training.lr=0.1",
        "tiny rounds=1 training.lr=0.05",
    ]


def test_curves_are_means_over_the_seeds(reports: list[Report]) -> None:
    dense = [report for report in reports if report.summary["name"] == "tiny"]
    curve = accuracy_curve(grouped(dense)[0], at_megabytes)
    final = [100 * report.results.accuracy.final for report in dense]
    assert curve.y[-1] == pytest.approx(sum(final) / 2)
    assert curve.x[-1] == pytest.approx(sum(r.results.total_bytes for r in dense) / 2e6)
    assert curve.low[-1] <= curve.y[-1] <= curve.high[-1]


def test_densities_and_labels_are_recorded(reports: list[Report]) -> None:
    topk = next(report for report in reports if report.summary["name"] == "topk")
    rounds, sent = densities(topk, "sent")
    assert rounds == [1, 2]
    assert list(sent) == ["1.weight", "3.weight"]
    assert all(0 < share < 1 for row in sent.values() for share in row)
    assert densities(topk, "density") == ([1, 2], {})
    assert sum(map(sum, topk.label_counts)) > 1000
    assert len(topk.label_counts) == topk.summary["num_clients"]


def test_pruning_shows_its_layers(tmp_path: Path) -> None:
    pruned = run_tiny(
        tmp_path, "model.name=mlp", "strategy=strategies.presets:global_magnitude", "strategy.density=0.2"
    )
    _, alive = densities(pruned, "density")
    assert min(row[-1] for row in alive.values()) < 0.2 < max(row[-1] for row in alive.values())
    assert densities(pruned, "sent")[1] == {}


def test_runs_that_differ_in_density_alone_are_one_line(reports: list[Report], tmp_path: Path) -> None:
    assert by_density(grouped(reports)) is None
    start = ["model.name=mlp", "strategy=strategies.presets:global_magnitude", "strategy.at=0", "rounds=1"]
    pruned = [
        run_tiny(tmp_path, *start, f"strategy.allocate={allocate}", f"strategy.density={density}", f"seed={seed}")
        for allocate, density, seed in (("erk", 0.05, 0), ("global", 0.05, 0), ("global", 0.2, 0), ("global", 0.2, 1))
    ]
    (line,) = families_of(grouped(pruned))
    assert line.name == "tiny strategy.allocate=global"
    figure = by_density(grouped(pruned))
    assert figure is not None
    (drawn,) = figure.views["density"]["data"]
    assert drawn["x"] == pytest.approx([20, 5], rel=1e-3)
    both = [100 * report.results.accuracy.final for report in pruned[2:]]
    assert drawn["y"] == pytest.approx([sum(both) / 2, 100 * pruned[1].results.accuracy.final])
    assert drawn["error_y"]["array"][1] == 0.0
    (traffic_line,) = figure.views["traffic"]["data"]
    assert traffic_line["x"][0] > traffic_line["x"][1]
    write_page(pruned, tmp_path / "x.html")
    assert "Accuracy by density" in (tmp_path / "x.html").read_text()


def test_over_fitting_is_drawn_where_it_was_measured(reports: list[Report], tmp_path: Path) -> None:
    assert overfitting(grouped(reports)) is None
    measured = [run_tiny(tmp_path, "model.name=mlp", f"seed={seed}", "evaluate.fit=50") for seed in (0, 1)]
    figure = overfitting(grouped(measured))
    assert figure is not None
    (*_, line), (*_, accuracies) = (figure.views[name]["data"] for name in ("gap in loss", "gap in accuracy"))
    last = [report.rounds[-1] for report in measured]
    assert line["y"][-1] == pytest.approx(sum(r["train_unseen_loss"] - r["train_seen_loss"] for r in last) / 2)
    gaps = [100 * (r["train_seen_accuracy"] - r["train_unseen_accuracy"]) for r in last]
    assert accuracies["y"][-1] == pytest.approx(sum(gaps) / 2)
    write_page([*reports, *measured], tmp_path / "x.html")
    assert "Over-fitting of the clients" in (tmp_path / "x.html").read_text()


def test_headline_says_saving_and_loss(reports: list[Report]) -> None:
    both, alone = headline(grouped(reports)), headline(grouped(reports[:1]))
    dense, topk = grouped(reports)
    total = [MEASURES[1].spread(g).mean + MEASURES[2].spread(g).mean for g in (dense, topk)]
    assert f"{100 * (1 - total[1] / total[0]):.1f} % less" in both
    assert "over 2 seeds" in both
    assert "as much as the same messages sent dense, and reached" in alone


def test_headline_compares_with_what_is_nearest_to_dense(reports: list[Report]) -> None:
    costly = replace(reports[1], summary={**reports[1].summary, "name": "costly", "saving": -0.2})
    assert "MB of costly," not in headline(grouped([*reports, costly]))


class _Text(HTMLParser):
    """Tags and attributes that a page really opens."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


HOSTILE = """</script><script>document.title="pwned"</script><img src=x onerror=alert(1)>"'&{{}}<b>"""


def test_every_string_of_a_run_is_escaped(reports: list[Report], tmp_path: Path) -> None:
    first = reports[0]
    rows = [{**row, f"density/{HOSTILE}": 0.5} for row in first.rounds]
    summary = {**first.summary, "name": HOSTILE, "engine": HOSTILE, "precision": HOSTILE, "estimates": {HOSTILE: 1}}
    hostile = replace(first, summary={**summary, "versions": {HOSTILE: HOSTILE}}, rounds=rows)
    write_page([hostile, reports[1]], tmp_path / "x.html")
    text = (tmp_path / "x.html").read_text()
    parsed = _Text()
    parsed.feed(text)
    assert [tag for tag, _ in parsed.tags if tag in ("img", "b", "link", "iframe")] == []
    assert sum(tag == "script" for tag, _ in parsed.tags) == 3 + sum(a.get("class") == "figure" for _, a in parsed.tags)
    assert not any(name.startswith("on") or name == "src" for _, attrs in parsed.tags for name in attrs)
    assert {attrs["href"] for _, attrs in parsed.tags if "href" in attrs} <= set(SOURCES.values())


def test_views_are_valid_json_and_named(reports: list[Report], tmp_path: Path) -> None:
    write_page(reports, tmp_path / "x.html")
    text = (tmp_path / "x.html").read_text()
    blocks = [part.split("</script>")[0] for part in text.split('<script type="application/json">')[1:]]
    charts = [view for block in blocks for view in json.loads(block)]
    assert len(charts) >= 10
    for chart in charts:
        axes = [chart["layout"][axis] for axis in ("xaxis", "yaxis")]
        assert all(axis.get("visible") is False or "title" in axis for axis in axes)
        assert chart["data"]


def test_every_link_is_of_a_formula() -> None:
    assert set(SOURCES) <= set(ESTIMATES)
    assert all(link.startswith("https://github.com/") for link in SOURCES.values())


def test_a_damaged_folder_is_the_users_error(reports: list[Report], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(reports[0].folder, folder)
    (folder / "config.toml").write_text("= broken")
    with pytest.raises(UserError, match=r"config\.toml"):
        write_page([Report.load(folder)], tmp_path / "x.html")
    broken = replace(reports[0], summary={**reports[0].summary, "macs": {}})
    with pytest.raises(UserError, match=r"macs\.dense"):
        write_page([broken], tmp_path / "x.html")


def test_an_empty_ledger_has_no_parts() -> None:
    assert set(Flows.of(Ledger()).parts.values()) == {0}
