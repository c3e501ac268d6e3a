"""LoRA beside any weight: the function at the start, the law W0 + alpha / rank B A, names in files, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from fl_sim import models
from fl_sim.core.types import UserError
from fl_sim.models import Adapter, Interface
from fl_sim.models.macs import count_macs
from fl_sim.models.parameters import snapshot

LORA = ".parametrizations.weight.0.lora_"


class Attending(nn.Module):
    """Tokens (B, T) through an embedding that the head shares, PyTorch's attention, a GRU and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.gru = nn.GRU(8, 8, batch_first=True)
        self.conv = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + self.attention(x, x, x)[0]
        x = self.norm(self.gru(x)[0])
        return self.head(x + self.conv(x.transpose(1, 2)).transpose(1, 2))  # type: ignore[no-any-return]


TOKENS = torch.arange(10).view(2, 5)


def filled(model: nn.Module) -> nn.Module:
    """The model with adapters that are not at their start."""
    rng = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            parameter.data.uniform_(-1, 1, generator=rng)
    return model


def adapted(**options: object) -> nn.Module:
    torch.manual_seed(0)
    model = Attending().eval()
    models.adapt(model, Adapter(**options), seed=3)  # type: ignore[arg-type]
    return model


def test_a_model_starts_as_its_base_and_trains_its_adapters_alone() -> None:
    torch.manual_seed(0)
    before = Attending().eval()(TOKENS)
    model = adapted(rank=2, targets=("attention.*", "conv", "embedding"))
    assert torch.allclose(model(TOKENS), before, atol=1e-6)
    own = dict(model.named_parameters())
    assert torch.equal(model.get_submodule("conv").weight, own["conv.parametrizations.weight.original"])  # type: ignore[arg-type]
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(".lora_" in name for name in trained)
    assert len(trained) == 2 * 4  # in_proj, out_proj, convolution, and the shared embedding once
    model(TOKENS).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(trained)


def test_a_weight_is_its_base_plus_the_scaled_product() -> None:
    model = filled(adapted(rank=2, alpha=6.0))
    own = dict(model.named_parameters())
    for layer, weight in (("attention", "in_proj_weight"), ("attention.out_proj", "weight"), ("conv", "weight")):
        start = f"{layer}.parametrizations.{weight}."
        base, a, b = (own[start + name] for name in ("original", "0.lora_a", "0.lora_b"))
        expected = base + 3.0 * (b @ a).view_as(base)
        assert torch.allclose(getattr(model.get_submodule(layer), weight), expected, atol=1e-6)
        assert a.shape == (2, base[0].numel())
        assert float(a.detach().abs().max()) <= base[0].numel() ** -0.5
    x = torch.randn(3, 8)
    a, b = own[f"attention.out_proj{LORA}a"], own[f"attention.out_proj{LORA}b"]
    layer = model.get_submodule("attention.out_proj")
    base = own["attention.out_proj.parametrizations.weight.original"]
    beside = functional.linear(x, base, layer.bias) + 3.0 * functional.linear(functional.linear(x, a), b)  # type: ignore[arg-type]
    assert torch.allclose(layer(x), beside, atol=1e-5)


def test_a_shared_weight_has_one_adapter_in_all_its_layers() -> None:
    model = filled(adapted(rank=2, targets=("embedding",)))
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [f"embedding{LORA}a", f"embedding{LORA}b"]
    assert torch.equal(model.get_submodule("head").weight, model.get_submodule("embedding").weight)  # type: ignore[arg-type]


def test_the_merged_model_is_the_plain_one_and_costs_what_it_costs() -> None:
    model = filled(adapted(rank=2, targets=("embedding", "conv", "attention.*")))
    plain = models.merged(snapshot(model), model=model)
    assert plain.keys() == snapshot(Attending()).keys()
    other = Attending().eval()
    other.load_state_dict(dict(plain), strict=False)
    assert torch.allclose(other(TOKENS), model(TOKENS), atol=1e-5)
    assert count_macs(model, (5,), tokens=True) == count_macs(other, (5,), tokens=True)


def test_a_recurrent_layer_computes_its_weights_anew_in_every_pass() -> None:
    model = adapted(rank=2, targets=("gru",))
    assert torch.allclose(model(TOKENS), adapted(rank=2, targets=("conv",))(TOKENS), atol=1e-6)
    filled(model)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == [f"gru.parametrizations.weight_{w}_l0.0.lora_{x}" for w in ("ih", "hh") for x in "ab"]
    other = Attending().eval()
    other.load_state_dict(dict(models.merged(snapshot(model), model=model)), strict=False)
    assert torch.allclose(other(TOKENS), model(TOKENS), atol=1e-5)
    assert count_macs(model, (5,), tokens=True) == count_macs(other, (5,), tokens=True)
    model(TOKENS).sum().backward()
    assert all(model.get_parameter(name).grad.any() for name in trained)  # type: ignore[union-attr]
    again = copy.deepcopy(model).to(torch.float32)
    with torch.no_grad():
        again.get_parameter(trained[1]).zero_()
    assert not torch.allclose(again(TOKENS), model(TOKENS), atol=1e-3)
    moved = {trained[1]: torch.zeros_like(model.get_parameter(trained[1]))}
    assert torch.allclose(functional_call(model, moved, (TOKENS,)), again(TOKENS), atol=1e-6)


def test_every_machine_draws_the_same_and_another_seed_others() -> None:
    first, second = adapted(rank=2), adapted(rank=2)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    other = Attending()
    models.adapt(other, Adapter(rank=2), seed=4)
    assert not torch.equal(other.get_parameter(f"conv{LORA}a"), first.get_parameter(f"conv{LORA}a"))


def test_what_travels_in_full_has_no_adapter() -> None:
    tokens = Interface((5,), 11, vocabulary=11, each_token=True)
    model = models.build_for("transformer", tokens)
    names = models.adapt(model, Adapter(rank=4, train="head+norm"))
    assert names == [f"blocks.{n}.{layer}.weight" for n in range(2) for layer in ("qkv", "proj", "up", "down")]
    trained = {name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name}
    assert trained == {"head.weight", "head.bias", *models.SELECTORS["norm"](model, torch.Generator())}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "model.adapter.rank = 0: must be at least 1"),
        ({"kind": "dora"}, "model.adapter.kind = 'dora': allowed: lora"),
        ({"alpha": 0.0}, "model.adapter.alpha = 0.0: must be from 1e-06 to 1e+06"),
        ({"train": "all"}, "leaves nothing for adapters"),
        ({"train": "tail"}, "model.adapter.train = 'tail': 'tail' selects no parameter"),
        ({"rank": 9}, "'attention.in_proj_weight' has shape (24, 8), of rank at most 8"),
        ({"rank": 9, "targets": ("gru",)}, "'gru.weight_ih_l0' has shape (24, 8), of rank at most 8"),
        ({"targets": ("norm",)}, "'norm' selects no weight that can have an adapter; allowed: embedding.weight"),
        ({"targets": ("head",)}, "'head' selects no weight"),  # its name is that of the embedding, which comes first
        ({"targets": ("embedding",), "train": "embedding.weight"}, "'embedding' selects no weight"),
    ],
)
def test_what_cannot_be_adapted_is_one_line(options: dict[str, object], words: str) -> None:
    with pytest.raises(UserError) as caught:
        adapted(**options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_weight_that_another_module_uses_too_is_left_out() -> None:
    model = Attending()
    model.other = nn.Module()  # type: ignore[assignment]
    model.other.weight = model.conv.weight
    assert "conv.weight" not in models.adapters.adaptable(model)
