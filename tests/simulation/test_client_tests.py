"""data.client_test: each client evaluates on samples of its own that it never trains on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from federation import same

from fl_sim import Experiment, UserError, run
from fl_sim.simulation.client_side import host_of
from fl_sim.simulation.federation import Federation

DATA = {"clients": 5, "client_test": 0.25}


def asked(out: Path, **keys: object) -> Experiment:
    tables: dict[str, object] = {"rounds": 1, "data": DATA, "cohort": {"size": 4}, "evaluate": {"clients": 5}}
    return Experiment(**{**tables, "out": str(out), "workers": {"count": 1}, **keys})


def test_a_quarter_of_each_client_is_its_own_test_set(tmp_path: Path) -> None:
    whole = Federation.build(asked(tmp_path, data={"clients": 5}), quiet=True)
    federation = Federation.build(asked(tmp_path), quiet=True)
    assert federation.held is not None
    host = host_of(federation, federation.first)
    for client, before in enumerate(whole.partitions):
        kept, held = federation.partitions[client], federation.held[client]
        assert np.array_equal(np.sort(np.concatenate([kept, held])), before)
        assert len(held) == round(0.25 * len(before))
        assert torch.equal(host.test_of(client).labels, federation.data.train.labels[held])
        assert len(host.split_of(client)) == len(kept)
    assert federation.sizes == [len(part) for part in federation.partitions]


@pytest.mark.slow
def test_engines_agree(tmp_path: Path) -> None:
    inline = run(asked(tmp_path / "inline"))
    assert "clients_accuracy" in inline.rounds[-1]
    same(inline, run(asked(tmp_path / "workers", engine="workers")))


def test_samples_that_nobody_measures_on_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.client_test = 0\.25: nobody would measure on these samples"):
        asked(tmp_path, evaluate={"clients": 0})
    one_each = {"clients": 1293, "partition": "iid", "client_test": 0.5, "min_size": 1}
    with pytest.raises(UserError, match=r"client 0 has 1 samples, which leave none to train on"):
        Federation.build(asked(tmp_path, data=one_each), quiet=True)
