"""The virtual clock: laws, and federations with late and lost clients."""

from __future__ import annotations

from pathlib import Path

import pytest
from federation import WHOLE, run_tiny, tiny
from hypothesis import given
from hypothesis import strategies as st

from fl_sim.communication.virtual_clock import PRESETS, Link, Network, time_to
from fl_sim.core.types import UserError


def test_seconds_are_bytes_over_bandwidth_and_latency() -> None:
    link = Link(8, 4, 100)
    assert link.down_s(1_000_000) == pytest.approx(1.1)
    assert link.up_s(1_000_000) == pytest.approx(2.1)


@given(down=st.integers(0, 10**8), up=st.integers(0, 10**8), more=st.integers(1, 10**7), client=st.integers(0, 99))
def test_more_bytes_and_more_samples_never_take_less_time(down: int, up: int, more: int, client: int) -> None:
    network = Network(links={"3G": 1, "Wi-Fi": 2}, speed_spread=3)
    base = network.seconds(client=client, seed=0, down_bytes=down, up_bytes=up, samples=100)
    assert network.seconds(client=client, seed=0, down_bytes=down + more, up_bytes=up, samples=100) > base
    assert network.seconds(client=client, seed=0, down_bytes=down, up_bytes=up + more, samples=100) > base
    assert network.seconds(client=client, seed=0, down_bytes=down, up_bytes=up, samples=101) > base


def test_profiles_follow_weights_and_the_seed() -> None:
    network = Network(links={"3G": 1, "Wi-Fi": 3}, speed_spread=1)
    links = [network.profile(c, seed=0)[0] for c in range(2000)]
    assert links.count(PRESETS["Wi-Fi"]) == pytest.approx(1500, abs=80)
    assert links == [network.profile(c, seed=0)[0] for c in range(2000)]
    assert links != [network.profile(c, seed=1)[0] for c in range(2000)]
    speeds = [network.profile(c, seed=0)[1] for c in range(2000)]
    assert 0.5 <= min(speeds) < 0.55
    assert 1.9 < max(speeds) <= 2.0


@given(finished=st.lists(st.floats(0, 1e6), max_size=9), deadline=st.floats(0.01, 1e6), later=st.floats(0, 1e6))
def test_more_patience_never_loses_a_client_and_never_shortens_a_round(
    finished: list[float], deadline: float, later: float
) -> None:
    def round_of(network: Network) -> tuple[int, float]:
        on_time = [s for s in finished if not network.is_late(s)]
        return len(on_time), network.round_s(on_time, missing=len(on_time) < len(finished))

    links = {"4G": 1.0}
    hasty, patient = (round_of(Network(links=links, deadline_s=d)) for d in (deadline, deadline + later))
    endless = round_of(Network(links=links))
    assert hasty[0] <= patient[0] <= endless[0] == len(finished)
    assert hasty[1] <= patient[1] <= max(endless[1], deadline + later)
    assert hasty[1] <= deadline
    assert endless[1] == max(finished, default=0.0)


def test_faster_links_finish_sooner_in_a_federation(tmp_path: Path) -> None:
    spent = {
        name: run_tiny(tmp_path / name, f'network.links={{"{name}" = 1}}').summary["simulated_s"] for name in PRESETS
    }
    assert spent["3G"] > spent["4G"] > spent["Wi-Fi"] > 0


def test_sparse_uploads_shorten_the_simulated_time(tmp_path: Path) -> None:
    dense = run_tiny(tmp_path / "dense", 'network.links={"3G" = 1}')
    sparse = run_tiny(
        tmp_path / "sparse", 'network.links={"3G" = 1}', "client.target=clients.presets:topk", "client.density=0.05"
    )
    assert sparse.summary["simulated_s"] < dense.summary["simulated_s"]


def test_late_clients_cost_their_bytes_and_are_not_used(tmp_path: Path) -> None:
    links = ['network.links={"3G" = 1, "Wi-Fi" = 1}', "network.samples_per_s=1e6", "cohort.size=6", "seed=3", *WHOLE]
    patient = run_tiny(tmp_path / "patient", *links)
    hasty = run_tiny(tmp_path / "hasty", *links, "network.deadline_s=1.0")
    late = hasty.ledger.total(by=("status",)).get(("late",), 0)
    count = hasty.summary["failures"]["late"]
    assert 0 < count < 12
    assert late == count * patient.summary["uplink_bytes"] // 12
    assert hasty.summary["uplink_bytes"] == patient.summary["uplink_bytes"]
    assert hasty.summary["params_sha256"] != patient.summary["params_sha256"]
    assert hasty.summary["simulated_s"] == pytest.approx(2.0)
    assert [row["clients"] for row in hasty.rounds] == [6 - count // 2] * 2


def test_dropped_clients_cost_their_downlink_only(tmp_path: Path) -> None:
    report = run_tiny(tmp_path, 'network.links={"4G" = 1}', "network.dropout=0.4", "cohort.size=6", "rounds=4")
    lost = report.summary["failures"]["lost"]
    assert 0 < lost < 24
    assert report.ledger.messages(phase="train") == {"down": 24, "up": 24 - lost}


def test_time_to_accuracy() -> None:
    rows = [{"accuracy": 0.3, "simulated_s": 5.0}, {"simulated_s": 7.0}, {"accuracy": 0.5, "simulated_s": 9.0}]
    assert (time_to(rows, 0.3), time_to(rows, 0.4), time_to(rows, 0.6)) == (5.0, 9.0, None)


@pytest.mark.parametrize(
    "bad",
    [
        {"links": {"5G": 1}},
        {"links": {"4G": 1}, "deadline_s": 0.0},
        {"dropout": 1.0},
        {"links": {"4G": -1}},
        {"links": {"4G": 0, "3G": 0.0}},
        {"links": {"4G": float("nan")}},
        {"links": {"4G": 1}, "samples_per_s": float("nan")},
        {"links": {"4G": 1}, "speed_spread": float("inf")},
    ],
)
def test_wrong_networks_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(UserError, match="network"):
        Network(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("key", ["deadline_s=3", "dropout=0.1", "samples_per_s=5", "speed_spread=1"])
def test_keys_that_no_clock_would_read_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(UserError, match=rf"network\.{key.partition('=')[0]} needs network\.links"):
        tiny(tmp_path, f"network.{key}")
    tiny(tmp_path, f"network.{key}", 'network.links={"4G" = 1}')
