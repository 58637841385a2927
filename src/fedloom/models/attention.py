"""Layers of transformers for tokens (B, T, dim): positions, self-attention and blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedloom.models.layers import sequence


class Positions(nn.Module):
    """Adds a learnt vector to every token. Initial values are normal with standard deviation 0.02, as in ViT."""

    def __init__(self, n_tokens: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_tokens, dim))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.weight[: tokens.shape[1]]


class Attention(nn.Module):
    """Multi-head self-attention over tokens (B, T, dim), computed as plain matrix products.

    nn.MultiheadAttention is not used: without gradients, its fused kernel runs one client at a time under torch.func.vmap.
    """

    def __init__(self, dim: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.scale = (dim // n_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return tokens (B, T, dim). `mask` (T, T) or (B, 1, T, T) is true if a token (row) may attend to a token (column)."""
        heads = self.qkv(tokens).unflatten(-1, (3, self.n_heads, -1))  # (B, T, 3, heads, dim / heads)
        query, key, value = (part.transpose(1, 2) for part in heads.unbind(2))
        scores = self.scale * query @ key.transpose(-1, -2)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        mixed: Tensor = self.out((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
        return mixed


class TransformerBlock(nn.Module):
    """Attention followed by a perceptron on every token. Each of the two is preceded by a LayerNorm and has a shortcut.

    Args:
        hidden: the width of the perceptron; default: 2 dim.
        dropout: probability of dropout after the attention and after the perceptron. With 0, there are no dropout layers.
    """

    def __init__(self, dim: int, n_heads: int, hidden: int | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim), Attention(dim, n_heads)
        self.norm2, self.perceptron = nn.LayerNorm(dim), perceptron(dim, hidden or 2 * dim)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        tokens = tokens + self.dropout(self.attention(self.norm1(tokens), mask))
        mixed: Tensor = tokens + self.dropout(self.perceptron(self.norm2(tokens)))
        return mixed


def perceptron(n: int, hidden: int) -> nn.Sequential:
    """Return a perceptron with one hidden layer, and with as many outputs as inputs."""
    return sequence({"linear1": nn.Linear(n, hidden), "gelu": nn.GELU(), "linear2": nn.Linear(hidden, n)})
