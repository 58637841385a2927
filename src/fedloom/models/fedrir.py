"""FedRIR's image generator and information distillation module. Its extractor is in `cnn.py`.

The source is Huang, Shao, Yang, Lu, Zhang: FedRIR, WWW 2025 (arXiv 2502.00859). Sizes are as in the released code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from fedloom.errors import ConfigError
from fedloom.models.layers import sequence

SMALLEST_UNPADDED = 28


class Axis(NamedTuple):
    """Parameters with which two 5x5 transposed convolutions of stride 2 output exactly the required height or width."""

    seed: int
    padding: int
    extra: tuple[int, int]  # output padding of the first and the second convolution


def _axis(side: int) -> Axis:
    """Return the released form (side = 4 seed + 12, no padding) if it fits.

    Otherwise return a padded form, in which each step maps a side s to 2 s or 2 s - 1.
    """
    if side >= SMALLEST_UNPADDED and side % 4 == 0:
        return Axis((side - 12) // 4, 0, (1, 1))
    middle = (side + 1) // 2
    return Axis((middle + 1) // 2, 2, (1 - middle % 2, 1 - side % 2))


class ImageGenerator(nn.Module):
    """Maps features (B, features) to images (B, C, H, W): linear, 64 maps, ConvT 32, ReLU, ConvT C, without an output activation.

    The seeds, which are the first maps, have the sizes 4x4, 5x5 and 13x13 for sides of 28, 32 and 64 pixels (577,345, 874,435 and
    5,602,243 parameters at 512 features with 1, 3 and 3 channels). For sides that two unpadded steps cannot output, or that are smaller
    than 28 pixels, padding is added, and the side of the seed is a quarter of the image's side.
    """

    def __init__(self, features: int, output_shape: Sequence[int]) -> None:
        super().__init__()
        if len(output_shape) != 3:
            raise ConfigError(f"ImageGenerator outputs images (C, H, W), not {tuple(output_shape)}")
        n_channels, *sides = output_shape
        rows, columns = (_axis(side) for side in sides)
        padding = (rows.padding, columns.padding)
        first, second = zip(rows.extra, columns.extra, strict=True)
        self.linear = nn.Linear(features, 64 * rows.seed * columns.seed)
        self.seed = nn.Unflatten(1, (64, rows.seed, columns.seed))
        self.conv1 = nn.ConvTranspose2d(64, 32, 5, stride=2, padding=padding, output_padding=first)
        self.relu = nn.ReLU()
        self.conv2 = nn.ConvTranspose2d(32, n_channels, 5, stride=2, padding=padding, output_padding=second)

    def forward(self, features: Tensor) -> Tensor:
        maps: Tensor = self.seed(self.linear(features))
        images: Tensor = self.conv2(self.relu(self.conv1(maps)))
        return images


class InformationDistillation(nn.Module):
    """The distribution q(f_cs | f_g), which maps global features (B, d) to the mean and log-variance (B, d) of client-specific features.

    It consists of two perceptrons d-hidden-d. The one for the log-variance ends in Tanh, so the variance stays within [1/e, e].
    """

    def __init__(self, d: int, hidden: int = 128) -> None:
        super().__init__()
        self.mean = _perceptron(d, hidden)
        self.log_variance = nn.Sequential(*_perceptron(d, hidden), nn.Tanh())

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.mean(features), self.log_variance(features)


def _perceptron(d: int, hidden: int) -> nn.Sequential:
    return sequence({"linear1": nn.Linear(d, hidden), "relu": nn.ReLU(), "linear2": nn.Linear(hidden, d)})
