"""Shipped configs end in the bits they always ended in: parameters, ledger, rounds, on several engines.

The bits of a trained model depend on the processor's vector instructions, so `golden/behaviour.json` keeps the hashes
for each kind of processor seen, told by the bits of a small training. On one that is not listed the engines still have to
agree, and the accuracies and message counts have to be those of the others. After a change that is meant to change results:
`python tests/simulation/test_frozen_behaviour.py`.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

from fl_sim import Experiment, Report, run

GOLDEN = Path(__file__).parents[1] / "golden" / "behaviour.json"
SHORT = ("rounds=3", "evaluate.every=2", "data.clients=8", "cohort.size=4")
CONFIGS: Mapping[str, Sequence[str]] = {
    "quickstart": (),
    "quickstart_topk": (),
    "everything": ("strategy.at=2", "data.noise=16", "strategy.images=8"),
    "digits_adaptive": (),
    "digits_batchnorm": ("training.steps=2",),
    "digits_capacities": ("training.steps=2", "strategy.steps=3"),
    "digits_rate_distortion": ("strategy.at=1", "strategy.every=1"),
    "private": ("strategy.target=strategies.presets:private",),
}


def bits(config: str, out: Path, *overrides: str) -> dict[str, str]:
    """SHA-256 of what a shortened run leaves, wall-clock times left out."""
    file = Path("configs") / f"{'quickstart' if config == 'private' else config}.toml"
    report = run(Experiment.load(file, [*SHORT, *CONFIGS[config], f'out="{out}"', *overrides]))
    return {"params": _params(report), "ledger": _ledger(report), "rounds": _rounds(report)}


def _params(report: Report) -> str:
    digest = hashlib.sha256()
    for path in sorted(report.folder.glob("model*.safetensors")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _ledger(report: Report) -> str:
    rows = report.ledger.to_table().to_pylist()
    return hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()


def _rounds(report: Report) -> str:
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in report.rounds]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def processor() -> str:
    """A word for the arithmetic of this machine: the hash of a small convolutional network after three steps.

    PyTorch's vector instructions stand beside it where they are others than AVX-512. An AMD Zen 3 (AVX2) has the hash of a
    machine that was recorded before, and other bits in whole runs.
    """
    torch.set_num_threads(1)  # as every run does
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 3, 3, 3, generator=rng).requires_grad_()
    head = torch.randn(10, 16 * 64, generator=rng).requires_grad_()
    images = torch.randn(16, 3, 8, 8, generator=rng)
    for _ in range(3):
        hidden = torch.nn.functional.conv2d(images, weight, padding=1).relu().flatten(1)
        torch.nn.functional.cross_entropy(hidden @ head.T, torch.arange(16) % 10).backward()
        for tensor in (weight, head):
            assert tensor.grad is not None
            tensor.data -= 0.1 * tensor.grad
            tensor.grad = None
    found = hashlib.sha256(weight.detach().numpy().tobytes() + head.detach().numpy().tobytes())
    vectors = torch.backends.cpu.get_cpu_capability()
    own = "" if vectors == "AVX512" else f" {vectors}"
    return f"{torch.__version__.split('+')[0]} {found.hexdigest()[:16]}{own}"


@pytest.fixture(scope="module")
def golden() -> Mapping[str, Mapping[str, str]]:
    known: dict[str, dict[str, dict[str, str]]] = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return known.get(processor(), {})


@pytest.mark.parametrize("config", CONFIGS)
def test_runs_end_in_the_same_bits(config: str, tmp_path: Path, golden: Mapping[str, Mapping[str, str]]) -> None:
    inline = bits(config, tmp_path / "inline")
    assert inline == golden.get(config, inline)
    assert bits(config, tmp_path / "workers", "engine=workers", "workers.count=2") == inline


def freeze() -> None:
    """Write what today's code gives on this machine."""
    known = json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        known[processor()] = {config: bits(config, Path(folder)) for config in CONFIGS}
    GOLDEN.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    freeze()
