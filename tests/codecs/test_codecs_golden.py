"""Frozen bytes: what version 6 wrote must decode for ever. `python tests/codecs/test_codecs_golden.py` writes missing files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import payloads
import pytest
import torch

GOLDEN = Path(__file__).parents[1] / "golden" / "v6"


def path(name: str) -> Path:
    return GOLDEN / f"{name}.bin"


@pytest.mark.parametrize("name", payloads.CASES)
def test_golden_bytes_decode_and_are_still_written(name: str) -> None:
    frozen = path(name).read_bytes()
    case = payloads.CASES[name]()
    params, mask = case.decode(frozen)
    again, _ = case.decode(case.encode())
    assert torch.equal(params.flat, again.flat)
    assert (mask is None) == (case.mask is None)
    if mask is not None:
        assert torch.equal(mask.flat, case.schema.flat_mask(case.mask))
    assert frozen[:8] == case.encode()[:8]


def test_there_is_no_golden_file_without_a_case() -> None:
    assert {p.stem for p in GOLDEN.glob("*.bin")} == set(payloads.CASES)


@pytest.mark.slow
def test_without_a_compiler_the_bytes_are_the_same() -> None:
    program = """
import sys
sys.modules["fl_sim.core.kernels._coding"] = None
from pathlib import Path
import payloads
from fl_sim.core.kernels import coding
assert coding.FORM == "NumPy"
for name, make in payloads.CASES.items():
    case = make()
    data = case.encode()
    assert data == Path(sys.argv[1], f"{name}.bin").read_bytes(), name
    case.decode(data)
"""
    path = os.pathsep.join([str(Path(payloads.__file__).parent), os.environ.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, "-c", program, str(GOLDEN)], check=True, env={**os.environ, "PYTHONPATH": path})


if __name__ == "__main__":
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for missing in [n for n in payloads.CASES if not path(n).exists()]:
        path(missing).write_bytes(payloads.CASES[missing]().encode())
        sys.stdout.write(f"wrote {path(missing).name}\n")
