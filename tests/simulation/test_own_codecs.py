"""Codecs of the user's own in whole runs: booked by their length, equal on every engine, resumed, replayed, refused in one line."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from federation import same
from interruption import KillAfter, Killed
from softmax_federation import SIZES, experiment

from fl_sim import ClientContext, Report, Task, Update, UserError, codecs, run
from fl_sim.codecs import CorruptPayload, Own, Schema
from fl_sim.communication.error_feedback import ErrorFeedback
from fl_sim.communication.exchange import Exchange, OwnCoding
from fl_sim.communication.payload_log import read_round, recorded_files
from fl_sim.communication.sparse_broadcast import SparseBroadcast, received
from fl_sim.config.codecs import GROUP
from fl_sim.core.types import Params
from fl_sim.simulation import resume
from fl_sim.simulation.replaying import asked, replay_run
from strategies.published_model import SparseBroadcastServer

HERE = Path(__file__).stem
DIFFERENCE = ("wire.uplink.content=difference", "wire.error_feedback=true")
POWER = ("wire.codec.uplink=powersgd", "wire.codec.uplink.rank=1", *DIFFERENCE)
DRAWS = (f"wire.codec.uplink={HERE}:Draws", *DIFFERENCE)
VALUES = 9
"""Prunable values of the model."""


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Report]:
    return cache(lambda *options: run(experiment(tmp_path_factory.mktemp("run"), *options), quiet=True))


class Draws:
    """Rounds at random to steps of 1/4096, keeps how often a client has sent, and sends that with other things beside."""

    def __init__(self, *, spare: int = 3) -> None:
        self.spare = spare

    def encode(self, tensors: Params, state: Params, rng: torch.Generator) -> bytes:
        state["calls"] = state.get("calls", torch.zeros((), dtype=torch.int64)) + 1
        steps = torch.cat([value.reshape(-1) for value in tensors.values()]).mul_(4096)
        steps = torch.floor(steps + torch.rand(len(steps), generator=rng)).clamp_(-(2**15), 2**15 - 1)
        sent = steps.short().numpy().tobytes()
        next(iter(tensors.values())).zero_()  # its own copies
        return bytes([int(state["calls"])]) + sent + bytes(self.spare * int(state["calls"]))

    def decode(self, data: bytes, schema: Schema) -> Params:
        torch.manual_seed(0)  # a careless way to share a seed: other draws of the process stay as they were
        if len(data) != 1 + 2 * schema.size + self.spare * data[0]:
            raise CorruptPayload("another length")
        values = torch.frombuffer(bytearray(data[1 : 1 + 2 * schema.size]), dtype=torch.int16).float() / 4096
        return dict(schema.view(values))


class Half(Draws):
    """Sends zeros for half of the tensor, and keeps nothing."""

    def encode(self, tensors: Params, state: Params, rng: torch.Generator) -> bytes:
        return super().encode({name: value[:1] for name, value in tensors.items()}, {}, rng)

    def decode(self, data: bytes, schema: Schema) -> Params:
        part = Schema(schema.names, tuple(torch.Size((1, *s[1:])) for s in schema.shapes), schema.dtypes, schema.kinds)
        found = super().decode(data, part)
        return {name: torch.cat([v, torch.zeros(schema.shapes[0][0] - 1, v.shape[1])]) for name, v in found.items()}


def test_a_codec_s_bytes_are_counted_by_their_length_in_a_section_of_their_own(made: Callable[..., Report]) -> None:
    report, plain = made(*DRAWS, "wire.record_payloads=1"), made("wire.record_payloads=1")
    booked = report.ledger.total(by=("round", "client"), where={"section": "codec"})
    sent: dict[int, int] = {}
    for (_, client), size in sorted(booked.items()):
        sent[client] = sent.get(client, 0) + 1
        assert size == 1 + 2 * VALUES + 3 * sent[client], "the state says how often a client has sent"
    assert max(sent.values()) > 1
    payloads = [m for _, path in recorded_files(report.folder / "payloads") for m in read_round(path)]
    up = sum(len(message.payload) for message in payloads if message.direction == "up")
    assert up == report.ledger.sent["up"] == report.results.uplink_bytes
    assert report.ledger.total(where={"direction": "up", "section": "values"}) == {(): 0}
    assert report.ledger.total(column="dense_bytes") == plain.ledger.total(column="dense_bytes"), "the same baseline"
    assert report.results.density.uplink_mean == 1
    assert sum(report.flows.parts.values()) == report.results.total_bytes
    assert Report.load(report.folder).ledger.to_table().equals(report.ledger.to_table())
    assert "wire.codec.uplink" in report.origin.code  # type: ignore[union-attr]


class Careless:
    """Draws from the generators that all code of a process shares, and answers for a tensor that nobody asked for."""

    def encode(self, tensors: Params, state: Params, rng: torch.Generator) -> bytes:
        return torch.rand(4).numpy().tobytes()

    def decode(self, data: bytes, schema: Schema) -> Params:
        return {**schema.view(torch.frombuffer(bytearray(data), dtype=torch.float32)), "nobody's": torch.ones(1)}


def test_global_generators_are_the_codec_s_own_for_each_call_and_tensors_those_of_the_schema() -> None:
    schema = Schema.of({"weight": torch.ones(2, 2)}, ["weight"])
    own, values = Own(Careless(), schema, "careless"), torch.ones(4).numpy()
    torch.manual_seed(1)
    first, drawn = own.encode(values, 5), torch.rand(1)
    assert (own.encode(values, 5), own.encode(values, 6) == first) == (first, False)
    assert torch.equal(torch.manual_seed(1) and torch.rand(1), drawn), "draws of the process stay as they were"
    with pytest.raises(CorruptPayload, match='careless: decode returned "nobody\'s", which is not in the schema'):
        own.decode(memoryview(first), 4)


def test_what_a_codec_leaves_out_is_the_residual() -> None:
    params = {"weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "bias": torch.zeros(2)}
    schema = Schema.of(params, ["weight"])
    exchange = Exchange(schema, OwnCoding(content="difference", codec=Half(), name="half"), error_feedback=True)
    task, update = Task(1, params), Update({**params, "weight": params["weight"] + 0.5}, 1)
    sent = exchange.encode_up(update, task, seed=0)
    arrived, _ = exchange.decode_up(sent, task)
    assert torch.equal(arrived["weight"] - params["weight"], torch.tensor([[0.5, 0.5], [0.0, 0.0]]))
    residual = ErrorFeedback(exchange, task).left_out(update, sent)
    assert residual.tolist() == [0.0, 0.0, 0.5, 0.5]
    with_it = ErrorFeedback(exchange, task, residual).encoded(Update(params, 1))
    assert torch.equal(with_it.params["weight"] - params["weight"], torch.tensor([[0.0, 0.0], [0.5, 0.5]]))


ENGINES = {
    "one worker": ("engine=workers", "workers.count=1"),
    "three workers": ("engine=workers", "workers.count=3"),
    "ray": ("engine=ray", "ray.workers=2"),
}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("options", [POWER, DRAWS], ids=["powersgd", "own"])
def test_engines_agree(
    engine: str, options: tuple[str, ...], made: Callable[..., Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")  # for the actors of Ray
    same(made(*options), run(experiment(tmp_path, *options, *ENGINES[engine]), quiet=True))


@pytest.mark.parametrize(
    ("after", "replies"),
    [(1, 2), *(pytest.param(*kill, marks=pytest.mark.slow) for kill in [(1, 0), (2, 2), (3, 1)])],
)
def test_a_killed_run_resumes_bit_for_bit(
    after: int, replies: int, made: Callable[..., Report], tmp_path: Path
) -> None:
    """What a codec keeps is in the checkpoint; a round that was undone leaves nothing of it."""
    options = DRAWS if after == 1 else (*DRAWS, "rounds=6")
    with pytest.raises(Killed):
        run(experiment(tmp_path, *options), KillAfter(after, replies))
    same(made(*options), resume(experiment(tmp_path, *options), quiet=True))


def test_both_directions_and_every_name(
    made: Callable[..., Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = made(
        "wire.codec.downlink=drive", "wire.codec.uplink=signsgd", *DIFFERENCE, "wire.downlink.content=difference"
    )
    booked = report.ledger.total(by=("direction", "section"))
    assert booked["down", "codec"] == 12 * (8 + 4 + 2)
    assert booked["up", "codec"] == 12 * (4 + 2)
    assert report.summary["failures"] == {"raised": 0, "rejected": 0, "late": 0, "lost": 0}
    folder = tmp_path / "theirs-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(f"[{GROUP}]\ndraws = {HERE}:Draws\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    named = experiment(tmp_path, "wire.codec.uplink=draws").wire
    assert named == experiment(tmp_path, f"wire.codec.uplink={HERE}:Draws").wire
    with pytest.raises(UserError, match=r"codec 'drawz': no such codec; did you mean 'draws'\?"):
        experiment(tmp_path, "wire.codec.uplink=drawz")


def test_what_a_codec_keeps_of_the_server_goes_on_with_each_round_s_task(made: Callable[..., Report]) -> None:
    """Evaluations and questions find it and leave it as it is."""
    report = made(f"wire.codec.downlink={HERE}:Draws", "evaluate.clients=2")
    booked = report.ledger.total(by=("round", "client"), where={"section": "codec", "phase": "train"})
    assert {(number, size) for (number, _), size in booked.items()} == {
        (number, 1 + 2 * VALUES + 3 * number) for number in range(1, 5)
    }


def test_beside_a_broadcast_a_codec_codes_changes_and_what_it_loses_is_offered_again() -> None:
    """`Half` sends the first of two rows; a model that stays where it is gets no nearer, one that moves in it does."""
    start = {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}
    schema = Schema.of(start, ["weight"])
    exchange = Exchange(schema, downlink=OwnCoding(codec=Half(), name="half"))
    server = SparseBroadcastServer(SparseBroadcast(density=1.0), exchange, 0, schema.flat(start))
    params = {"weight": torch.tensor([[0.5, 0.25, 1.0], [4.0, 5.0, 6.0]]), "bias": torch.ones(2)}
    server.publish(1, params, None)
    assert torch.equal(server.params["weight"], torch.tensor([[0.5, 0.25, 1.0], [0.0, 0.0, 0.0]]))
    params["weight"][0] += 1.0
    server.publish(2, params, None)
    assert torch.equal(server.params["weight"][0], params["weight"][0]), "the change against what was published"
    client = schema.flat(start)
    sent = server.encoded(0, None)
    assert sent.header is not None
    model, _ = received(sent.data, sent.header, client, exchange, None)
    assert torch.equal(model, schema.flat(server.params)), "clients decode the same bytes"


def test_error_feedback_of_the_server_ends_where_no_codec_would(made: Callable[..., Report]) -> None:
    """Rounding to 1/4096 in each round; what was rounded away is in the next change, so that it does not add up."""
    mlp = ("model.name=mlp", "model.width=0.1")
    coded, plain = made(*mlp, f"wire.codec.downlink={HERE}:Draws", "wire.broadcast.density=1.0"), made(*mlp)
    assert coded.summary["params_sha256"] != plain.summary["params_sha256"]
    assert all(torch.allclose(coded.params[n], plain.params[n], atol=4 / 4096) for n in plain.params)
    values = sum(value.numel() for value in plain.params.values() if value.dim() > 1)
    down = coded.ledger.total(by=("round",), where={"direction": "down", "section": "codec"})
    assert (1,) not in down, "the seeded model is not sent"
    assert down[2,] == 3 * (1 + 2 * values + 3)


def test_a_majority_vote_of_codes_is_that_of_whole_changes(made: Callable[..., Report]) -> None:
    vote = ("strategy=strategies.presets:signsgd", "strategy.lr=0.05", "rounds=2")
    coded, whole = made(*vote, "wire.codec.uplink=signsgd", DIFFERENCE[0]), made(*vote)
    assert coded.summary["params_sha256"] == whole.summary["params_sha256"]
    votes = ("wire.broadcast.density=1.0", "wire.broadcast.values=sign")
    both = made(*vote, "wire.codec.uplink=signsgd", DIFFERENCE[0], *votes)
    assert torch.allclose(both.params["weight"], whole.params["weight"], atol=1e-6), "of three voters there is no tie"


def test_a_replay_encodes_with_a_codec_and_measures_a_run_that_had_one(made: Callable[..., Report]) -> None:
    plain = made("wire.record_payloads=1")
    found = replay_run(plain, asked(plain, [*POWER[:2], DIFFERENCE[0]]))
    assert found.replayed["up", "codec"] == 12 * 4 * (3 + 3)
    assert found.replayed["up", "values"] == 0
    assert found.replayed["down", "values"] == found.measured["down", "values"]
    grows = replay_run(plain, asked(plain, [DRAWS[0], DIFFERENCE[0]]))
    run_with_it = made(*DRAWS, "wire.record_payloads=1")
    assert grows.replayed["up", "codec"] == run_with_it.ledger.total(where={"section": "codec"})[()]
    again = replay_run(run_with_it, asked(run_with_it, ["wire.downlink.values=int8"]))
    assert again.replayed["up", "codec"] == again.measured["up", "codec"]
    assert again.replayed["down", "values"] != again.measured["down", "values"]
    with pytest.raises(UserError, match="the uplink moved own, and what that rounded away was not recorded"):
        replay_run(run_with_it, asked(run_with_it, ["wire.codec.uplink=signsgd"]))


# -- refused -----------------------------------------------------------------------------------------------------------


class NoDecode:
    def encode(self, tensors: Params, state: Params, rng: torch.Generator) -> bytes:
        return b""


class TwoArguments(NoDecode):
    def decode(self, data: bytes) -> Params:
        return {}


class Text(Draws):
    def encode(self, tensors: Params, state: Params, rng: torch.Generator) -> bytes:
        return "0" * 3  # type: ignore[return-value]


class Raises(Draws):
    def encode(self, tensors: Params, state: Params, rng: torch.Generator) -> bytes:
        return tensors["nobody"].numpy().tobytes()


class CannotRead(Draws):
    def decode(self, data: bytes, schema: Schema) -> Params:
        return {name: torch.ones(1)[3] for name in schema.names}


class OtherShape(Draws):
    def decode(self, data: bytes, schema: Schema) -> Params:
        return {name: value.T[:2] for name, value in super().decode(data, schema).items()}


class Infinite(Draws):
    def decode(self, data: bytes, schema: Schema) -> Params:
        return {name: value / 0 for name, value in super().decode(data, schema).items()}


class Lists(Draws):
    def encode(self, tensors: Params, state: Params, rng: torch.Generator) -> bytes:
        data = super().encode(tensors, {}, rng)
        state["seen"] = [1.0]  # type: ignore[assignment]
        return data


def masked_client(task: Task, ctx: ClientContext) -> Update:
    mask = {name: value > 0 for name, value in task.params.items() if name == "weight"}
    return Update(dict(task.params), ctx.num_examples, mask)


UP = "wire.codec.uplink"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((f"{UP}=nowhere:Codec",), f"{UP}: 'nowhere:Codec': No module named 'nowhere'"),
        ((f"{UP}={HERE}:NoDecode",), "a NoDecode without decode(data, schema); needed: a class with encode and decode"),
        ((f"{UP}={HERE}:TwoArguments",), "it is called with (data, schema) and takes (data: 'bytes')"),
        ((f"{UP}={HERE}:masked_client",), "a function without encode(tensors, state, rng)"),
        ((f"{UP}=powersgd", f"{UP}.rang=2"), "has no option 'rang'; did you mean 'rank'?"),
        ((f"{UP}=powersgd", f"{UP}.rank=0"), "rank = 0: must be at least 1"),
        ((f"{UP}={HERE}:Text",), "encode returned str; needed: bytes"),
        ((f"{UP}={HERE}:Raises",), "encode raised KeyError: 'nobody' (test_own_codecs.py, line"),
        ((f"{UP}={HERE}:CannotRead",), "decode raised IndexError: index 3 is out of bounds"),
        ((f"{UP}={HERE}:OtherShape",), "decode returned torch.float32 of shape (2, 3) for 'weight'; needed: a float"),
        ((f"{UP}={HERE}:Infinite",), "a value is NaN or infinite"),
        (
            (f"{UP}={HERE}:Lists",),
            "the codec's state['seen'] is list [1.0]; allowed: tensors, NumPy arrays and numbers",
        ),
        ((f"wire.codec.downlink={HERE}:Lists",), "the codec's state['seen'] is list [1.0]"),
        ((f"{UP}=signsgd", "wire.uplink.values=int8"), "uplink.values = 'int8': not beside codec.uplink"),
        ((f"{UP}=signsgd", "wire.uplink.masks=smallest"), "uplink.masks = 'smallest': not beside codec.uplink"),
        (
            ("wire.codec.downlink=signsgd", "wire.broadcast.density=0.5"),
            "broadcast.density = 0.5: beside codec.downlink",
        ),
        (
            ("wire.codec.downlink=signsgd", "wire.broadcast={density=1.0, values='int8'}"),
            "broadcast.values = 'int8': beside codec.downlink",
        ),
        (("wire.codec.downlink=signsgd", "wire.uplink.values=float32-delta"), "may round; remove one"),
        (
            (f"{UP}=signsgd", "strategy=strategies.presets:global_magnitude"),
            "codes whole tensors, and this strategy prunes; allowed: strategies without a mask rule",
        ),
        (
            (f"{UP}=signsgd", "client=clients.presets:topk"),
            "codes whole tensors, and client = 'clients.presets:topk' chooses what it sends",
        ),
        ((f"{UP}=signsgd", "wire.codec.sideways=signsgd"), "wire.codec.sideways"),
    ],
)
def test_what_cannot_work_is_one_line_before_round_1(options: tuple[str, ...], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(said)) as raised:
        run(experiment(tmp_path, *options), quiet=True)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.rglob("rounds.jsonl"))


def test_a_client_that_masks_nevertheless_is_said(tmp_path: Path) -> None:
    options = (f"{UP}=signsgd", f"client={HERE}:masked_client", "rounds=1")
    with pytest.raises(RuntimeError, match="SignSGD codes whole tensors of float32; not under"):
        run(experiment(tmp_path, *options), quiet=True)


def test_parameters_through_a_codec_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        run(experiment(tmp_path, f"{UP}=signsgd", "rounds=1"), quiet=True)
    assert "codes the parameters themselves; usual: wire.uplink.content = 'difference'" in caplog.text


class Remembers(Draws):
    messages = 0

    def encode(self, tensors: Params, state: Params, rng: torch.Generator) -> bytes:
        self.messages += 1
        return super().encode(tensors, state, rng)


def test_a_codec_that_keeps_something_on_itself_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        run(experiment(tmp_path, f"{UP}={HERE}:Remembers", DIFFERENCE[0], "rounds=1"), quiet=True)
    assert sum("is another one after each call of a codec" in record.message for record in caplog.records) == 1


class Short(Draws):
    def encode(self, tensors: Params, state: Params, rng: torch.Generator) -> bytes:
        return bytes(5)


def test_malformed_bytes_are_refused_and_booked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One client of another make: its payloads are whole, what its codec wrote is not."""
    honest = Exchange.encode_up

    def encode_up(self: Exchange, update: Update, task: Task, *, seed: int, state: Params | None = None) -> bytes:
        other = replace(self, uplink=replace(self.uplink, codec=Short()))  # type: ignore[call-arg]
        return honest(other if update.num_examples == SIZES[0] else self, update, task, seed=seed, state=state)

    monkeypatch.setattr(Exchange, "encode_up", encode_up)
    with caplog.at_level(logging.WARNING):
        report = run(experiment(tmp_path, DRAWS[0], DIFFERENCE[0], "faults.max_share=1.0"), quiet=True)
    refused = report.summary["failures"]["rejected"]
    assert refused == report.ledger.messages(phase="train", clients=[0])["up"] > 0
    assert f"rejected update: {HERE}:Draws: decode raised CorruptPayload: another length" in caplog.text
    assert report.ledger.total(where={"status": "rejected", "section": "codec"}) == {(): 5 * refused}


def test_a_receiver_without_the_codec_refuses_its_payload() -> None:
    schema = Schema.of({"weight": torch.ones(2, 2)}, ["weight"])
    params = schema.view(torch.ones(4))
    data = codecs.encode(params, None, schema=schema, values=Own(Draws(), schema, "mine"))
    assert torch.equal(params.flat, torch.ones(4)), "a codec that works in place has copies"
    with pytest.raises(CorruptPayload, match="a codec of the user's own that this receiver does not have"):
        codecs.decode(data, schema=schema)
    assert codecs.describe(data, schema=schema).sections["codec"] == 1 + 2 * 4 + 3
