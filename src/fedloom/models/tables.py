"""Models for tables: columns of numbers (B, D), columns of categories (B, C), or both."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedloom.errors import ConfigError
from fedloom.inputs import InputSpec
from fedloom.models.layers import sequence

FIELDS = {"numbers": "number", "categories": "category"}
LARGEST = 50
"""Maximum width of an embedding."""


class TableBody(nn.Module):
    """Maps numbers (B, D) and categories (B, C) int64 to features (B, width).

    Categories are embedded, and the embeddings are concatenated with the numbers.

    Args:
        n_numbers: number D of columns of numbers; may be 0.
        levels: the number of levels of each categorical column. Ids are from 1 to that number; 0 stands for an unknown level, whose
            embedding is zero.
        hidden: the widths of the layers, each of which is followed by a ReLU.
    """

    def __init__(self, n_numbers: int, levels: Sequence[int], hidden: Sequence[int]) -> None:
        super().__init__()
        self.n_numbers = n_numbers
        self.embeddings = nn.ModuleList(
            nn.Embedding(n + 1, min(LARGEST, max(1, (n + 1) // 2)), padding_idx=0) for n in levels
        )
        n_in = n_numbers + sum(part.embedding_dim for part in self.embeddings if isinstance(part, nn.Embedding))
        layers: dict[str, nn.Module] = {}
        for i, n_out in enumerate(hidden, start=1):
            layers |= {f"linear{i}": nn.Linear(n_in, n_out), f"relu{i}": nn.ReLU()}
            n_in = n_out
        self.layers = sequence(layers)

    def forward(self, numbers: Tensor | None = None, categories: Tensor | None = None) -> Tensor:
        """Return features (B, width). If the table has no numbers, the categories may be the first argument."""
        if not self.n_numbers and categories is None:
            numbers, categories = None, numbers
        parts = [] if numbers is None else [numbers]
        if categories is not None:
            parts += [embedding(categories[:, i]) for i, embedding in enumerate(self.embeddings)]
        features: Tensor = self.layers(torch.cat(parts, 1))
        return features


def table_mlp(spec: InputSpec, width: int | None = None, *, hidden1: int = 200, hidden2: int = 100) -> nn.Module:
    """Return a perceptron on a table's numbers and on embeddings of its categories (Guo & Berkhahn, 2016).

    It has two hidden layers of `hidden1` and `hidden2` (or `width`) units. A column with n levels has an embedding with n + 1 rows, of
    which row 0 is for unknown levels, and with width (n + 1) / 2, but at most 50. Inputs are `numbers` (D,), `categories` (C,), or both.
    """
    _check(spec)
    numbers, categories = spec.of("number"), spec.of("category")
    n_numbers = math.prod(numbers.shape) if numbers else 0
    return TableBody(n_numbers, categories.levels if categories else (), (hidden1, width or hidden2))


def _check(spec: InputSpec) -> None:
    """Raise ConfigError unless the fields are those of a table."""
    fits = all(
        field.kind in FIELDS.values()
        and len(field.shape) == 1
        and (spec.is_single or FIELDS.get(field.name) == field.kind)
        for field in spec.fields
    )
    if not fits:
        raise ConfigError(
            f"model=table_mlp: needs numbers (D,), categories (C,), or both by these names, but the inputs are {spec}"
        )
