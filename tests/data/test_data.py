"""Sources, splits, batches, partitions."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from properties import examples

from fl_sim.core.types import UserError
from fl_sim.data import PARTITIONS, CropFlip, Split, label_counts, load, partition
from fl_sim.data import cache as data_cache

CIFAR = Path("../shared/data/cifar10")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FL_SIM_CACHE", str(tmp_path / "cache"))


def pictures(count: int, mode: str = "RGB", size: int = 6) -> list[bytes]:
    rng = np.random.default_rng(count)
    made = []
    for _ in range(count):
        pixels = rng.integers(0, 256, (size, size) if mode == "L" else (size, size, 3), dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels, mode=None).save(stream, "PNG")
        made.append(stream.getvalue())
    return made


def parquet(folder: Path, *, column: str = "img", mode: str = "RGB", size: int = 6) -> Path:
    folder.mkdir(exist_ok=True)
    for part, count in (("train", 40), ("test", 10)):
        images = [{"bytes": data, "path": None} for data in pictures(count, mode, size)]
        pq.write_table(
            pa.table({column: images, "label": [i % 4 for i in range(count)]}),
            folder / f"{part}-00000-of-00001.parquet",
            row_group_size=8,  # several, as any large file has
        )
    return folder


def test_digits_are_split_once_and_stratified() -> None:
    data = load("digits")
    assert (len(data.train), len(data.validation), len(data.test)) == (1293, 145, 359)
    assert data.shape == (1, 8, 8)
    assert data.num_classes == 10
    assert torch.bincount(data.validation.labels).min() >= 12
    again = load("digits")
    assert torch.equal(data.train.images, again.train.images)


@pytest.mark.parametrize(("column", "mode", "channels"), [("img", "RGB", 3), ("image", "L", 1)])
def test_parquet_folders_decode_exactly(tmp_path: Path, column: str, mode: str, channels: int) -> None:
    data = load(str(parquet(tmp_path / "set", column=column, mode=mode)), validation=0.2)
    assert data.shape == (channels, 6, 6)
    assert (len(data.train), len(data.validation), len(data.test)) == (32, 8, 10)
    first = np.asarray(Image.open(io.BytesIO(pictures(10, mode)[0])))
    expected = first[None] if mode == "L" else first.transpose(2, 0, 1)
    assert np.array_equal(data.test.images[0].numpy(), expected)


def test_the_cache_is_used_and_a_damaged_one_is_rebuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(parquet(tmp_path / "set"))
    first = load(folder)
    entry = next((tmp_path / "cache").iterdir())
    monkeypatch.setattr("fl_sim.data.parquet_folder.decode", lambda *_, **__: pytest.fail("decoded again"))
    assert torch.equal(load(folder).train.images, first.train.images)
    monkeypatch.undo()
    monkeypatch.setenv("FL_SIM_CACHE", str(tmp_path / "cache"))
    (entry / "images.npy").write_bytes((entry / "images.npy").read_bytes()[:100])
    assert torch.equal(load(folder).train.images, first.train.images)


def test_the_cache_key_is_the_content(tmp_path: Path) -> None:
    def key(folder: Path) -> str:
        return data_cache.content_key("x", folder, sorted(folder.iterdir()))

    one, two = parquet(tmp_path / "one"), parquet(tmp_path / "two")
    assert key(one) == key(two)
    other = parquet(tmp_path / "three", mode="L")
    assert key(one) != key(other)


def test_image_folders(tmp_path: Path) -> None:
    for part, count in (("train", 12), ("test", 4)):
        for label in ("cat", "dog"):
            place = tmp_path / "set" / part / label
            place.mkdir(parents=True)
            for i, data in enumerate(pictures(count)):
                (place / f"{i:02}.png").write_bytes(data)
    data = load(str(tmp_path / "set"))
    assert (len(data.train) + len(data.validation), len(data.test), data.num_classes) == (24, 8, 2)


def broken(tmp_path: Path, kind: str) -> str:
    folder = parquet(tmp_path / "set")
    train = folder / "train-00000-of-00001.parquet"
    if kind == "columns":
        pq.write_table(pa.table({"x": [1]}), train)
    elif kind == "bytes":
        train.write_bytes(b"PAR1 nonsense")
    elif kind == "missing":
        train.unlink()
    elif kind == "image":
        pq.write_table(pa.table({"img": [{"bytes": b"no image", "path": None}], "label": [0]}), train)
    elif kind == "sizes":
        images = [{"bytes": d, "path": None} for d in (*pictures(1), *pictures(1, size=9))]
        pq.write_table(pa.table({"img": images, "label": [0, 1]}), train)
    return str(folder)


@pytest.mark.parametrize("kind", ["columns", "bytes", "missing", "image", "sizes"])
def test_broken_folders_are_one_clear_line(tmp_path: Path, kind: str) -> None:
    with pytest.raises(UserError) as caught:
        load(broken(tmp_path, kind))
    assert "\n" not in str(caught.value)
    assert "data.source" in str(caught.value)


def test_an_unknown_source_names_the_known() -> None:
    with pytest.raises(UserError, match="digits, cifar10"):
        load("cifar")


def test_proxy_data_is_disjoint(tmp_path: Path) -> None:
    data = load("digits", proxy=0.2)
    assert data.proxy is not None
    assert len(data.train) + len(data.validation) + len(data.proxy) == 1438
    images = torch.cat([data.train.images, data.validation.images, data.proxy.images])
    plain = load("digits")
    both = torch.cat([plain.train.images, plain.validation.images])
    assert sorted(map(bytes, images.numpy())) == sorted(map(bytes, both.numpy()))


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR.is_dir(), reason="real CIFAR-10 is not at ../shared/data/cifar10")
def test_real_cifar10_has_its_shape() -> None:
    data = load(str(CIFAR))
    assert data.shape == (3, 32, 32)
    assert (len(data.train), len(data.validation), len(data.test)) == (45_000, 5_000, 10_000)
    assert data.train.mean.tolist() == pytest.approx([0.491, 0.482, 0.447], abs=0.01)


# -- batches -----------------------------------------------------------------------------------------------------------


def test_batches_are_normalised_complete_and_shuffled_by_the_generator() -> None:
    data = load("digits").train
    plain = list(data.batches(100))
    assert sum(len(labels) for _, labels in plain) == len(data)
    assert torch.equal(torch.cat([labels for _, labels in plain]), data.labels)
    images = torch.cat([images for images, _ in plain])
    torch.testing.assert_close(
        images,
        (data.images.float() / 255 - data.mean.view(1, -1, 1, 1)) / data.std.view(1, -1, 1, 1),
        rtol=1e-4,
        atol=1e-5,
    )
    shuffled = [
        torch.cat([labels for _, labels in data.batches(100, rng=torch.Generator().manual_seed(s))]) for s in (1, 1, 2)
    ]
    assert torch.equal(shuffled[0], shuffled[1])
    assert not torch.equal(shuffled[0], shuffled[2])
    assert torch.equal(shuffled[0].sort().values, data.labels.sort().values)


@pytest.mark.parametrize("augment", [None, CropFlip(2)])
def test_batches_come_in_the_layout_that_is_asked_for(augment: CropFlip | None) -> None:
    images = torch.randint(0, 256, (25, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = Split(images, torch.arange(25), torch.full((3,), 0.5), torch.tensor([0.2, 0.3, 0.4]), augment)
    plain, last = (
        list(data.batches(10, rng=torch.Generator().manual_seed(1), layout=layout))
        for layout in (torch.contiguous_format, torch.channels_last)
    )
    assert all(images.is_contiguous() for images, _ in plain)
    assert all(images.is_contiguous(memory_format=torch.channels_last) for images, _ in last)
    assert [len(labels) for _, labels in last] == [10, 10, 5]
    for ours, theirs in zip(plain, last, strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


def test_crops_are_true_windows_and_flips_are_mirrors() -> None:
    images = torch.arange(1, 1 + 5 * 2 * 6 * 6, dtype=torch.int16).view(5, 2, 6, 6)
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    seen = set()
    for seed in range(40):
        got = CropFlip(padding=2)(images, torch.Generator().manual_seed(seed))
        assert got.shape == images.shape
        for i in range(5):
            windows = {
                (top, left, flip): (w.flip(-1) if flip else w)
                for top in range(5)
                for left in range(5)
                for flip in (False, True)
                for w in [padded[i, :, top : top + 6, left : left + 6]]
            }
            matches = [key for key, window in windows.items() if torch.equal(window, got[i])]
            assert len(matches) == 1
            seen.add(matches[0])
    assert len(seen) > 45
    assert torch.equal(CropFlip(padding=0, flip=False)(images, torch.Generator()), images)


def test_augmentation_is_for_shuffled_batches_only() -> None:
    data = load("digits").train.subset(np.arange(10)).augmented(CropFlip(2))
    assert torch.equal(next(iter(data.batches(10)))[0], next(iter(data.augmented(None).batches(10)))[0])
    source = [torch.Generator().manual_seed(0) for _ in range(2)]
    assert not torch.equal(
        next(iter(data.batches(10, rng=source[0])))[0], next(iter(data.augmented(None).batches(10, rng=source[1])))[0]
    )


def test_a_subset_shares_the_images_it_is_of() -> None:
    """Thousands of clients hold positions into one array, and so does a part of a client's data."""
    data = load("digits").train
    part = data.subset(np.array([3, 5, 8]))
    assert isinstance(part, Split)
    assert torch.equal(part.images, data.images[[3, 5, 8]])
    again = part.subset(np.array([2, 0]))
    assert torch.equal(again.images, data.images[[8, 3]])
    assert torch.equal(again.labels, data.labels[[8, 3]])
    assert again.stored.data_ptr() == part.stored.data_ptr() == data.stored.data_ptr()


