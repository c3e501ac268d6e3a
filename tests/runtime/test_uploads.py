"""Uploads of a cohort, chosen, corrected and encoded together: the same bits as client by client."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from federation import run_tiny, same
from torch import Tensor

from fl_sim import codecs
from fl_sim.codecs import Schema, bits
from fl_sim.communication.exchange import Exchange
from fl_sim.core.types import Task
from fl_sim.runtime.client import uploads
from fl_sim.runtime.client.uploads import NOTHING, Made
from fl_sim.runtime.grids.cohort import CohortGrid
from fl_sim.sparsity.selection import SORTED, top_of_few, top_of_rows

DIFFERENCE = "wire.uplink.content=difference"
TOPK = ["client.target=clients.presets:topk", "client.density=0.2"]
FEEDBACK = "wire.error_feedback=true"
PRUNED = ["strategy.target=strategies.presets:global_magnitude", "strategy.density=0.2"]
METHODS = {
    "int8": ["wire.uplink.values=int8", DIFFERENCE],
    "int4 with error feedback": ["wire.uplink.values=int4", DIFFERENCE, FEEDBACK],
    "sign with error feedback": ["wire.uplink.values=sign", DIFFERENCE, FEEDBACK],
    "float32": [],
    "float32-delta": ["wire.uplink.values=float32-delta"],
    "top-k, float32-delta, error feedback": [*TOPK, FEEDBACK, "wire.uplink.values=float32-delta"],
    "float16": ["wire.uplink.values=float16", DIFFERENCE],
    "top-k in tensors, which is not encoded together": ["wire.uplink.values=top10-int8", DIFFERENCE],
    "top-k": TOPK,
    "top-k with error feedback": [*TOPK, FEEDBACK],
    "top-k, int8, error feedback": [*TOPK, FEEDBACK, "wire.uplink.values=int8", DIFFERENCE],
    "a pruning mask": PRUNED,
    "a pruning mask, int8": [*PRUNED, "wire.uplink.values=int8", DIFFERENCE],
    "a pruning mask, top-k": [*PRUNED, *TOPK],
    "top-k, masks in contexts": [*TOPK, "wire.uplink.masks=smallest"],
}


@pytest.mark.parametrize("method", METHODS)
def test_uploads_made_together_have_the_bits_of_those_made_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    # Four of six clients a round: some have a residual in the second round, some do not, and later ones add to theirs.
    options = ["rounds=5", "model.name=mlp", "model.width=0.25", "cohort.size=4", "engine=cohort", *METHODS[method]]
    together = run_tiny(tmp_path / "together", *options)

    def one_by_one(exchange: Exchange, tasks: Sequence[Task], *_: object, **__: object) -> list[Made]:
        return [NOTHING] * len(tasks)

    monkeypatch.setattr(uploads, "together", one_by_one)
    same(run_tiny(tmp_path / "alone", *options), together)


@pytest.mark.parametrize("method", METHODS)
def test_uploads_decoded_together_have_the_bits_of_those_decoded_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    options = ["rounds=3", "model.name=mlp", "model.width=0.25", "cohort.size=4", "engine=cohort", *METHODS[method]]
    together = run_tiny(tmp_path / "together", *options)
    monkeypatch.setattr(CohortGrid, "ready", lambda grid: 0)
    same(run_tiny(tmp_path / "alone", *options), together)


def test_what_can_be_made_together_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Made] = []
    original = uploads.together

    def watched(*given: object, **named: object) -> list[Made]:
        made.extend(original(*given, **named))  # type: ignore[arg-type]
        return made[-3:]

    monkeypatch.setattr(uploads, "together", watched)
    options = ["rounds=1", "model.name=mlp", "cohort.size=3", "engine=cohort"]
    run_tiny(tmp_path / "int8", *options, *METHODS["int8"])
    run_tiny(tmp_path / "topk", *options, *METHODS["top-k with error feedback"])
    assert all(one.payload is not None for one in made)
    assert [one.mask is not None and one.left_out is not None for one in made] == [False] * 3 + [True] * 3


def _model() -> Schema:
    params = {name: torch.zeros(shape) for name, shape in {"w": (40, 130), "v": (7, 9), "b": (40,)}.items()}
    return Schema.of(params, ["w", "v"])


TOGETHER = ["float32", "float32-zstd", "float32-delta", "float16", "bfloat16", "int8", "int4", "int2", "sign"]


@pytest.mark.parametrize("values", TOGETHER)
def test_payloads_of_rows_are_those_of_each_row(values: str) -> None:
    schema = _model()
    rows = torch.randn(5, schema.size, generator=torch.Generator().manual_seed(0))
    rows[1] = 0.0
    rows[2] *= 1e-30
    seeds = [0, 1, 2**32, 2**63 - 1, 2**80]
    base = schema.view(rows[4] + 1e-3) if codecs.is_relative(values) else None
    made = codecs.encode_all(rows, schema=schema, values=values, seeds=seeds, base=base)
    alone = [
        codecs.encode(schema.view(row), None, schema=schema, values=values, seed=seed, base=base)
        for row, seed in zip(rows, seeds, strict=True)
    ]
    assert made == alone


def _masks(layout: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """Independent bits, six dead rows, six full rows, a dead and a full tensor, clusters, everything, nothing."""
    size = sum(each[1] for each in layout)
    drawn = np.random.default_rng(1).random((10, size)) < np.linspace(0.05, 0.6, 10)[:, None]
    rows, elements, _ = layout[0]
    drawn[1] = np.random.default_rng(2).random(size) < 0.3
    drawn[1, : 6 * elements // rows] = False
    drawn[2] = ~drawn[1]
    drawn[3, -layout[-1][1] :] = False
    drawn[4, -layout[-1][1] :] = True
    drawn[5] = np.arange(size) // 50 % 10 == 0
    drawn[6], drawn[7] = True, False
    return drawn


@pytest.mark.parametrize("values", ["float32", "int8", "sign"])
def test_payloads_of_rows_under_masks_are_those_of_each_row(values: str, monkeypatch: pytest.MonkeyPatch) -> None:
    together: list[int] = []
    encode_all = bits.encode_all

    def counted(parts: Sequence[np.ndarray], ones: np.ndarray) -> list[bytes]:
        together.append(len(ones))
        return encode_all(parts, ones)

    monkeypatch.setattr(bits, "encode_all", counted)
    schema = _model()
    rows = torch.randn(10, schema.size, generator=torch.Generator().manual_seed(0))
    masks = torch.from_numpy(_masks(schema.mask_layout))
    made = codecs.encode_all(rows, schema=schema, values=values, seeds=range(10), masks=masks)
    assert made == [
        codecs.encode(schema.view(row), schema.view_mask(mask), schema=schema, values=values, seed=seed)
        for seed, (row, mask) in enumerate(zip(rows, masks, strict=True))
    ]
    modes = {codecs.describe(data, schema=schema).mask_mode for data in made or ()}
    assert {"whole", "rows", "gaps"} <= modes
    assert together == [3]


@pytest.mark.parametrize("values", ["float32-delta", "bfloat16-delta", "top10-int8"])
def test_other_types_are_encoded_one_by_one(values: str) -> None:
    schema = _model()
    assert codecs.encode_all(torch.zeros(2, schema.size), schema=schema, values=values, seeds=[0, 1]) is None


def test_a_value_beyond_the_range_of_its_type_is_left_to_its_client() -> None:
    schema = _model()
    rows = torch.zeros(3, schema.size)
    rows[1, 0] = 1e6
    assert codecs.encode_all(rows, schema=schema, values="float16", seeds=[0, 1, 2]) is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_left_to_its_client(value: float) -> None:
    schema = _model()
    rows = torch.zeros(3, schema.size)
    rows[1, -1] = value
    assert codecs.encode_all(rows, schema=schema, values="int8", seeds=[0, 1, 2]) is None


def _scores() -> Tensor:
    drawn = np.random.default_rng(0).integers(0, 4, (6, 50)).astype(np.float32)  # many ties
    drawn[1] = 0.0
    drawn[2, ::2] = -0.0
    drawn[3, 7] = np.inf
    return torch.from_numpy(drawn)


@pytest.mark.parametrize("k", [1, 10, 49, 50])
def test_the_highest_of_rows_are_those_of_each_row(k: int) -> None:
    scores = _scores()
    chosen = top_of_rows(scores, k)
    assert chosen is not None
    assert torch.equal(chosen, torch.stack([top_of_few([row], k) for row in scores]))


def test_rows_that_one_by_one_handles_are_left_to_it() -> None:
    scores = _scores()
    scores[4, 4] = math.nan
    assert top_of_rows(scores, 3) is None
    assert top_of_rows(_scores(), 0) is None
    assert top_of_rows(-_scores(), 3) is None
    assert top_of_rows(torch.zeros(2, SORTED + 1), 3) is None
