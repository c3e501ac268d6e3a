"""Attackers: who they are, what they send, and that every engine gives the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from federation import FOUR, run_tiny, same, tiny

from clients.attacks import ATTACKS, Attackers, attacked
from fl_sim import Report, UserError
from fl_sim.core.types import FlatParams, Task, Update
from fl_sim.data.split import Split
from fl_sim.simulation.client_side import attackers_of, client_of
from fl_sim.simulation.federation import Federation
from fl_sim.training.client import ClientContext

SMALL = ("model.name=mlp", "model.width=0.25", "training.steps=2", "attack.share=0.5")
RECEIVED = FlatParams.pack({"w": torch.tensor([1.0, -2.0, 0.5]), "bn.running_var": torch.ones(2)})


def learns(task: Task, ctx: ClientContext) -> Update:
    """Moves by the mean label of its data: a client whose update its data alone decides."""
    moved = {"w": task.params["w"] + ctx.data.labels.float().mean(), "bn.running_var": torch.full((2,), 3.0)}
    return Update(moved, len(ctx.data), {"w": torch.tensor([True, False, True])})


def _split(client: int) -> Split:
    return Split(torch.zeros(4, 1, dtype=torch.float32), torch.full((4,), client % 3))


def _context(client: int) -> ClientContext:
    return ClientContext(
        torch.nn.Linear(1, 1), _split(client), torch.Generator(), seed=client, client=client, peer=_split
    )


def _sent(kind: str, client: int, scale: float | None = None) -> Update:
    crew = Attackers((0, 1, 2), cohort_size=10, num_clients=15, classes=3, scale=scale)
    return ATTACKS[kind](learns, Task(1, RECEIVED), _context(client), crew)


@pytest.mark.parametrize(
    ("kind", "moved"), [("sign_flip", -2.0), ("scaled", 20.0), ("label_flip", 0.0), ("colluding", 0.0), ("honest", 2.0)]
)
def test_what_an_attacker_sends(kind: str, moved: float) -> None:
    update = learns(Task(1, RECEIVED), _context(2)) if kind == "honest" else _sent(kind, client=2)
    assert torch.allclose(update.params["w"], RECEIVED["w"] + moved)
    assert torch.equal(update.params["bn.running_var"], torch.full((2,), 3.0))
    assert update.mask is not None


def test_scale_is_the_strength() -> None:
    assert torch.allclose(_sent("sign_flip", 2, 3.0).params["w"], RECEIVED["w"] - 6.0)


def test_noise_is_as_long_as_said_and_the_same_again() -> None:
    update = _sent("gaussian", client=2)
    length = torch.linalg.vector_norm(update.params["w"] - RECEIVED["w"])
    assert float(length) == pytest.approx(10 * 2 * 3**0.5, rel=1e-5)
    assert torch.equal(update.params["w"], _sent("gaussian", client=2).params["w"])
    assert not torch.equal(update.params["w"], _sent("gaussian", client=1).params["w"])


def test_alie_shifts_the_mean_of_the_pooled_updates_by_z_standard_deviations() -> None:
    values = torch.tensor([0.0, 1.0, 2.0])  # of the attackers 0, 1, 2
    shift = values.mean() - 1.5 * values.std(correction=0)
    for client in (0, 1, 2):
        assert torch.allclose(_sent("alie", client, 1.5).params["w"], RECEIVED["w"] + shift, atol=1e-6)
    # n = 10, m = 2: s = 4, Phi(z) = (8 - 4) / 8, so that z = 0; m = 4 of 10: s = 2, Phi(z) = 4 / 6
    crew = Attackers(tuple(range(6)), cohort_size=10, num_clients=15)
    from clients.attacks import _hidden_shift

    assert _hidden_shift(crew) == pytest.approx(0.4307, abs=1e-4)


def test_colluding_attackers_send_the_same() -> None:
    sent = [_sent("colluding", client).params["w"] for client in (0, 1, 2)]
    assert torch.equal(sent[0], sent[1])
    assert torch.equal(sent[0], sent[2])


def test_alie_of_a_single_attacker_would_change_nothing_and_is_refused(tmp_path: Path) -> None:
    alone = tiny(tmp_path, "attack.kind=alie", "attack.share=0.17")  # of six clients
    with pytest.raises(
        UserError, match=r"^attack.kind = 'alie': .* of 6 clients is one of them; needed: at least 0.333333$"
    ):
        client_of(Federation.build(alone, quiet=True).first)
    client_of(Federation.build(tiny(tmp_path, "attack.kind=sign_flip", "attack.share=0.17"), quiet=True).first)


def test_who_attacks_is_drawn_once_from_the_seed(tmp_path: Path) -> None:
    first = attackers_of(tiny(tmp_path, "attack.share=0.5"))
    assert len(first) == 3
    assert first == attackers_of(tiny(tmp_path, "attack.share=0.5", "attack.kind=alie"))
    assert {attackers_of(tiny(tmp_path, "attack.share=0.5", f"seed={seed}")) for seed in range(5)} != {first}
    assert attackers_of(tiny(tmp_path)) == ()


@pytest.fixture(scope="module")
def inline(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Report]:
    out = tmp_path_factory.mktemp("inline")
    return {kind: run_tiny(out, *SMALL, f"attack.kind={kind}") for kind in ("alie", "gaussian")}


@pytest.mark.parametrize(("engine", "kind"), [("workers", "alie"), ("cohort", "alie"), ("cohort", "gaussian")])
def test_every_engine_gives_the_same(tmp_path: Path, inline: dict[str, Report], engine: str, kind: str) -> None:
    there = run_tiny(tmp_path, *SMALL, f"attack.kind={kind}", f"engine={engine}", "workers.count=2")
    same(there, inline[kind])


def test_a_run_says_who_attacks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    report = run_tiny(tmp_path, *FOUR, *SMALL, "attack.kind=sign_flip", "rounds=1")
    assert "attack: 3 of 6 clients attack: " in caplog.text
    assert "attack: kind = sign_flip" in (report.folder / "report.html").read_text()
    honest = run_tiny(tmp_path, *FOUR, *SMALL[:-1], "rounds=1")
    assert honest.summary["params_sha256"] != report.summary["params_sha256"]
    assert honest.summary["uplink_bytes"] == report.summary["uplink_bytes"]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["attack.kind=signflip"], "did you mean 'sign_flip'"),
        (["attack.share=0.01"], "attack.share = 0.01 of 6 clients is no client; needed: at least 0.166667"),
    ],
)
def test_an_attack_that_cannot_be_is_one_line(tmp_path: Path, keys: list[str], said: str) -> None:
    federation = Federation.build(tiny(tmp_path, *SMALL, *keys))
    with pytest.raises(UserError) as error:
        client_of(federation.first)
    assert said in str(error.value)


def test_labels_are_flipped_where_there_are_classes_only() -> None:
    with pytest.raises(UserError, match=r"attack\.kind = 'label_flip': flips labels; allowed: task = 'classification'"):
        attacked(learns, kind="label_flip", share=0.5, scale=None, seed=0, num_clients=4, cohort_size=2, classes=0)


def test_what_the_honest_client_declares_stays(tmp_path: Path) -> None:
    extra = ("client.target=clients.presets:scaffold", "strategy.target=strategies.presets:scaffold")
    client = client_of(Federation.build(tiny(tmp_path, *SMALL, *extra)).first)
    assert client.extra.up.keys() == {"control"}
    assert not hasattr(client, "plain_training")
    assert run_tiny(tmp_path, *SMALL, *extra, "rounds=1").summary["failures"]["raised"] == 0