# -- partitions --------------------------------------------------------------------------------------------------------


@given(
    kind=st.sampled_from(sorted(PARTITIONS)),
    clients=st.integers(1, 20),
    alpha=st.sampled_from([0.1, 0.5, 10.0]),
    seed=st.integers(0, 100),
    samples=st.integers(100, 700),
)
@settings(deadline=None, max_examples=examples(60))
def test_partitions_are_disjoint_complete_and_deterministic(
    kind: str, clients: int, alpha: float, seed: int, samples: int
) -> None:
    labels = np.random.default_rng(seed).integers(0, 10, samples)
    groups = np.arange(samples) % 23

    def made() -> list[np.ndarray]:
        return partition(labels, clients, kind=kind, alpha=alpha, seed=seed, min_size=1, groups=groups)

    parts = made()
    assert len(parts) == clients
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(samples))
    assert min(map(len, parts)) >= 1
    assert all(np.array_equal(a, b) for a, b in zip(parts, made(), strict=True))


def entropy(labels: np.ndarray, parts: list[np.ndarray]) -> float:
    counts = label_counts(labels, parts, 10) + 1e-9
    shares = counts / counts.sum(1, keepdims=True)
    return float(-(shares * np.log(shares)).sum(1).mean())


def test_skew_follows_its_parameter() -> None:
    labels = np.repeat(np.arange(10), 500)
    by_alpha = [entropy(labels, partition(labels, 20, alpha=a)) for a in (0.1, 0.5, 5.0)]
    assert by_alpha == sorted(by_alpha)
    assert entropy(labels, partition(labels, 20, kind="shards")) < entropy(labels, partition(labels, 20, kind="iid"))
    sizes = [len(p) for p in partition(labels, 20, kind="quantity", alpha=0.3)]
    assert max(sizes) > 5 * min(sizes)
    assert entropy(labels, partition(labels, 20, kind="quantity", alpha=5.0)) > 2.2


def test_different_seeds_differ_and_min_size_holds() -> None:
    labels = np.repeat(np.arange(10), 500)
    assert any(
        not np.array_equal(a, b)
        for a, b in zip(partition(labels, 20, seed=0), partition(labels, 20, seed=1), strict=True)
    )
    assert min(map(len, partition(labels, 20, alpha=0.1, min_size=40))) >= 40


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_clients": 101}, "101"),
        ({"num_clients": 10, "min_size": 11}, "11"),
        ({"num_clients": 5, "kind": "dirchlet"}, "did you mean 'dirichlet'"),
    ],
)
def test_impossible_partitions_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        partition(np.zeros(100, dtype=np.int64), **options)
