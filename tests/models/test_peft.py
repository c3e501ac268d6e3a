"""LoRA on models of Hugging Face's transformers, by its peft: a tiny GPT-2 that is made here, nothing is downloaded."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fl_sim import Experiment, Report, UserError, codecs, models, run
from fl_sim.models import Adapter, Interface
from fl_sim.models.parameters import snapshot

TOKENS = torch.arange(16).view(2, 8) % 11
INTERFACE = Interface((8,), 11, vocabulary=11, each_token=True)
BUILDER = """
from transformers import GPT2Config, GPT2LMHeadModel


def build(*, num_classes, input_shape, vocabulary, each_token):
    size = GPT2Config(vocab_size=vocabulary, n_positions=input_shape[0], n_embd=16, n_layer=2, n_head=2)
    return GPT2LMHeadModel(size)
"""
CONFIG: dict[str, Any] = {
    "name": "gpt2",
    "rounds": 2,
    "task": "next_token",
    "data": {"source": "coriolanus", "partition": "natural", "clients": 32, "context": 16},
    "model": {"name": "tiny_gpt2:build", "adapter": {"kind": "lora", "rank": 2, "alpha": 4.0}},
    "cohort": {"size": 2},
    "training": {"lr": 0.01, "steps": 1},
    "evaluate": {"every": 2},
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a builder of a GPT-2."""
    (tmp_path / "tiny_gpt2.py").write_text(BUILDER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "tiny_gpt2", ModuleType("tiny_gpt2"))  # put back after the test
    del sys.modules["tiny_gpt2"]
    return tmp_path


@pytest.fixture
def installed(here: Path) -> Path:
    """The same, where the extra is installed."""
    for name in ("peft", "transformers"):
        pytest.importorskip(name, reason=f"needs {name}: pip install 'fl-sim[peft]'")
    return here


def built(**options: Any) -> nn.Module:
    model = models.build_for("tiny_gpt2:build", INTERFACE, seed=3).eval()
    if options:
        models.adapt(model, Adapter(**options), seed=5)
    return model


def ran(*overrides: str) -> Report:
    return run(Experiment.from_tree(CONFIG, list(overrides)))


class Fake(nn.Module):
    """Stands for a model of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Any:
        return type("Output", (), {"logits": self.layer(inputs)})()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = ModuleType("transformers.modeling_utils")
    transformers.PreTrainedModel = Fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers.modeling_utils", transformers)
    monkeypatch.setitem(sys.modules, "peft", None)


def test_without_peft_a_line_says_what_to_install(fake: None) -> None:
    with pytest.raises(UserError, match=r"are peft's; pip install 'fl-sim\[peft\]'"):
        models.adapt(nn.Sequential(Fake()), Adapter(rank=2))


def test_a_model_of_transformers_answers_with_its_logits(fake: None, here: Path) -> None:
    module = f"from {__name__} import Fake\n\n\ndef build(*, num_classes, input_shape):\n    return Fake()\n"
    (here / "tiny_gpt2.py").write_text(module)
    assert models.build_for("tiny_gpt2:build", Interface((4,), 3))(torch.zeros(2, 4)).shape == (2, 3)


def test_a_model_starts_as_its_base_and_merges_into_its_architecture(installed: Path) -> None:
    plain, model = built(), built(rank=2, alpha=4.0)
    assert torch.allclose(model(TOKENS), plain(TOKENS), atol=1e-6)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2
    assert all(".c_attn.lora_" in name for name in trained)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.uniform_(parameter, -1, 1)
    merged = models.merged(snapshot(model), model=model)
    assert merged.keys() == snapshot(plain).keys()
    plain.load_state_dict(dict(merged), strict=False)
    assert torch.allclose(plain(TOKENS), model(TOKENS), atol=1e-5)
    assert models.head_names(model) == models.head_names(plain)


def test_targets_train_and_seeds(installed: Path) -> None:
    model = built(rank=2, targets=("*.c_fc",), train="norm")
    trained = {name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert {name.partition(".h.0.")[2] for name in trained if ".h.0." in name} == {
        "ln_1",
        "ln_2",
        "mlp.c_fc.lora_A.default",
        "mlp.c_fc.lora_B.default",
    }
    name = "model.transformer.h.0.attn.c_attn.lora_A.default.weight"
    assert torch.equal(built(rank=2).get_parameter(name), built(rank=2).get_parameter(name))
    other = built()
    models.adapt(other, Adapter(rank=2), seed=6)
    assert not torch.equal(other.get_parameter(name), built(rank=2).get_parameter(name))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"targets": ("nothing",)},
            "'nothing' selects no weight that can have an adapter; allowed: model.transformer.wpe",
        ),
        ({"targets": ("*.wte",)}, "'*.wte' selects no weight"),  # the head shares it
        ({"rank": 17}, "c_attn.weight' has shape (16, 48), of rank at most 16"),
    ],
)
def test_what_cannot_be_adapted_is_one_line(installed: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        built(**options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_adapters_travel_and_a_given_base_once(installed: Path) -> None:
    seeded = ran()
    assert seeded.params
    assert all(".lora_" in name for name in seeded.params)
    encoded = len(codecs.encode(seeded.params, None, schema=codecs.Schema.of(seeded.params, list(seeded.params))))
    rows = seeded.ledger.to_table().to_pylist()
    told = 16 * len({row["client"] for row in rows})
    assert seeded.ledger.total(by=("direction",)) == {("up",): 4 * encoded, ("down",): 4 * encoded + told}

    from transformers import GPT2Config, GPT2LMHeadModel

    size = GPT2Config(vocab_size=60, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    GPT2LMHeadModel(size).save_pretrained("base")  # names without the prefix `model.`
    given = ran('model.weights="base/model.safetensors"')
    first = [row for row in given.ledger.to_table().to_pylist() if row["section"] == "auxiliary"]
    assert len({row["client"] for row in first}) == len(first)
    assert all(row["payload_bytes"] > 4 * 16 * 60 for row in first)
    assert given.results.uplink_bytes == seeded.results.uplink_bytes
    architecture = models.build_for("tiny_gpt2:build", Interface((16,), 60, vocabulary=60, each_token=True))
    assert load_file(given.folder / "model.safetensors").keys() == snapshot(architecture).keys()
    again = ran(f'model.weights="{given.folder}"', "name=again")
    assert again.results.uplink_bytes == seeded.results.uplink_bytes


@pytest.mark.slow
def test_workers_train_the_same(installed: Path) -> None:
    inline, workers = ran(), ran("engine=workers", "workers.count=2", "name=workers")
    assert all(torch.equal(inline.params[name], workers.params[name]) for name in inline.params)
    assert inline.ledger.total(by=("direction",)) == workers.ledger.total(by=("direction",))
