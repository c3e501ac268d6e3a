"""The live page: what it reads, whom it answers, and that a real browser shows a run that goes on."""

from __future__ import annotations

import http.client
import io
import json
import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
from browser import dom_at, in_a_browser
from command import cli_here
from federation import FOUR, run_tiny

from fl_sim import Report
from fl_sim.cli import live_state
from fl_sim.cli.live_server import LiveServer
from fl_sim.cli.live_state import POINTS, RunView, Watch
from fl_sim.codecs.description import Description
from fl_sim.communication.ledger import Ledger
from fl_sim.core.observer import Silent
from fl_sim.simulation.live_clients import SHOWN, LiveClients
from fl_sim.simulation.live_log import INTERVAL_S, LiveLog
from fl_sim.training.tasks import Metric

ACCURACY = Metric("accuracy", higher=True, percent=True)
WRONG = '{"clients": 3, "messages": [1], "sections": {"a": "b"}, "cohort": "x"}'
ROW = {"round": 1, "uplink_bytes": 5, "downlink_bytes": 7, "accuracy": 0.5, "loss": 1.0}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """A run in which some clients drop out of the simulated network."""
    network = ("network.links.4G=1", "network.dropout=0.6")
    return run_tiny(tmp_path_factory.mktemp("runs"), "model.name=mlp", *FOUR, *network)


@contextmanager
def serving(*places: Path) -> Iterator[LiveServer]:
    with LiveServer(Watch(places).state) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def get(server: LiveServer, path: str, host: str | None = None) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=5)
    connection.request("GET", path, headers={} if host is None else {"Host": host})
    answer = connection.getresponse()
    found = answer.status, answer.read(), dict(answer.getheaders())
    connection.close()
    return found


def started(folder: Path, rows: list[dict[str, float]]) -> None:
    """The folder of a run in progress, of this process."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text("rounds = 9\n")
    (folder / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_finished_run_is_shown_from_its_folder_and_from_the_one_above(report: Report) -> None:
    for place in (report.folder, report.folder.parent):
        (run,) = Watch([place]).state()["runs"]  # type: ignore[misc]
        assert (run["status"], run["round"], run["rounds"]) == ("finished", 2, 2)
        assert (run["up"], run["down"]) == (report.summary["uplink_bytes"], report.summary["downlink_bytes"])
        totals = report.ledger.total(by=("direction", "section"))
        assert run["sections"] == {f"{way} {section}": size for (way, section), size in totals.items()}
        assert run["curve"] == [
            (row["round"], row["accuracy"], row["uplink_bytes"], row["downlink_bytes"]) for row in report.rounds
        ]
        last = report.rounds[-1]
        assert (run["saved"], run["alive"]) == (last["saved_bytes"], last["density"])  # as the terminal has them


def test_a_folder_that_is_not_there_is_said(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its page would wait for a run under a misspelt name."""

    def ended(server: LiveServer) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LiveServer, "serve_forever", ended)
    monkeypatch.setattr("os.nice", lambda niceness: None)  # of this process, for good
    assert cli_here(monkeypatch, "watch", str(report.folder), str(tmp_path / "rnus")) == 0
    address, *more = capsys.readouterr().out.splitlines()
    assert address.startswith("watch: http://127.0.0.1:")
    assert more == [f"watch: {tmp_path / 'rnus'}: not there yet", "watch: ended"]


def test_runs_of_one_name_are_told_apart_by_the_folders_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("x/first/tiny", "x/second/tiny", "y/first/tiny", "y/first/other"):
        started(tmp_path / place, [ROW])
    monkeypatch.chdir(tmp_path)
    places = [Path("x/first"), tmp_path / "x/first/tiny", Path("x/second"), Path("y/first")]
    names = [run["name"] for run in Watch(places).state()["runs"]]  # type: ignore[attr-defined]
    assert sorted(names) == ["other", "second/tiny", "x/first/tiny", "y/first/tiny"]


