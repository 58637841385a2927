"""Small convolutional networks from federated-learning papers, with two 5x5 convolutions followed by linear layers.

Two unpadded 5x5 convolutions with 2x2 pooling need inputs of 28 pixels to produce a 4x4 map. For smaller images (8x8 digits), convolutions
are padded, so that only pooling shrinks the maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from fedloom.models.layers import norm2d, sequence

KERNEL = 5
SMALLEST_UNPADDED = 28


def _two_convolutions(
    input_shape: Sequence[int], n_channels: tuple[int, int], norm: str | None = None
) -> tuple[dict[str, nn.Module], int]:
    """Return two Conv5x5-norm-MaxPool2-ReLU blocks followed by a flatten layer, and the width of the flattened output.

    The papers apply ReLU before pooling. Both orders give bit-identical outputs and gradients, but this order applies ReLU to a quarter of
    the values.
    """
    first, height, width = input_shape
    padding = KERNEL // 2 if min(height, width) < SMALLEST_UNPADDED else 0
    loss = KERNEL - 1 - 2 * padding
    layers: dict[str, nn.Module] = {}
    for i, (n_in, n_out) in enumerate(pairwise((first, *n_channels)), start=1):
        layers[f"conv{i}"] = nn.Conv2d(n_in, n_out, KERNEL, padding=padding)
        if norm is not None:
            layers[f"norm{i}"] = norm2d(norm, n_out)
        layers[f"pool{i}"] = nn.MaxPool2d(2)
        layers[f"relu{i}"] = nn.ReLU()
        height, width = (height - loss) // 2, (width - loss) // 2
    layers["flatten"] = nn.Flatten()
    return layers, n_channels[-1] * height * width


def fedavg_cnn(input_shape: Sequence[int], width: int | None = None) -> nn.Sequential:
    """Return PFLlib's FedAvgCNN: conv 32, conv 64, fully connected 512 (or `width`), ReLU. It has 582,026 parameters on MNIST."""
    layers, flat = _two_convolutions(input_shape, (32, 64))
    return sequence({**layers, "linear": nn.Linear(flat, width or 512), "relu3": nn.ReLU()})


def fedmr_cnn(input_shape: Sequence[int], width: int | None = None) -> nn.Sequential:
    """Return FedMR's CNN: conv 6, conv 16, fully connected 120 and 84 (or `width`). It has 62,006 parameters on CIFAR-10."""
    layers, flat = _two_convolutions(input_shape, (6, 16))
    layers |= {"linear1": nn.Linear(flat, 120), "relu3": nn.ReLU()}
    return sequence({**layers, "linear2": nn.Linear(120, width or 84), "relu4": nn.ReLU()})


def fedrir_cnn(input_shape: Sequence[int], width: int | None = None, *, norm: str = "batch") -> nn.Sequential:
    """Return FedRIR's extractor: conv 32, conv 64, each normalised; linear 512 (or `width`), without a final activation.

    It has 577,088, 873,600 and 5,592,192 parameters for inputs of 1x28x28, 3x32x32 and 3x64x64.
    """
    layers, flat = _two_convolutions(input_shape, (32, 64), norm)
    return sequence({**layers, "linear": nn.Linear(flat, width or 512)})
