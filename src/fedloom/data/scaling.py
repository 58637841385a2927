"""Normalisation: the scale and shift of each input, computed over all training examples or over each client's own."""

from __future__ import annotations

import logging
from typing import Final

import numpy as np
import torch
from torch import Tensor

from fedloom.data.dataset import Dataset
from fedloom.data.partition import Partition
from fedloom.data.preprocess import Scaling
from fedloom.errors import DataError
from fedloom.inputs import Field, named_tensors

log = logging.getLogger(__name__)

NORMALISES: Final = ("half", "standard", "own", "none")
USUAL: Final = {"picture": "half", "number": "none"}
LARGE: Final = 20.0
"""If unscaled inputs exceed this value, training at usual learning rates diverges or stalls."""


def scale_and_shift(dataset: Dataset, part: Field, normalise: str, partition: Partition) -> Scaling:
    """Return the scale and shift of a field of images or numbers.

    With "own", both have a first dimension of K + 1. Entry 0 is for examples that belong to no client, and is computed from the training
    examples of the whole pool. Entry 1 + i is computed from the training examples of client i.
    """
    unit = 1 / 255 if part.kind == "picture" else 1.0
    if normalise in ("standard", "own"):
        values = named_tensors(dataset.inputs)[part.name]
        whole = _standard(values[: dataset.n_train], unit)
        if normalise == "standard":
            return whole
        own = [_standard(values[torch.from_numpy(rows)], unit) if len(rows) else whole for rows in partition.train]
        scale, shift = (torch.stack([pair[k].expand(whole[0].shape) for pair in (whole, *own)]) for k in (0, 1))
        return scale, shift
    times, plus = (2 * unit, -1.0) if normalise == "half" else (unit, 0.0)
    return torch.tensor(times, dtype=torch.float64), torch.tensor(plus, dtype=torch.float64)


def owners_of(dataset: Dataset, partition: Partition) -> Tensor:
    """Return 1 + i for each example of client i, and 0 for examples that belong to no client, as a tensor (N,).

    Raise DataError if a test example belongs to two clients.
    """
    found = np.zeros(dataset.n_rows, np.int32)
    for i in range(partition.n_clients):
        rows = np.concatenate([partition.train[i], partition.valid[i], partition.test[i]])
        if (taken := rows[found[rows] > 0]).size:
            raise DataError(
                f"data.normalise=own: example {taken[0]} is in the test splits of two clients, so it is unclear whose "
                "statistics to use; set data.normalise=standard"
            )
        found[rows] = i + 1
    return torch.from_numpy(found)


def tell_of_scale(dataset: Dataset) -> None:
    """Warn if features are large but are not scaled by default."""
    for part in dataset.spec.fields:
        if part.kind != "number":
            continue
        values = named_tensors(dataset.inputs)[part.name]
        low, high = float(values.min()), float(values.max())
        if max(abs(low), abs(high)) > LARGE:
            log.warning(
                "data=%s: inputs range from %g to %g and are not scaled; to scale them, set data.normalise=standard",
                dataset.name,
                low,
                high,
            )


def _standard(values: Tensor, unit: float) -> Scaling:
    """Return the scale and shift that result in mean 0 and standard deviation 1. A constant becomes 0."""
    mean, std = _moments(values)
    std = torch.where(
        std > 1e-7 * mean.abs(), std, 1 / unit
    )  # through rounding, a constant c has a standard deviation of up to 1e-8 c
    return 1 / std, -mean / std


def _moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation in stored units and float64, per channel for images (N, C, H, W), otherwise per feature."""
    over = (0, 2, 3) if images.ndim == 4 else (0,)
    shape = (-1, 1, 1) if images.ndim == 4 else images.shape[1:]
    n = images.numel() // images.shape[1] if images.ndim == 4 else len(images)
    total = squares = torch.zeros((), dtype=torch.float64)
    for start in range(0, len(images), 256):  # float64 sums of bytes and of their squares are exact in any order
        chunk = images[start : start + 256].double()
        total = total + chunk.sum(over)
        squares = squares + chunk.square().sum(over)
    mean = total / n
    return mean.reshape(shape), (squares / n - mean.square()).clamp(min=0).sqrt().reshape(shape)
