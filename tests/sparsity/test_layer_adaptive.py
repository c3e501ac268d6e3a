"""Value types by layer under a byte budget: never over it, never worse than one type for all, best of all choices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import pytest
import torch
from federation import run_tiny
from torch import Tensor

from fl_sim import Report, codecs
from fl_sim.codecs import VALUES, Schema
from fl_sim.core.types import FlatParams, Mask, Params, UserError
from fl_sim.models import build, prunable_names
from fl_sim.sparsity import apply_mask, global_topk, magnitude, topk_mask
from fl_sim.sparsity.bit_allocation import TYPES, LayerAdaptive
from fl_sim.sparsity.curves import gaussian_calibration, squared_error
from fl_sim.training import load, snapshot

IMAGES = gaussian_calibration((1, 8, 8), 8)
RESERVED = 12
"""Bytes of a budget that may stay unused: padding, and a byte less in the length of a tensor."""
OFFERED = ("float32-zstd", "int8", "int2", "sign")


def given(*, masked: bool) -> tuple[FlatParams, Mask | None, Schema]:
    model = build("cnn_bn", in_channels=1, image_size=8, width=0.5)
    params = snapshot(model)
    names = prunable_names(model)
    if not masked:
        return params, None, Schema.of(params, names)
    scores = magnitude({name: params[name] for name in names})
    mask = topk_mask(scores, global_topk(scores, 0.4))
    return FlatParams.pack(apply_mask(params, mask)), mask, Schema.of(params, names)


def logits(params: Params) -> Tensor:
    model = load(build("cnn_bn", in_channels=1, image_size=8, width=0.5), params).eval()
    with torch.no_grad():
        return model(IMAGES)


def sent(params: Params, mask: Mask | None, schema: Schema, types: Sequence[str]) -> tuple[int, Params]:
    data = codecs.encode(params, mask, schema=schema, held_mask=mask, values=types, seed=5)
    return len(data), codecs.decode(data, schema=schema, held_mask=mask)[0]


@pytest.mark.parametrize("masked", [False, True])
def test_the_choice_is_the_best_of_all_within_the_budget(masked: bool) -> None:
    params, mask, schema = given(masked=masked)
    names, reference = schema.prunable, logits(params)
    alone: dict[tuple[int, str], float] = {}
    for i, kind in product(range(len(names)), OFFERED):
        _, decoded = sent(params, mask, schema, [kind if j == i else "float32" for j in range(len(names))])
        alone[i, kind] = float(squared_error(logits(decoded), reference).mean())
    sizes = {types: sent(params, mask, schema, types)[0] for types in product(OFFERED, repeat=len(names))}
    total = {types: sum(alone[i, kind] for i, kind in enumerate(types)) for types in sizes}
    least, most = min(sizes.values()) + RESERVED, max(sizes.values()) + RESERVED
    for budget in (least, (3 * least + most) // 4, (least + most) // 2, most):
        model = build("cnn_bn", in_channels=1, image_size=8, width=0.5)
        chosen = LayerAdaptive(budget, OFFERED)(model, params, mask, IMAGES, schema=schema, seed=5)
        assert sizes[chosen] <= budget
        best = min(value for types, value in total.items() if sizes[types] <= budget - RESERVED)
        assert total[chosen] <= best * (1 + 1e-6) + 1e-12


def test_every_type_is_offered_that_needs_no_held_model_and_holds_every_weight() -> None:
    refused = {"float16", "float32-delta", "float16-delta", "bfloat16-delta"}
    assert set(TYPES) == VALUES.keys() - refused
    params, mask, schema = given(masked=False)
    used = set()
    for budget in (1_000, 2_000, 4_000, 12_000, 40_000, 10**6):
        model = build("cnn_bn", in_channels=1, image_size=8, width=0.5)
        types = LayerAdaptive(budget)(model, params, mask, IMAGES, schema=schema, seed=5)
        assert sent(params, mask, schema, types)[0] <= budget
        used |= set(types)
    assert len(used) >= 6, used
    assert "sign" in used or "top1-ternary" in used


def test_a_budget_that_nothing_fits_is_refused_with_the_least_that_does() -> None:
    params, mask, schema = given(masked=False)
    model = build("cnn_bn", in_channels=1, image_size=8, width=0.5)
    with pytest.raises(UserError, match="budget = 100 bytes: the smallest payload") as caught:
        LayerAdaptive(100)(model, params, mask, IMAGES, schema=schema)
    least = int(str(caught.value).split()[-1])
    LayerAdaptive(least)(model, params, mask, IMAGES, schema=schema)


def test_the_model_ends_with_the_parameters_it_was_given() -> None:
    params, _, schema = given(masked=False)
    model = build("cnn_bn", in_channels=1, image_size=8, width=0.5, seed=9)
    LayerAdaptive(10**6)(model, params, None, IMAGES, schema=schema)
    assert torch.equal(snapshot(model).flat, params.flat)


def test_wrong_types_are_refused() -> None:
    with pytest.raises(UserError, match="unknown int9"):
        LayerAdaptive(100, ("int9",))
    with pytest.raises(UserError, match="none given"):
        LayerAdaptive(100, ())


ADAPTIVE = ["strategy.target=strategies.presets:layer_adaptive", "data.noise=8"]


def test_every_downlink_of_a_federation_fits(tmp_path: Path, finished: Callable[..., Report]) -> None:
    report = run_tiny(tmp_path, *ADAPTIVE, "strategy.kilobytes=20")
    dense = finished()
    downs = [
        sum(row["payload_bytes"] for row in message.values())
        for message in report.ledger.by_message(phase="train")
        if message["header"]["direction"] == "down"
    ]
    assert len(downs) == 6
    assert max(downs) <= 20_000 < dense.summary["downlink_bytes"] / 6
    assert report.summary["uplink_bytes"] == dense.summary["uplink_bytes"]
    assert report.summary["failures"]["rejected"] == 0


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([*ADAPTIVE, "strategy.kilobytes=1"], "smallest payload"),
        ([ADAPTIVE[0], "strategy.kilobytes=20"], "needs images"),
        ([*ADAPTIVE, "strategy.kilobytes=20", "wire.downlink.content=difference"], "sends 'parameters'"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        run_tiny(tmp_path, *overrides)


def test_a_model_that_computes_in_bfloat16_is_measured() -> None:
    model = torch.nn.Linear(64, 4).bfloat16()
    params = FlatParams.pack({"weight": model.weight.detach().float(), "bias": model.bias.detach().float()})
    schema = Schema.of(params, ["weight"])
    images = torch.randn(8, 64).bfloat16()
    assert LayerAdaptive(300, ("float32", "int4"))(model, params, None, images, schema=schema) == ("int4",)
    assert LayerAdaptive(2000, ("float32", "int4"))(model, params, None, images, schema=schema) == ("float32",)
