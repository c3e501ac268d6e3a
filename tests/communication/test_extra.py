"""Extra tensors as bytes: what arrives is what was sent, and everything else is one line."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from clients.presets import scaffold
from fl_sim.codecs import CorruptPayload, Schema, describe
from fl_sim.communication.extra import Extra, ExtraSchemas, Fixed, declared, parameters
from fl_sim.core.types import Params, UserError
from fl_sim.training.loop import Training

PARAMS = {"w": torch.randn(6, 4), "b": torch.randn(4), "bn.running_mean": torch.randn(4)}
MODEL = Schema.of(PARAMS, ["w"])
BOTH = Extra(down={"control": parameters}, up={"control": parameters, "loss": Fixed({"loss": (1,)})}).of(MODEL)
SENT: dict[str, Params] = {
    "control": {"w": torch.randn(6, 4), "b": torch.randn(4)},
    "loss": {"loss": torch.tensor([0.25])},
}
MASK = {"w": torch.arange(24).view(6, 4) % 3 == 0}


def encoded(extra: object = SENT, schemas: ExtraSchemas = BOTH, **options: object) -> dict[str, bytes]:
    return schemas.encode(schemas.up, extra, options.pop("mask", None), values="float32", seed=1, **options)  # type: ignore[arg-type]


def test_what_arrives_is_what_was_sent() -> None:
    arrived = BOTH.decode(BOTH.up, encoded(), None)
    assert all(torch.equal(arrived[name][key], value) for name, each in SENT.items() for key, value in each.items())
    assert [sorted(each) for each in arrived.values()] == [["b", "w"], ["loss"]], "statistics are no parameters"


@pytest.mark.parametrize("values", ["float32", "float16", "bfloat16"])
def test_a_type_against_the_held_model_codes_what_nobody_holds_as_the_type_alone_does(values: str) -> None:
    alone, against = (BOTH.encode(BOTH.up, SENT, None, values=each, seed=1) for each in (values, f"{values}-delta"))
    assert against == alone


def test_a_receiver_s_tensors_are_its_own_copies() -> None:
    payloads = encoded()
    BOTH.decode(BOTH.up, payloads, None)["control"]["w"].zero_()
    assert payloads == encoded()


def test_under_a_pruning_mask_pruned_weights_do_not_travel() -> None:
    dense, payloads = encoded(), encoded(mask=MASK)
    assert len(dense["control"]) - len(payloads["control"]) == 4 * 16 - 8, "16 of 24 values less, and the mask's hash"
    assert describe(payloads["control"], schema=BOTH.up["control"], held_mask=MASK).mask_mode == "held"
    arrived = BOTH.decode(BOTH.up, payloads, MASK)
    assert torch.equal(arrived["control"]["w"], SENT["control"]["w"] * MASK["w"])
    with pytest.raises(CorruptPayload, match="extra tensors 'control': refers to another mask"):
        BOTH.decode(BOTH.up, payloads, {"w": ~MASK["w"]})


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"control": SENT["control"]}, "the extra tensors 'loss' are missing; declared are control, loss"),
        ({**SENT, "more": {}}, "extra tensors 'more' are not declared; declared are control, loss"),
        ([1], "extra is a list; needed: a dict of dicts of tensors"),
        ({**SENT, "loss": torch.zeros(1)}, "extra tensors 'loss': a Tensor; needed: a dict of tensors by name"),
        ({**SENT, "loss": {}}, "extra tensors 'loss': 'loss' is missing"),
        ({**SENT, "loss": {"loss": 0.5}}, "extra tensors 'loss': 'loss' is no tensor of floating point"),
        (
            {**SENT, "loss": {"loss": torch.zeros(2)}},
            r"extra tensors 'loss': 'loss' has shape \(2,\); declared is \(1,\)",
        ),
        ({**SENT, "loss": {"loss": torch.zeros(1), "x": torch.zeros(1)}}, "extra tensors 'loss': 'x' is not declared"),
        ({**SENT, "loss": {"loss": torch.tensor([torch.nan])}}, "extra tensors 'loss': parameter 'loss' holds NaN"),
    ],
)
def test_what_does_not_fit_the_declaration_is_one_line(extra: object, said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said}"):
        encoded(extra)


def test_bytes_of_another_schema_or_under_other_names_are_refused() -> None:
    payloads = encoded()
    for wrong in ({"control": payloads["control"]}, {**payloads, "evil": b""}, {}):
        with pytest.raises(CorruptPayload, match="extra tensors"):
            BOTH.decode(BOTH.up, wrong, None)
    for damaged in (b"", payloads["control"], payloads["loss"][:-1], payloads["loss"] + b"\0"):
        with pytest.raises(CorruptPayload, match="extra tensors 'loss'"):
            BOTH.decode(BOTH.up, {**payloads, "loss": damaged}, None)


def test_a_declaration_says_which_names_it_takes() -> None:
    for name in ("Control", "a/b", "", "x" * 33):
        with pytest.raises(UserError, match="allowed: a-z, 0-9 and _, at most 32 characters"):
            Extra(up={name: parameters})
    with pytest.raises(UserError, match="17 names in one direction; allowed: at most 16"):
        Extra(down={f"n{i}": parameters for i in range(17)})


def test_a_client_declares_as_a_function_a_function_with_options_or_an_object() -> None:
    def client(task: object, ctx: object, lr: float = 0.1) -> None: ...

    assert not declared(client).up
    client.extra = Extra(up={"loss": parameters})  # type: ignore[attr-defined]
    assert declared(client).up.keys() == declared(partial(client, lr=1.0)).up.keys() == {"loss"}
    assert declared(scaffold(training=Training())).down.keys() == {"control"}
    client.extra = {"loss": 1}  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"its attribute extra is a dict; needed: fl_sim.communication.extra.Extra"):
        declared(client)


def test_both_ends_tell_another_declaration_by_its_hash() -> None:
    others = [
        Extra(),
        Extra(up={"control": parameters}),
        Extra(down={"control": parameters}),
        Extra(up={"c": parameters}),
    ]
    assert len({each.of(MODEL).hash for each in others}) == len(others)
