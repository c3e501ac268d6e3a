"""Data sources and partitions of a user's own: taken as they are meant, or refused in one line before a run."""

from __future__ import annotations

import itertools
import logging
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fl_sim import Experiment, run
from fl_sim.core.types import UserError
from fl_sim.data import CropFlip, Data, Split, load, partition
from fl_sim.data.remarks import remarks
from fl_sim.simulation.client_side import make_client_app
from fl_sim.simulation.federation import Federation

RNG = np.random.default_rng(0)
IMAGES, LABELS = RNG.integers(0, 256, (60, 1, 8, 8), dtype=np.uint8), np.arange(60) % 3
HALF = torch.tensor([0.5])
Maker = Callable[..., object]
Publish = Callable[[Maker], str]


@pytest.fixture
def publish(monkeypatch: pytest.MonkeyPatch) -> Publish:
    """Gives a function an import path."""
    numbers = itertools.count()

    def under_a_name(function: Maker) -> str:
        module = types.ModuleType(f"mine_{next(numbers)}")
        module.part = function
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return f"{module.__name__}:part"

    return under_a_name


def refused(act: Callable[[], object], *words: str) -> None:
    with pytest.raises(UserError) as caught:
        act()
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def made(**changes: object) -> Data:
    """`Data.of` of these arrays, some of them changed."""
    given = {"inputs": IMAGES, "targets": LABELS, "test_inputs": IMAGES[:12], "test_targets": LABELS[:12]}
    return Data.of(**{**given, "num_classes": 3, **changes})


# -- Data.of -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"targets": LABELS.tolist(), "test_targets": LABELS[:12].tolist()},
        {"targets": torch.from_numpy(LABELS), "inputs": torch.from_numpy(IMAGES)},
        {"targets": LABELS.astype(np.int32), "test_targets": LABELS[:12].astype(np.uint8)},
        {"targets": LABELS.astype(">i2"), "num_classes": np.int64(3)},
        {"targets": LABELS.astype(">i4"), "test_targets": LABELS[:12].astype(">u2")},
        {"test_inputs": np.ascontiguousarray(IMAGES[:12, :, :, ::-1])[:, :, :, ::-1]},
    ],
    ids=["lists", "tensors", "int32 and uint8", "big-endian", "big-endian too", "a mirrored view"],
)
def test_arrays_lists_and_tensors_make_the_same_data(changes: Mapping[str, object]) -> None:
    plain, data = made(), made(**changes)
    for part in ("train", "validation", "test"):
        one, other = getattr(plain, part), getattr(data, part)
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
        assert other.labels.dtype == torch.int64
    assert type(data.num_classes) is int


NUMBERS = RNG.normal(size=(60, 4)).astype(np.float32)


@pytest.mark.parametrize(
    ("targets", "inputs"),
    [
        (torch.from_numpy(LABELS > 0), torch.from_numpy(NUMBERS)),
        ((LABELS > 0).tolist(), NUMBERS.astype(">f4")),
        ((LABELS > 0).astype(">i8"), NUMBERS),
    ],
    ids=["tensors", "big-endian inputs", "big-endian targets"],
)
def test_truth_values_are_classes_in_whatever_they_come_and_a_share_tests(targets: object, inputs: object) -> None:
    plain, data = Data.of(NUMBERS, LABELS > 0), Data.of(inputs, targets)
    for part in ("train", "validation", "test"):
        one, other = getattr(plain, part), getattr(data, part)
        assert torch.equal(one.stored, other.stored)
        assert torch.equal(one.labels, other.labels)
        assert other.labels.dtype == torch.int64


def test_bfloat16_is_taken_as_the_float32_that_it_is() -> None:
    rough = torch.from_numpy(NUMBERS).bfloat16()
    assert torch.equal(Data.of(rough, LABELS).train.stored, Data.of(rough.float(), LABELS).train.stored)


def test_integers_below_0_are_no_classes_and_the_message_says_what_numbers_are() -> None:
    refused(lambda: Data.of(NUMBERS, LABELS - 1), "found -1 to 1", "numbers to predict are floating-point")


