"""Pages of long runs: the sums of a ledger do not depend on its pieces, curves are thinned, size and time are bounded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from federation import run_tiny

from fl_sim import Report, UserError
from fl_sim.communication.ledger import ARROW, CODES, TYPES, WORDS, Ledger
from fl_sim.communication.virtual_clock import PRESETS
from fl_sim.report import write_page
from fl_sim.report.charts import COLUMNS, every_nth
from fl_sim.report.flows import Flows
from fl_sim.report.numbers import POINTS, Curve


def rounds_of(rounds: int, clients: int, lost: int = 0) -> pa.Table:
    """A ledger's table in which every client takes part in every round; `lost` of each round answer nothing usable."""
    rng, parts = np.random.default_rng(0), []
    for number in range(1, rounds + 1):
        for way, sections in (("down", ("values", "dense", "header")), ("up", ("values", "mask", "dense", "header"))):
            count = clients * len(sections)
            client = np.repeat(rng.permutation(clients), len(sections))
            section = np.tile([CODES["section"][name] for name in sections], clients)
            failed = (client < lost) & (way == "up")
            columns = {
                "round": np.full(count, number),
                "direction": np.full(count, CODES["direction"][way]),
                "phase": np.zeros(count),
                "client": client,
                "section": section,
                "payload_bytes": rng.integers(1, 9000, count),
                "dense_bytes": np.full(count, 9000),
                "status": np.where(failed, CODES["status"]["late"], 0),
            }
            parts.append({name: columns.get(name, np.zeros(count)) for name in TYPES})
    arrays = {}
    for name, code in TYPES.items():
        values = np.concatenate([part[name] for part in parts])
        coded = pa.array(values.astype("i1" if name in WORDS else code), "int8" if name in WORDS else ARROW[code])
        arrays[name] = pa.DictionaryArray.from_arrays(coded, pa.array(WORDS[name])) if name in WORDS else coded
    return pa.table(arrays)


def test_sums_do_not_depend_on_the_pieces(tmp_path: Path) -> None:
    pq.write_table(rounds_of(5, 9, lost=2), tmp_path / "ledger.parquet")
    found = []
    for block in (7, 64, 1 << 16):
        ledger = Ledger(block=block)
        ledger.extend(tmp_path / "ledger.parquet")
        flows = Flows.of(ledger)
        assert sum(flows.parts.values()) == ledger.total()[()]
        late = ledger.total(where={"status": "late"})[()]
        assert flows.parts["up", "waste"] == late > 0
        assert flows.parts["down", "waste"] > 0
        assert len(flows.rounds) == 45
        groups = [list(ledger.total(by=by).items()) for by in (("client", "section"), ("status", "round"))]
        found.append((flows.parts, flows.seconds(PRESETS["3G"]), flows.up.tolist(), flows.down.tolist(), groups))
    assert found[0] == found[1] == found[2]


def test_a_round_lasts_as_long_as_its_slowest_client(tmp_path: Path) -> None:
    """Against a plain loop, with clients of different sizes, one of which sent nothing back."""
    table, link = rounds_of(3, 5), PRESETS["3G"]
    pq.write_table(
        table.filter(pc.invert(pc.and_(pc.equal(table["client"], 2), pc.equal(table["direction"], "up")))),
        tmp_path / "x",
    )
    ledger = Ledger.read(tmp_path / "x")
    sizes = ledger.total(by=("round", "client", "direction"))
    total, expected = 0.0, {}
    for number in (1, 2, 3):
        down = {client: link.down_s(sizes[number, client, "down"]) for client in range(5)}
        up = {client: link.up_s(sizes[number, client, "up"]) for client in (0, 1, 3, 4)}
        total += max(down[client] + up.get(client, 0.0) for client in range(5))
        expected[number] = total
    assert Flows.of(ledger).seconds(link) == pytest.approx(expected)


