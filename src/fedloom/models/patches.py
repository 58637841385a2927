"""Models on image patches: a small vision transformer and an MLP-Mixer. Neither normalises over the batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedloom.errors import ConfigError
from fedloom.models.layers import projected, sequence


class Patches(nn.Module):
    """Maps images (B, C, H, W) to tokens (B, n_tokens, dim): the same linear map for every patch, row by row.

    Images whose sides are not multiples of the patch size are padded with zeros at the right and the bottom.
    """

    def __init__(self, input_shape: Sequence[int], patch: int, dim: int) -> None:
        super().__init__()
        n_channels, height, width = input_shape
        self.fill = nn.ZeroPad2d((0, -width % patch, 0, -height % patch))
        self.conv = nn.Conv2d(n_channels, dim, patch, stride=patch)
        self.n_tokens = -(-height // patch) * -(-width // patch)

    def forward(self, x: Tensor) -> Tensor:
        maps: Tensor = self.conv(self.fill(x))
        return maps.flatten(2).transpose(1, 2)


class Positions(nn.Module):
    """Adds a learnt vector to every token; initial values are normal with standard deviation 0.02, as in ViT."""

    def __init__(self, n_tokens: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_tokens, dim))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.weight


class Attention(nn.Module):
    """Multi-head self-attention over tokens (B, T, dim), as plain matrix products.

    Without gradients, nn.MultiheadAttention uses a fused kernel that torch.func.vmap runs one client at a time.
    """

    def __init__(self, dim: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.scale = (dim // n_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        heads = self.qkv(tokens).unflatten(-1, (3, self.n_heads, -1))  # (B, T, 3, heads, dim / heads)
        query, key, value = (part.transpose(1, 2) for part in heads.unbind(2))
        weights = (self.scale * query @ key.transpose(-1, -2)).softmax(-1)
        mixed: Tensor = self.out((weights @ value).transpose(1, 2).flatten(2))
        return mixed


class TransformerBlock(nn.Module):
    """Attention, then a perceptron on every token; each is preceded by a LayerNorm and has a shortcut."""

    def __init__(self, dim: int, n_heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim), Attention(dim, n_heads)
        self.norm2, self.perceptron = nn.LayerNorm(dim), _perceptron(dim, 2 * dim)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(self.norm1(tokens))
        mixed: Tensor = tokens + self.perceptron(self.norm2(tokens))
        return mixed


class MixerBlock(nn.Module):
    """A perceptron across the tokens, then one across the channels; each is preceded by a LayerNorm and has a shortcut."""

    def __init__(self, n_tokens: int, dim: int) -> None:
        super().__init__()
        self.norm1, self.across_tokens = nn.LayerNorm(dim), _perceptron(n_tokens, dim)
        self.norm2, self.across_channels = nn.LayerNorm(dim), _perceptron(dim, 2 * dim)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.across_tokens(self.norm1(tokens).transpose(1, 2)).transpose(1, 2)
        mixed: Tensor = tokens + self.across_channels(self.norm2(tokens))
        return mixed


class TokenMean(nn.Module):
    """Maps tokens (B, T, dim) to their mean (B, dim)."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.mean(1)


def _perceptron(n: int, hidden: int) -> nn.Sequential:
    return sequence({"linear1": nn.Linear(n, hidden), "gelu": nn.GELU(), "linear2": nn.Linear(hidden, n)})


def _read(layers: dict[str, nn.Module], dim: int, width: int | None) -> nn.Sequential:
    return projected({**layers, "norm": nn.LayerNorm(dim), "mean": TokenMean()}, dim, width)


def vit_tiny(
    input_shape: Sequence[int],
    width: int | None = None,
    *,
    patch: int = 4,
    dim: int = 64,
    depth: int = 4,
    heads: int = 4,
) -> nn.Sequential:
    """Return a small vision transformer (Dosovitskiy et al., ICLR 2021; mean of tokens, no class token): 0.14 M parameters."""
    if dim % heads:
        raise ConfigError(f"model vit_tiny: heads={heads} must divide dim={dim}")
    patches = Patches(input_shape, patch, dim)
    layers: dict[str, nn.Module] = {"patches": patches, "positions": Positions(patches.n_tokens, dim)}
    layers |= {f"block{i}": TransformerBlock(dim, heads) for i in range(1, depth + 1)}
    return _read(layers, dim, width)


def mixer(
    input_shape: Sequence[int], width: int | None = None, *, patch: int = 4, dim: int = 64, depth: int = 4
) -> nn.Sequential:
    """Return a small MLP-Mixer (Tolstikhin et al., NeurIPS 2021): 0.1 M parameters on CIFAR-10."""
    patches = Patches(input_shape, patch, dim)
    blocks = {f"block{i}": MixerBlock(patches.n_tokens, dim) for i in range(1, depth + 1)}
    return _read({"patches": patches, **blocks}, dim, width)