def test_rows_come_as_they_are_written_and_a_run_that_starts_over_is_seen(tmp_path: Path) -> None:
    started(tmp_path / "a", [ROW])
    view = RunView(tmp_path / "a")
    view.refresh()
    with (tmp_path / "a" / "rounds.jsonl").open("a") as file:
        file.write(json.dumps({**ROW, "round": 2}) + "\n" + '{"round": 3, "upl')
        file.flush()
        view.refresh()
        assert [row[0] for row in view.rows] == [1, 2]
        file.write('ink_bytes": 9}\n')
    view.refresh()
    assert [row[0] for row in view.rows] == [1, 2, 3]
    (tmp_path / "a" / "rounds.jsonl").write_text("")
    view.refresh()
    assert view.rows == []


@pytest.mark.parametrize("name", ["rounds.jsonl", "live.json", "config.toml"])
@pytest.mark.parametrize(
    "text",
    [
        "",
        "[",
        "null",
        "[1]",
        '{"clients": 3, "messages": [1], "sections": {"a": "b"}, "cohort": "x"}',
        '{"round": "x"}\n',
        '{"pid": -1, "rounds": 1e99}',
        "\x00\xff",
    ],
)
def test_damaged_files_stop_no_page(name: str, text: str, tmp_path: Path) -> None:
    started(tmp_path / "a", [ROW])
    (tmp_path / "a" / name).write_text(text)
    (run,) = Watch([tmp_path]).state()["runs"]  # type: ignore[misc]
    assert run["name"] == "a"
    assert (run["clients"], run["messages"], run["sections"], run["cohort"]) == ([], [], {}, 0)
    json.dumps(run)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    started(tmp_path / "a", [ROW])
    (tmp_path / "a" / "rounds.jsonl").unlink()
    os.mkfifo(tmp_path / "a" / "rounds.jsonl")
    assert len(Watch([tmp_path]).state()["runs"]) == 1  # type: ignore[arg-type]


def test_long_curves_are_thinned_and_keep_their_last_point(tmp_path: Path) -> None:
    started(tmp_path / "a", [{**ROW, "round": number} for number in range(1, 2001)])
    (run,) = Watch([tmp_path]).state()["runs"]  # type: ignore[misc]
    assert len(run["curve"]) <= POINTS + 1
    assert run["curve"][-1][0] == 2000


def test_the_log_of_a_run_is_small_and_seldom(tmp_path: Path) -> None:
    now = [100.0]
    with LiveLog(tmp_path, Ledger(), 9, Silent(), ACCURACY, clock=lambda: now[0]) as live:
        for answered in range(1, 1001):
            live.reply(answered, 1000)
        assert json.loads((tmp_path / "live.json").read_text())["answered"] == 0
        now[0] += INTERVAL_S
        for number in range(200):
            logging.getLogger("fl_sim").warning("round 1: client %d: KeyError: 'x' (my_client.py:3)", number)
        live.round({"round": 3})
        now[0] += INTERVAL_S
        live.reply(1, 1000)
        told = json.loads((tmp_path / "live.json").read_text())
        assert (told["round"], told["answered"], told["cohort"], told["rounds"]) == (3, 1, 1000, 9)
        assert told["messages"][-1] == "round 1: client 199: KeyError: 'x' (my_client.py:3)"
        assert len((tmp_path / "live.json").read_text()) < 10_000
        assert Watch([tmp_path]).state()["runs"] == []
        started(tmp_path, [ROW])
        (run,) = Watch([tmp_path]).state()["runs"]  # type: ignore[misc]
        assert run["status"] == "running"
        assert run["eta"] is not None
    (run,) = Watch([tmp_path]).state()["runs"]  # type: ignore[misc]
    assert run["status"] == "stopped"


def test_the_newest_round_s_clients_are_shown_as_the_ledger_has_them(report: Report) -> None:
    (run,) = Watch([report.folder]).state()["runs"]  # type: ignore[misc]
    rows = report.ledger.to_table().to_pylist()
    ways = {
        way: {row["client"] for row in rows if row["round"] == 2 and row["direction"] == way} for way in ("up", "down")
    }
    lost = ways["down"] - ways["up"]
    assert lost
    assert run["clients"] == [(c, "failed" if c in lost else "answered") for c in sorted(ways["down"])]
    assert run["states"] == {"answered": len(ways["up"]), "failed": len(lost)}
    assert sum(times for _, times in run["failures"]) == sum(row["failures"] for row in report.rounds)