def test_a_ledger_that_breaks_off_appends_nothing(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole.parquet", tmp_path / "broken.parquet"
    table = rounds_of(10, 2000)  # more than is read at a time, so that some of the broken file is good
    pq.write_table(table.slice(700, 70), whole)
    words = pa.array(["up"] * (len(table) - 1) + ["sideways"])
    pq.write_table(table.set_column(1, "direction", words), broken)
    ledger = Ledger.read(whole)
    before = (len(ledger), dict(ledger.sent), ledger.total())
    with pytest.raises(UserError, match="sideways"):
        ledger.extend(broken)
    assert (len(ledger), dict(ledger.sent), ledger.total()) == before
    ledger.extend(whole)
    assert ledger.total()[()] == 2 * before[2][()]


def test_a_thinned_curve_keeps_ends_and_extremes() -> None:
    y = np.random.default_rng(0).random(5000)
    y[1234], y[4321] = 7.0, -7.0
    curve = Curve(tuple(range(5000)), tuple(y), tuple(y - 1), tuple(y + 1))
    thin = curve.thinned()
    assert len(thin.x) <= POINTS
    assert (thin.x[0], thin.x[-1]) == (0, 4999)
    assert {1234, 4321} <= set(thin.x)
    assert thin.low == tuple(curve.low[int(x)] for x in thin.x)
    short = Curve((1.0, 2.0), (3.0, 4.0))
    assert short.thinned() is short


@pytest.mark.parametrize("count", [0, 1, COLUMNS, COLUMNS + 1, 1000])
def test_columns_of_a_heat_map_are_evenly_spaced(count: int) -> None:
    places = every_nth(count)
    assert len(places) == len(set(places)) == min(count, COLUMNS)
    assert not count or (places[0], places[-1]) == (0, count - 1)
    assert not count or max(np.diff(places), default=0) - min(np.diff(places), default=0) <= 1


def long_run(source: Path, folder: Path, rounds: int, clients: int) -> None:
    """Write the folder of a run of this size, with 60 layers and 100 classes, after the pattern of a small one."""
    shutil.copytree(source, folder)
    pq.write_table(rounds_of(rounds, clients), folder / "ledger.parquet", compression="zstd")
    last, rng = json.loads((source / "rounds.jsonl").read_text().splitlines()[-1]), np.random.default_rng(0)
    lines = []
    for number in range(1, rounds + 1):
        layers = {f"density/layer{i}.weight": round(float(share), 4) for i, share in enumerate(rng.random(60))}
        lines.append(json.dumps({**last, **layers, "round": number, "accuracy": float(rng.random())}))
    (folder / "rounds.jsonl").write_text("\n".join(lines) + "\n")
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({**summary, "num_clients": clients}))
    (folder / "partition.json").write_text(json.dumps(rng.integers(0, 60, (clients, 100)).tolist()))


def test_a_page_grows_little_with_rounds_and_clients(tmp_path: Path) -> None:
    small = run_tiny(tmp_path, "model.name=mlp", "rounds=1").folder
    long_run(small, tmp_path / "long", 500, 300)
    write_page([Report.load(tmp_path / "long")], tmp_path / "x.html")
    text = (tmp_path / "x.html").read_text()
    assert len(text) < 1_000_000
    assert f"Evenly spaced {COLUMNS} rounds are shown." in text
    assert f"Evenly spaced {COLUMNS} clients are shown." in text


BUILD = """
import re, sys, time
from pathlib import Path
import fl_sim.report.page
# Not ru_maxrss: that of a new process starts at the memory of the one that started it.
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
imported, started = peak(), time.process_time()
fl_sim.report.write_page([fl_sim.Report.load(Path(sys.argv[1]))], Path(sys.argv[2]))
print(time.process_time() - started, peak() - imported)
"""


@pytest.mark.slow
def test_a_thousand_rounds_of_a_thousand_clients(tmp_path: Path) -> None:
    """Built in a process of its own: seconds of the processor, and MB of memory beyond those of the imports."""
    small = run_tiny(tmp_path, "model.name=mlp", "rounds=1").folder
    long_run(small, tmp_path / "long", 1000, 1000)
    page = tmp_path / "x.html"
    command = [sys.executable, "-c", BUILD, str(tmp_path / "long"), str(page)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    seconds, megabytes = map(float, done.stdout.split())
    assert seconds < 10
    assert 10 < megabytes < 500
    assert page.stat().st_size < 1_500_000
