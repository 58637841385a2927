"""VGG-16 for small images (Simonyan & Zisserman, ICLR 2015), with normalisation after every convolution."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fedloom.models.layers import check_dropout, norm2d, sequence

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


def vgg16(
    input_shape: Sequence[int], width: int | None = None, *, norm: str = "batch", dropout: float = 0.5
) -> nn.Sequential:
    """Return VGG-16 with two fully connected layers of 4096 units (the second: `width`), as in FedMR. It has 33.6 M parameters on
    CIFAR-10.

    A pooling layer that would leave no pixel is skipped (8x8 inputs are pooled three times), and the remaining map is averaged to one
    pixel. `dropout=0` omits the dropout layers, which cannot be vectorised over clients.
    """
    check_dropout(dropout)
    n_in, side = input_shape[0], min(input_shape[1:])
    layers: dict[str, nn.Module] = {}
    for i, stage in enumerate(STAGES, start=1):
        for j, n_out in enumerate(stage, start=1):
            layers[f"conv{i}_{j}"] = nn.Conv2d(n_in, n_out, 3, padding=1)
            layers[f"norm{i}_{j}"] = norm2d(norm, n_out)
            layers[f"relu{i}_{j}"] = nn.ReLU()
            n_in = n_out
        if side > 1:
            layers[f"pool{i}"] = nn.MaxPool2d(2)
            side //= 2
    layers |= {"average": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    for i, (n_in, n_out) in enumerate([(512, 4096), (4096, width or 4096)], start=1):
        layers |= {f"linear{i}": nn.Linear(n_in, n_out), f"relu{i}": nn.ReLU()}
        if dropout:
            layers[f"dropout{i}"] = nn.Dropout(dropout)
    return sequence(layers)