def test_states_change_as_replies_are_booked(tmp_path: Path) -> None:
    ledger = Ledger()
    live = LiveClients(ledger)

    def book(direction: str, client: int, status: str = "ok", phase: str = "train") -> None:
        ledger.book(
            round=1, direction=direction, phase=phase, client=client, protocol_bytes=9, status=status,
            description=Description.opaque(5),
        )  # fmt: skip

    assert live.told() == {"clients": [], "states": {}, "failures": []}
    for client in range(5):
        book("down", client)
    assert live.told()["states"] == {"training": 5}
    book("up", 3)
    book("up", 1, "late")
    book("up", 4, "rejected")
    live.warned("round 1: client 0: KeyError: 'x' (my_client.py:3)")
    live.warned("no client in this one")
    now = [[0, "failed"], [1, "late"], [2, "training"], [3, "answered"], [4, "rejected"]]
    assert live.told()["clients"] == now
    live.round()
    assert live.told()["clients"] == now  # until there is something newer
    book("down", 2, phase="evaluate")
    assert live.told()["clients"] == []
    book("down", 0)
    assert (live.told()["clients"], live.told()["failures"]) == ([[0, "training"]], [(0, 1)])
    ledger.cut(0)
    assert live.told()["clients"] == []
    for client in range(SHOWN + 1):
        book("down", client)
    assert (live.told()["clients"], live.told()["states"]) == ([], {"training": SHOWN + 1})


def test_a_version_of_the_log_takes_less_than_a_hundredth_of_the_time_between_two(tmp_path: Path) -> None:
    """With a cohort of a thousand clients, of which all have answered."""
    ledger, seconds = Ledger(), []
    for client in range(1000):
        for way in ("down", "up"):
            ledger.book(
                round=1,
                direction=way,
                phase="train",
                client=client,
                protocol_bytes=9,
                description=Description.opaque(5),
            )
    with LiveLog(tmp_path, ledger, 9, Silent(), ACCURACY) as live:
        live.reply(1000, 1000)
        for _ in range(5):
            started = time.process_time()
            live._write()
            seconds.append(time.process_time() - started)
    assert min(seconds) < INTERVAL_S / 100


def test_a_slow_disk_is_written_to_less_often(tmp_path: Path) -> None:
    """Of a hundred seconds with replies all the time, at most a fifth of one goes into the log, beside its first version."""
    now, spent = [100.0], [0.0]

    class Slow(Ledger):
        def total(self, *words: Any, **options: Any) -> Any:
            now[0] += 0.05
            spent[0] += 0.05
            return super().total(*words, **options)

    with LiveLog(tmp_path, Slow(), 9, Silent(), ACCURACY, clock=lambda: now[0]) as live:
        while now[0] < 200:
            now[0] += 0.01
            live.reply(1, 2)
    assert 0.05 < spent[0] <= 0.26


