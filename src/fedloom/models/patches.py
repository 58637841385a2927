"""Models on image patches: a small vision transformer and an MLP-Mixer. Neither of them normalises over the batch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fedloom.errors import ConfigError
from fedloom.models.attention import Positions, TransformerBlock, perceptron
from fedloom.models.layers import projected


class Patches(nn.Module):
    """Maps images (B, C, H, W) to tokens (B, n_tokens, dim), by the same linear map for every patch, row by row.

    Images whose sides are not multiples of the patch size are padded with zeros at the right and at the bottom.
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


class MixerBlock(nn.Module):
    """A perceptron across the tokens, followed by one across the channels. Each is preceded by a LayerNorm and has a shortcut."""

    def __init__(self, n_tokens: int, dim: int) -> None:
        super().__init__()
        self.norm1, self.across_tokens = nn.LayerNorm(dim), perceptron(n_tokens, dim)
        self.norm2, self.across_channels = nn.LayerNorm(dim), perceptron(dim, 2 * dim)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.across_tokens(self.norm1(tokens).transpose(1, 2)).transpose(1, 2)
        mixed: Tensor = tokens + self.across_channels(self.norm2(tokens))
        return mixed


class TokenMean(nn.Module):
    """Maps tokens (B, T, dim) to their mean (B, dim)."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.mean(1)


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
    """Return a small vision transformer (Dosovitskiy et al., ICLR 2021) that uses the mean of the tokens instead of a class token.

    It has 0.14 M parameters.
    """
    if dim % heads:
        raise ConfigError(f"model vit_tiny: heads={heads} must divide dim={dim}")
    patches = Patches(input_shape, patch, dim)
    layers: dict[str, nn.Module] = {"patches": patches, "positions": Positions(patches.n_tokens, dim)}
    layers |= {f"block{i}": TransformerBlock(dim, heads) for i in range(1, depth + 1)}
    return _read(layers, dim, width)


def mixer(
    input_shape: Sequence[int], width: int | None = None, *, patch: int = 4, dim: int = 64, depth: int = 4
) -> nn.Sequential:
    """Return a small MLP-Mixer (Tolstikhin et al., NeurIPS 2021). It has 0.1 M parameters on CIFAR-10."""
    patches = Patches(input_shape, patch, dim)
    blocks = {f"block{i}": MixerBlock(patches.n_tokens, dim) for i in range(1, depth + 1)}
    return _read({"patches": patches, **blocks}, dim, width)
