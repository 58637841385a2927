"""FedVTC's generator psi, which maps features to images in [-1, 1] by transposed convolutions.

The source is Niu, Dong, Qin: FedVTC, ICLR 2026 (arXiv 2508.01669). Its sizes are not public; the two forms here are reconstructions.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from fedloom.errors import ConfigError
from fedloom.models.layers import group_norm, sequence

Size = tuple[int, int]


class VtcDecoder(nn.Module):
    """Maps features (B, p) to images (B, C, H, W) in [-1, 1], for any H and W of at least 4.

    Every step except the first doubles the map (kernel 4, stride 2, padding 1) and, for odd sizes, adds one pixel.

    Args:
        features: the number p of features.
        output_shape: the shape (C, H, W) of an image.
        form: "linear" starts with Linear(p, 64 H/4 W/4) and has two steps with 64 - 32 - C channels. "conv" has only convolutions: from a
            1x1 seed with p channels to at most 4x4, followed by the steps needed to reach (H, W).
    """

    def __init__(self, features: int, output_shape: Sequence[int], form: str = "linear") -> None:
        super().__init__()
        if len(output_shape) != 3 or min(output_shape[1:]) < 4:
            raise ConfigError(f"VtcDecoder outputs images (C, H, W) of at least 4x4 pixels, not {tuple(output_shape)}")
        n_channels, height, width = output_shape
        if form == "linear":
            sizes = _halvings((height, width), 2)
            n_maps = [64, 32, n_channels]
            seed = _linear_seed(features, n_maps[0], sizes[0])
        elif form == "conv":
            sizes = _halvings((height, width))
            n_maps = [*(min(128, 32 << i) for i in reversed(range(len(sizes) - 1))), n_channels]
            seed = _conv_seed(features, n_maps[0], sizes[0])
        else:
            raise ConfigError(f"VtcDecoder form={form!r} is unknown; known: conv, linear")
        self.layers = sequence({**seed, **_doublings(sizes, n_maps), "tanh": nn.Tanh()})

    def forward(self, features: Tensor) -> Tensor:
        images: Tensor = self.layers(features)
        return images


class Spread(nn.Module):
    """The logarithm of the factor (p,) that multiplies a client's empirical standard deviations; initially 0."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.log_factor = nn.Parameter(torch.zeros(width))

    def forward(self) -> Tensor:
        return self.log_factor.exp()


def _halvings(size: Size, n: int | None = None) -> list[Size]:
    """Return sizes from small to `size`, each half of the next and rounded down. Halve `n` times, or until no side exceeds 4."""
    sizes = [size]
    while len(sizes) <= n if n is not None else max(sizes[0]) > 4 and min(sizes[0]) > 1:
        height, width = sizes[0]
        sizes.insert(0, (height // 2, width // 2))
    return sizes


def _linear_seed(features: int, n_maps: int, size: Size) -> dict[str, nn.Module]:
    height, width = size
    linear = nn.Linear(features, n_maps * height * width)
    return {"linear": linear, "unflatten": nn.Unflatten(1, (n_maps, height, width))}


def _conv_seed(features: int, n_maps: int, size: Size) -> dict[str, nn.Module]:
    return {"unflatten": nn.Unflatten(1, (features, 1, 1)), "conv0": nn.ConvTranspose2d(features, n_maps, size)}


def _doublings(sizes: list[Size], n_maps: list[int]) -> dict[str, nn.Module]:
    """Return GroupNorm - LeakyReLU - ConvT for every size except the first."""
    layers: dict[str, nn.Module] = {}
    for i, ((height, width), (n_in, n_out)) in enumerate(zip(sizes[1:], pairwise(n_maps), strict=True), start=1):
        extra = (height % 2, width % 2)
        layers[f"norm{i}"] = group_norm(n_in)
        layers[f"relu{i}"] = nn.LeakyReLU()
        layers[f"conv{i}"] = nn.ConvTranspose2d(n_in, n_out, 4, stride=2, padding=1, output_padding=extra)
    return layers