REFUSED: Mapping[str, tuple[Mapping[str, object], str]] = {
    "fractions": ({"inputs": IMAGES / 255}, "inputs are float32 (1, 8, 8) each, test_inputs uint8 (1, 8, 8); needed: one"),
    "missing": ({"inputs": np.where(IMAGES > 0, IMAGES, np.nan)}, "inputs hold NaN or infinity, first in sample"),
    "int64 images": ({"inputs": IMAGES.astype(int)}, "inputs are int64 (1, 8, 8) each"),
    "int64 images everywhere": (
        {"inputs": IMAGES.astype(int), "test_inputs": IMAGES[:12].astype(int)},
        "inputs are tokens (integers) and vocabulary is not given; needed: the number of tokens; images are uint8",
    ),
    "features": ({"inputs": IMAGES[:, 0, 0]}, "inputs are uint8 (60, 8); needed: uint8 (N, channels"),
    "no pixels": ({"inputs": IMAGES[:, :, :0]}, "(60, 1, 0, 8)"),
    "another test size": ({"test_inputs": IMAGES[:12, :, :4]}, "inputs are uint8 (1, 8, 8) each, test_inputs uint8 (1, 4, 8)"),
    "other test channels": ({"test_inputs": np.repeat(IMAGES[:12], 3, 1)}, "test_inputs uint8 (3, 8, 8)"),
    "ragged lists": ({"inputs": [[1], [1, 2]]}, "inputs are no array"),
    "gradients": ({"targets": torch.ones(60, requires_grad=True)}, "targets are no array"),
    "masked pixels": ({"inputs": np.ma.masked_array(IMAGES, IMAGES > 200)}, "inputs hold masked values"),
    "masked labels": ({"targets": np.ma.masked_array(LABELS, LABELS == 1)}, "targets hold masked values"),
    "words": ({"targets": ["cat"] * 60}, "targets are <U3"),
    "fractions for labels": ({"targets": LABELS / 1}, "targets are float64"),
    "truth values": ({"targets": LABELS > 1}, "targets are bool"),
    "one-hot": ({"targets": np.eye(3, dtype=int)[LABELS]}, "targets are int64 (60, 3)"),
    "too few": ({"targets": LABELS[:50]}, "targets are int64 (50,); needed: an integer for each of 60"),
    "from 1": ({"targets": LABELS + 1}, "targets: classes go from 0 to 2; found 1 to 3"),
    "negative": ({"test_targets": LABELS[:12] - 1}, "test_targets: classes go from 0 to 2; found -1 to 1"),
    "no classes": ({"num_classes": 0}, "num_classes = 0; needed: a whole number from 1"),
    "half a class": ({"num_classes": 2.5}, "num_classes = 2.5"),
    "too much held out": ({"validation": 0.6, "proxy": 0.5}, "validation = 0.6, proxy = 0.5"),
    "a negative share": ({"validation": -0.1}, "validation = -0.1"),
    "no share": ({"proxy": float("nan")}, "proxy = nan"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_other_arrays_are_refused(kind: str) -> None:
    changes, words = REFUSED[kind]
    refused(lambda: made(**changes), words)


# -- Data that a user put together -------------------------------------------------------------------------------------


def changed(part: str, **fields: object) -> Data:
    data = made(proxy=0.2)
    return replace(data, **{part: replace(getattr(data, part), **fields)})


STORED = torch.from_numpy(IMAGES[:12])
REFUSED_DATA: Mapping[str, tuple[Maker, str]] = {
    "float images": (
        lambda: changed("train", stored=made(proxy=0.2).train.stored / 255),
        "inputs of float32 (1, 8, 8) in train and uint8 (1, 8, 8) in validation; needed: one shape and dtype",
    ),
    "float test images": (lambda: changed("test", stored=STORED / 255), "in test; needed: one shape and dtype"),
    "16 features": (lambda: changed("train", stored=torch.ones(48, 16, dtype=torch.uint8)), "uint8 (48, 16); needed"),
    "another size": (
        lambda: changed("test", stored=STORED[:, :, :4]),
        "uint8 (1, 8, 8) in train and uint8 (1, 4, 8) in test",
    ),
    "fractions for labels": (
        lambda: changed("proxy", stored=STORED[:, :, :4], labels=torch.zeros(12)),
        "proxy.labels are float32 (12,), num_classes = 3; needed: 1",
    ),
    "a class too many": (
        lambda: changed("test", labels=torch.arange(12)),
        "test.labels go from 0 to 11; needed: 0 to 2",
    ),
    "truth values": (lambda: changed("test", labels=torch.ones(12, dtype=torch.bool)), "test.labels are bool (12,)"),
    "too few labels": (
        lambda: changed("test", labels=torch.zeros(9).long()),
        "needed: a target for each of 12 inputs",
    ),
    "NumPy labels": (lambda: changed("test", labels=LABELS[:12]), "test.labels is of ndarray; needed: a torch.Tensor"),
    "a wrong position": (
        lambda: changed("test", positions=torch.arange(12) + 1),
        "test.positions leave the 12 inputs",
    ),
    "no deviation": (
        lambda: changed("train", std=torch.zeros(1)),
        "train.std is float32 (1,); needed: 1 finite numbers",
    ),
    "three means": (lambda: changed("test", mean=torch.zeros(3)), "test.mean is float32 (3,)"),
    "NaN": (lambda: changed("test", mean=torch.tensor([float("nan")])), "test.mean"),
    "an augmentation": (lambda: changed("train", augment=CropFlip()), "augmentation is chosen by data.augment"),
    "a list for a split": (
        lambda: replace(made(), validation=[]),
        "validation is of type list; needed: fl_sim.data.Split",
    ),
    "no number of classes": (lambda: replace(made(), num_classes="3"), "num_classes = '3'"),
    "a tuple": (lambda: (IMAGES, LABELS), "returned tuple, not fl_sim.data.Data"),
    "an error": (lambda: {}["train"], "it raised KeyError: 'train' (test_own_data.py, line"),
}


@pytest.mark.parametrize("kind", REFUSED_DATA)
def test_wrong_data_of_ones_own_are_refused(publish: Publish, kind: str) -> None:
    make, words = REFUSED_DATA[kind]
    path = publish(make)
    refused(lambda: load(path), f"data.source = {path!r}", words)


def test_integers_of_any_width_become_int64(publish: Publish) -> None:
    path = publish(
        lambda: changed("test", labels=torch.from_numpy(LABELS[:12]).int(), positions=torch.arange(12).to(torch.uint8))
    )
    data = load(path)
    assert data.test.labels.dtype == torch.int64
    assert torch.equal(data.test.subset(np.arange(3)).images, STORED[:3])


# -- shares ------------------------------------------------------------------------------------------------------------


def lines(caplog: pytest.LogCaptureFixture, path: str, **shares: float) -> tuple[Data, Sequence[str]]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="fl_sim"):
        data = load(path, **shares)
    return data, [record.getMessage() for record in caplog.records]


def test_shares_of_the_config_reach_a_source_that_takes_them(
    publish: Publish, caplog: pytest.LogCaptureFixture
) -> None:
    path = publish(lambda *, validation, proxy: made(validation=validation, proxy=proxy))
    data, said = lines(caplog, path, validation=0.5, proxy=0.2)
    assert (len(data.train), len(data.validation), len(data.proxy or ()), said) == (18, 30, 12, [])
    one = publish(lambda validation=0.3: made(validation=validation))
    assert len(load(one, validation=0.5).validation) == 30
    refused(lambda: load(one, proxy=0.2), "data.proxy = 0.2, but the function returned 0 of its samples for proxy")


def test_shares_that_a_source_does_not_take_are_refused_or_said(
    publish: Publish, caplog: pytest.LogCaptureFixture
) -> None:
    plain = publish(made)
    assert lines(caplog, plain)[1] == []
    path = publish(lambda: made(validation=0.3, proxy=0.1))
    refused(lambda: load(path, validation=0.5), "data.validation = 0.5, but the function returned 0.3", "let it take")
    data, said = lines(caplog, path)
    assert (len(data.validation), len(said)) == (18, 2)
    assert "holds 0.3 of its samples for validation, not data.validation = 0.1" in said[0]
    assert "holds 0.1 of its samples for proxy, not data.proxy = 0" in said[1]
    assert lines(caplog, path, validation=0.3, proxy=0.1)[1] == []


def test_what_may_be_meant_otherwise_is_said(publish: Publish, caplog: pytest.LogCaptureFixture) -> None:
    def said(make: Maker) -> Sequence[str]:
        return [line.partition(": ")[2] for line in lines(caplog, publish(make))[1]]

    def shared() -> Data:
        every = Split(torch.from_numpy(IMAGES), torch.from_numpy(LABELS), HALF, HALF)
        first, rest = every.subset(np.arange(6)), every.subset(np.arange(6, 60))
        return Data(rest, first, every.subset(np.arange(50, 60)), 3)

    assert said(shared) == ["10 images are training and test samples"]
    assert said(lambda: changed("test", mean=HALF / 2))[-1] == (
        "test images are normalised by another mean or std than training images"
    )
    last = RNG.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
    assert said(lambda: made(inputs=last, test_inputs=last[:12])) == [
        "images have 8 channels of 8 x 3 pixels; channels come first: (N, C, H, W)"
    ]
    assert said(lambda: made(num_classes=5)) == [
        "2 of 5 classes have no training samples: 3, 4",
        "2 of 5 classes have no test samples: 3, 4",
    ]
    assert said(lambda: made(inputs=IMAGES // 128)) == [
        "no training image holds a value above 1; needed: 0 to 255, as black to white"
    ]


def test_a_run_says_it_once(publish: Publish, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    tree = {"name": "x", "rounds": 1, "out": str(tmp_path), "model": {"name": "mlp"}, "cohort": {"size": 2}}
    data = {"source": publish(lambda: made(num_classes=4)), "clients": 2}
    experiment = Experiment.from_tree({**tree, "data": data})
    with caplog.at_level(logging.WARNING, logger="fl_sim"):
        run(experiment)
        make_client_app(experiment)  # as every process of clients does
    said = [record.getMessage() for record in caplog.records]
    assert sum("classes have no training samples" in line for line in said) == 1


@pytest.mark.parametrize("model", ["cnn"])
@pytest.mark.parametrize("shape", [(1, 8, 12), (8, 8, 3)], ids=["oblong", "channels last"])
def test_a_model_that_cannot_take_the_images_is_refused_before_round_1(
    publish: Publish, model: str, shape: tuple[int, int, int]
) -> None:
    images = RNG.integers(0, 256, (60, *shape), dtype=np.uint8)
    data = {"source": publish(lambda: made(inputs=images, test_inputs=images[:12])), "clients": 2}
    experiment = Experiment.from_tree({"model": {"name": model}, "cohort": {"size": 2}, "data": data})
    refused(lambda: Federation.build(experiment), f"model.name = {model!r}", f"on images of shape (2, {shape[0]}, 8, ")


def test_a_model_of_any_size_takes_oblong_images(publish: Publish) -> None:
    images = RNG.integers(0, 256, (60, 1, 8, 12), dtype=np.uint8)
    data = {"source": publish(lambda: made(inputs=images, test_inputs=images[:12])), "clients": 2}
    experiment = Experiment.from_tree({"model": {"name": "cnn_bn"}, "cohort": {"size": 2}, "data": data})
    assert Federation.build(experiment).data.shape == (1, 8, 12)


# -- partitions --------------------------------------------------------------------------------------------------------


def in_turn(count: int, clients: int) -> list[np.ndarray]:
    return [np.arange(count)[client::clients] for client in range(clients)]


TAKEN: Mapping[str, Maker] = {
    "lists": lambda labels, request: [part.tolist() for part in in_turn(60, 4)],
    "a tuple": lambda labels, request: tuple(in_turn(60, 4)),
    "one array": lambda labels, request: np.stack(in_turn(60, 4)),
    "tensors": lambda labels, request: [torch.from_numpy(part) for part in in_turn(60, 4)],
    "mixed integers": lambda y, asked: [
        part.astype(kind) for part, kind in zip(in_turn(60, 4), (np.uint64, np.int8, np.int32, int), strict=True)
    ],
    "backwards": lambda labels, request: [part[::-1] for part in in_turn(60, 4)],
}


@pytest.mark.parametrize("kind", TAKEN)
def test_integers_in_any_form_are_a_partition(publish: Publish, kind: str) -> None:
    parts = partition(LABELS, 4, kind=publish(TAKEN[kind]))
    assert all(part.dtype == np.int64 for part in parts)
    assert all(np.array_equal(one, other) for one, other in zip(parts, in_turn(60, 4), strict=True))


def _in_place(labels: np.ndarray, request: object) -> list[np.ndarray]:
    labels.sort()
    return in_turn(60, 4)


def test_labels_that_a_partition_sorts_in_place_stay_as_they_are(publish: Publish) -> None:
    labels = LABELS.copy()
    partition(labels, 4, kind=publish(_in_place))
    assert np.array_equal(labels, LABELS)


REFUSED_PARTS: Mapping[str, tuple[Maker, str]] = {
    "one argument": (lambda labels: in_turn(60, 4), "too many positional arguments; it is called with (labels, request)"),
    "three arguments": (lambda labels, request, seed: in_turn(60, 4), "missing a required argument: 'seed'"),
    "by name only": (lambda *, labels, request: in_turn(60, 4), "it is called with (labels, request)"),
    "an error": (lambda labels, request: labels.nowhere, "it raised AttributeError"),
    "a dict": (lambda labels, request: dict(enumerate(in_turn(60, 4))), "returned dict; needed: a list of 4 index arrays"),
    "a generator": (lambda labels, request: iter(in_turn(60, 4)), "needed: a list of 4 index arrays"),
    "a client of each sample": (lambda labels, request: labels % 4, "returned 60 parts; needed: a list of 4"),
    "numbers for parts": (lambda labels, request: [1, 2, 3, 4], "part 0 is int64 ()"),
    "ragged parts": (lambda labels, request: [[[1], [2, 3]]] * 4, "part 0 is no array"),
    "fractions": (lambda labels, request: [part / 1 for part in in_turn(60, 4)], "part 0 is float64 (15,)"),
    "masks": (lambda labels, request: [labels == client for client in range(4)], "part 0 is bool (60,)"),
    "counted from the end": (lambda labels, request: [part - 1 for part in in_turn(60, 4)], "holds position -1; there are 60"),
    "masked positions": (lambda labels, request: [np.ma.masked_array(p, p > 50) for p in in_turn(60, 4)], "holds masked positions"),
    "an empty part": (lambda labels, request: [[], *in_turn(60, 3)], "a client got 0 samples"),
    "a sample twice": (lambda labels, request: [[0, 0], *in_turn(60, 3)], "sample 0 is in 3 parts"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED_PARTS)
def test_other_parts_are_refused(publish: Publish, kind: str) -> None:
    function, words = REFUSED_PARTS[kind]
    path = publish(function)
    refused(lambda: partition(LABELS, 4, kind=path), f"data.partition = {path!r}", words)


def _texts() -> dict[str, object]:
    pandas = pytest.importorskip("pandas")
    words = ["no", "yes", "no", "maybe", "yes"] * 8
    return {
        "array": np.array(words),
        "objects": np.array(words, dtype=object),
        "list": words,
        "series": pandas.Series(words),
        "categories": pandas.Series(words).astype("category"),
    }


@pytest.mark.parametrize("kind", ["array", "objects", "list", "series", "categories"])
def test_targets_that_are_texts_are_classes_however_they_come(kind: str) -> None:
    words = _texts()
    rows = np.arange(80, dtype=np.float32).reshape(40, 2)
    data = Data.of(rows, words[kind])
    expected = Data.of(rows, np.unique(np.asarray(words["array"]), return_inverse=True)[1])
    assert data.num_classes == 3
    assert torch.equal(data.train.labels, expected.train.labels)
    assert torch.equal(data.test.labels, expected.test.labels)


def test_truth_values_of_a_frames_column_are_classes() -> None:
    pandas = pytest.importorskip("pandas")
    rows = np.arange(80, dtype=np.float32).reshape(40, 2)
    data = Data.of(rows, pandas.Series(rows[:, 0] > 30))
    assert data.num_classes == 2


def test_texts_among_which_one_is_missing_are_refused() -> None:
    words = np.array([*["a", "b"] * 10, None], dtype=object)
    with pytest.raises(UserError, match=r"targets: sample 20 \(from 0\) is None among texts"):
        Data.of(np.ones((21, 2), dtype=np.float32), words)


def test_a_batch_is_a_tuple_of_inputs_and_targets() -> None:
    """docs/plugging_in.md says what a client of one's own loops over."""
    inputs, targets = np.arange(40, dtype=np.float32).reshape(20, 2), np.arange(20) % 2
    (plain, *_), (weighted, *_) = (
        list(Data.of(inputs, targets, weights=weights).train.batches(8)) for weights in (None, np.arange(1, 21))
    )
    for batch in (plain, weighted):
        assert isinstance(batch, tuple)
        assert [(part.shape[0], part.dtype) for part in batch] == [(8, torch.float32), (8, torch.int64)]
    assert not hasattr(plain, "weights")
    assert (weighted.weights.shape, weighted.weights.dtype) == ((8,), torch.float32)  # type: ignore[attr-defined]


def test_numbers_to_predict_that_are_far_from_0_are_said() -> None:
    far, near = (remarks(Data.of(NUMBERS, NUMBERS.sum(1) * factor)) for factor in (1e6, 1.0))
    assert [line for line in far if line.startswith("targets go from -")]
    assert not near
