"""Models of tokens: what they answer, that they do not see the future, and what counts and prunes knows of them."""

from __future__ import annotations

import pytest
import torch

from fl_sim.core.types import UserError
from fl_sim.gating import Gating
from fl_sim.models import Interface, build_for, prunable_names
from fl_sim.models.macs import layer_macs

TOKENS = Interface((12,), 7, vocabulary=7, each_token=True)


@pytest.mark.parametrize("name", ["lstm", "transformer"])
def test_a_position_answers_from_what_came_before_it(name: str) -> None:
    model = build_for(name, TOKENS, width=0.5).eval()
    tokens = torch.randint(7, (3, 12), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 7
    with torch.no_grad():
        one, other = model(tokens), model(changed)
    assert one.shape == (3, 12, 7)
    assert torch.allclose(one[:, :8], other[:, :8], atol=1e-6)
    assert not torch.allclose(one[:, 8:], other[:, 8:], atol=1e-6)


@pytest.mark.parametrize("name", ["lstm", "transformer"])
def test_as_a_classifier_it_answers_once(name: str) -> None:
    model = build_for(name, Interface((12,), 3, vocabulary=7), width=0.5).eval()
    assert model(torch.zeros(2, 12, dtype=torch.int64)).shape == (2, 3)


def test_macs_are_of_every_weight_at_every_position() -> None:
    macs = layer_macs(build_for("lstm", TOKENS, width=0.25), (12,), tokens=True)
    hidden = 32
    assert macs == {
        "lstm.weight_ih_l0": 12 * 4 * hidden * 8,
        "lstm.weight_hh_l0": 12 * 4 * hidden * hidden,
        "lstm.weight_ih_l1": 12 * 4 * hidden * hidden,
        "lstm.weight_hh_l1": 12 * 4 * hidden * hidden,
        "head.weight": 12 * hidden * 7,
    }
    width, attention = 32, layer_macs(build_for("transformer", TOKENS, width=0.5), (12,), tokens=True)
    assert attention["blocks.0.qkv.weight"] == 12 * 3 * width * width
    assert (
        attention["products of activations"] == 2 * 2 * 12 * 12 * width
    )  # 2 blocks; queries with keys, and with values
    assert "embedding.weight" not in attention


def test_embeddings_recurrent_weights_and_attention_are_prunable_and_norms_are_not() -> None:
    assert "embedding.weight" in prunable_names(build_for("lstm", TOKENS))
    assert "lstm.weight_hh_l1" in prunable_names(build_for("lstm", TOKENS))
    named = prunable_names(build_for("transformer", TOKENS))
    assert {"embedding.weight", "positions", "blocks.1.qkv.weight"} <= set(named)
    assert not [name for name in named if "norm" in name or "bias" in name]


@pytest.mark.parametrize(
    ("name", "interface", "words"),
    [
        ("mlp", TOKENS, "is for numbers, and inputs are tokens; allowed: lstm, transformer"),
        ("cnn", TOKENS, "is for numbers, and inputs are tokens"),
        ("lstm", Interface((30,), 2), "is for tokens, and inputs are numbers of shape (30,)"),
        ("resnet8", Interface((30,), 2), "is for images (channels, height, width), and inputs have shape (30,)"),
    ],
)
def test_a_model_of_other_inputs_is_refused_in_one_line(name: str, interface: Interface, words: str) -> None:
    with pytest.raises(UserError, match=r"model.name") as caught:
        build_for(name, interface)
    assert words in str(caught.value)


def test_a_width_that_a_model_does_not_have_is_refused() -> None:
    with pytest.raises(UserError, match="'linear' has one width"):
        build_for("linear", Interface((30,), 2), width=2.0)


def test_gates_need_convolutions() -> None:
    with pytest.raises(UserError):
        Gating().wrap(build_for("lstm", TOKENS), seed=0)
