"""Models that see an input as one flat row of numbers: any input shape will do."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from fedloom.models.layers import projected


def mlp(input_shape: Sequence[int], width: int | None = None, *, hidden: int = 200) -> nn.Sequential:
    """One hidden layer (784-200-Y on 28x28): McMahan et al., AISTATS 2017, with one hidden layer instead of two."""
    linear = nn.Linear(math.prod(input_shape), hidden)
    return projected({"flatten": nn.Flatten(), "linear": linear, "relu": nn.ReLU()}, hidden, width)


def logistic(input_shape: Sequence[int], width: int | None = None) -> nn.Sequential:
    """Multinomial logistic regression: the body only flattens (and projects, where a common width is asked for)."""
    return projected({"flatten": nn.Flatten()}, math.prod(input_shape), width)
