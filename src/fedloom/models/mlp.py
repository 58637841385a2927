"""Models that flatten their inputs and therefore accept inputs of any shape."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from fedloom.models.layers import projected


def mlp(input_shape: Sequence[int], width: int | None = None, *, hidden: int = 200) -> nn.Sequential:
    """Return a perceptron with one hidden layer (784-200-Y for 28x28). McMahan et al., AISTATS 2017, use two hidden layers."""
    linear = nn.Linear(math.prod(input_shape), hidden)
    return projected({"flatten": nn.Flatten(), "linear": linear, "relu": nn.ReLU()}, hidden, width)


def logistic(input_shape: Sequence[int], width: int | None = None) -> nn.Sequential:
    """Return the body of multinomial logistic regression, which only flattens (and projects, if a common width is set)."""
    return projected({"flatten": nn.Flatten()}, math.prod(input_shape), width)