@pytest.mark.parametrize("heard", [False, True])
def test_a_warning_in_a_round_is_printed_where_nobody_set_up_logging(
    heard: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a script of one's own: PyTorch's or anybody's warnings are printed there too, and the log of a run is no reader."""
    root, log, elsewhere = logging.getLogger(), logging.getLogger("fl_sim"), io.StringIO()
    monkeypatch.setattr(root, "handlers", [logging.StreamHandler(elsewhere)] if heard else [])
    monkeypatch.setattr(log, "handlers", [])
    with (
        LiveLog(tmp_path, Ledger(), 3, Silent(), ACCURACY),
        LiveLog(tmp_path, Ledger(), 3, Silent(), ACCURACY),  # of a second run in another thread
    ):
        log.warning("client 3: %s", "lost")
        log.info("not this")
    printed = capsys.readouterr().err
    assert (printed, elsewhere.getvalue()) == (("", "client 3: lost\n") if heard else ("client 3: lost\n", ""))


def test_a_stopped_run_says_why(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no more"), LiveLog(tmp_path, Ledger(), 9, Silent(), ACCURACY):
        raise ValueError("no more")
    assert json.loads((tmp_path / "live.json").read_text())["messages"] == ["stopped: ValueError: no more"]


def test_only_who_knows_the_token_and_comes_by_this_name_is_answered(report: Report) -> None:
    with serving(report.folder) as server:
        assert server.server_address[0] == "127.0.0.1"
        own = urlsplit(server.url).path
        assert len(server.token) >= 32
        for name in ("", "page.js", "page.css", "plotly.js", "state.json"):
            status, data, headers = get(server, own + name)
            assert status == 200
            assert data
            assert "default-src 'none'" in headers["Content-Security-Policy"]
        wrong = [
            "/",
            "/state.json",
            f"/{server.token[:-1]}/state.json",
            f"{own}../../etc/passwd",
            f"{own}x",
            f"/{server.token}",
        ]
        assert {get(server, path)[0] for path in wrong} == {404}
        assert get(server, own, host="evil.example")[0] == 404
        assert get(server, own, host=f"localhost:{server.server_port}")[0] == 200


def test_a_page_that_has_the_newest_version_is_sent_nothing(report: Report) -> None:
    with serving(report.folder) as server:
        own = urlsplit(server.url).path + "state.json"
        version = json.loads(get(server, own)[1])["version"]
        status, data, _ = get(server, f"{own}?since={version}")
        assert (status, data) == (204, b"")
        for wrong in ("0", "-1", "x", "", "9" * 15, "9" * 999, "²", f"{version}&x"):
            status, data, _ = get(server, f"{own}?since={quote(wrong)}")
            assert (status, len(json.loads(data)["runs"])) == (200, 1)


def test_the_metric_of_the_run_is_drawn_whatever_it_is_called(tmp_path: Path) -> None:
    report = run_tiny(tmp_path, "task=regression", "data.source=diabetes", "data.partition=iid", "model.name=linear")
    (run,) = Watch([tmp_path]).state()["runs"]  # type: ignore[misc]
    assert (run["metric"], run["percent"]) == ("rmse", False)
    assert [row[1] for row in run["curve"]] == [row["rmse"] for row in report.rounds]


def test_pages_that_ask_at_once_are_told_each_round_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started(tmp_path / "a", [ROW])
    watch = Watch([tmp_path])
    both = threading.Barrier(2)

    class Slow(io.FileIO):
        def read(self, size: int | None = -1) -> bytes:
            with suppress(threading.BrokenBarrierError):
                both.wait(0.1)  # a second page that is answered meanwhile would be here too
            return super().read(-1 if size is None else size) or b""

    monkeypatch.setattr(live_state, "open_plain", Slow)
    with ThreadPoolExecutor(2) as pages:
        states = [pages.submit(watch.state) for _ in range(2)]
    for state in states:
        (run,) = state.result()["runs"]  # type: ignore[misc]
        assert [row[0] for row in run["curve"]] == [1]


def test_a_request_without_a_path_is_not_found(report: Report, capfd: pytest.CaptureFixture[str]) -> None:
    with serving(report.folder) as server:
        assert get(server, "*")[0] == 404
    assert "Traceback" not in capfd.readouterr().err


@in_a_browser
def test_a_browser_shows_runs_opened_late_and_again(report: Report, tmp_path: Path) -> None:
    hostile = tmp_path / "<img src=x onerror=alert(1)>"
    with LiveLog(hostile.parent, Ledger(), 9, Silent(), ACCURACY):
        started(
            hostile, [ROW, {**ROW, "round": 2, "accuracy": 0.75, "failures": 3, "saved_bytes": 2e6, "density": 0.5}]
        )
        (tmp_path / "live.json").replace(hostile / "live.json")
        with serving(report.folder, tmp_path) as server:
            for visit in range(2):
                shown = dom_at(server.url, tmp_path / f"profile{visit}")
                text = re.sub(r"<[^>]*>", "", shown)
                assert "1 running, 1 finished, 0 stopped" in text
                assert (
                    "round 2 of 9, test accuracy 75.00 % (round 2), 3 clients failed in the last round, up 5 B, down 7 B, "
                    "saved 2.00 MB, 50 % of weights alive" in text
                )
                assert 'class="main-svg"' in shown
                assert "<img" not in shown
