"""Models of token sequences: an LSTM and a small transformer, causal or as classifiers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def _scaled(units: int, width: float, multiple: int = 1) -> int:
    return max(1, round(units * width / multiple)) * multiple


class TokenLSTM(nn.Module):
    """Two-layer LSTM over embedded tokens (B, T): logits of the next token at every position, or of a class from the last.

    The stacked character-level LSTM of McMahan et al. (2017): embedding of 8, two layers of 256 units at width 2.
    """

    def __init__(self, vocabulary: int, num_classes: int, hidden: int, *, each_token: bool) -> None:
        super().__init__()
        self.each_token = each_token
        self.embedding = nn.Embedding(vocabulary, 8)
        self.lstm = nn.LSTM(8, hidden, num_layers=2, batch_first=True)
        self.head = nn.Linear(hidden, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.lstm(self.embedding(tokens))
        return self.head(states if self.each_token else states[:, -1])  # type: ignore[no-any-return]


class Block(nn.Module):
    """Pre-norm transformer block: self-attention, then a perceptron of four times the width (Xiong et al., 2020)."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))  # type: ignore[no-any-return]


class TokenTransformer(nn.Module):
    """Transformer over embedded tokens (B, T) with learned positions: causal logits of the next token at every position, or
    of a class from the mean over positions."""

    def __init__(
        self, vocabulary: int, length: int, num_classes: int, width: int, *, blocks: int, heads: int, each_token: bool
    ) -> None:
        super().__init__()
        self.each_token = each_token
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.zeros(length, width))
        self.blocks = nn.Sequential(*(Block(width, heads, causal=each_token) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.blocks(self.embedding(tokens) + self.positions[: tokens.shape[1]]))
        return self.head(x if self.each_token else x.mean(dim=1))  # type: ignore[no-any-return]


def lstm(
    *, num_classes: int, input_shape: tuple[int, ...], vocabulary: int, each_token: bool, width: float = 1.0
) -> nn.Module:
    """Two-layer LSTM of 128 units over tokens: next token at every position, or a class (McMahan et al., 2017)."""
    return TokenLSTM(vocabulary, num_classes, _scaled(128, width), each_token=each_token)


def transformer(
    *, num_classes: int, input_shape: tuple[int, ...], vocabulary: int, each_token: bool, width: float = 1.0
) -> nn.Module:
    """Two-block transformer of width 64 and 4 heads over tokens: causal, next token at every position, or a class."""
    (length,) = input_shape
    size = _scaled(64, width, multiple=4)
    return TokenTransformer(vocabulary, length, num_classes, size, blocks=2, heads=4, each_token=each_token)
