"""A data set dealt to clients, and how its rows become inputs."""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from fedloom.data import augment as augmentation
from fedloom.data.augment import AUGMENTS
from fedloom.data.dataset import Dataset, validated
from fedloom.data.partition import Partition
from fedloom.data.schemes import Rows
from fedloom.errors import DataError, suggest
from fedloom.rng import Stream

log = logging.getLogger(__name__)

NORMALISES: Final = ("half", "standard", "none")
Batch = tuple[Tensor, Tensor]


class Federation:
    """Clients' examples, ready to train on; read-only.

    Pictures (uint8) are first scaled to [0, 1]; float features are taken as they are. Then `normalise`: "half" gives
    (x - 0.5) / 0.5, so pictures lie in [-1, 1] (protocol of FedRIR and PFLlib); "standard" subtracts the mean and
    divides by the standard deviation of each channel, both taken over the training rows of the whole pool (of each
    feature, where inputs are not pictures); "none" leaves them. Default: "half" for pictures, "none" for float
    features.

    `augment` names what `augmented` does to training batches: "none", "flip", "crop-flip" (crops after padding by 4
    pixels of black), "resized-crop-flip" (0.75 to 1 of the area). "resized-crop-flip-once" instead changes every row,
    training and test alike, once and for all here, from a fixed stream: FedRIR's protocol for Office-Caltech10 and
    DomainNet, as released.

    Raises DataError if labels are out of range or the partition names rows that the data set does not have.
    """

    def __init__(
        self, dataset: Dataset, partition: Partition, *, normalise: str | None = None, augment: str = "none"
    ) -> None:
        self.is_picture = dataset.images.dtype == torch.uint8
        chosen = normalise is not None
        normalise = normalise or ("half" if self.is_picture else "none")
        for key, value, known in (("normalise", normalise, NORMALISES), ("augment", augment, AUGMENTS)):
            if value not in known:
                raise DataError(f"data.{key}={value}: unknown{suggest(value, known)}")
        if augment != "none" and dataset.images.ndim != 4:
            raise DataError(f"data.augment={augment}: inputs of shape {dataset.input_shape} are not pictures")
        _check_fits(validated(dataset), partition)
        if augment == "resized-crop-flip-once":
            images = augmentation.once(dataset.images, Stream("augment once", dataset.name))
            dataset = replace(dataset, images=images)
        self.dataset, self.partition = dataset, partition
        self.normalise, self.augment = normalise, augment
        self._scale, self._shift = _scale_and_shift(dataset, normalise)
        if not chosen and not self.is_picture:
            _tell_of_scale(dataset)
        self._common: Batch | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For other processes: rows as arrays, which pickle's protocol 5 can hand over without copying them."""
        images, labels = self.dataset.images, self.dataset.labels
        rows = [t if t.dtype is torch.bfloat16 else t.numpy() for t in (images, labels)]  # NumPy has no bfloat16
        none = torch.empty(0)
        dataset = replace(self.dataset, images=none, labels=none)
        return {**self.__dict__, "dataset": dataset, "rows": rows, "_common": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        images, labels = (_readable(rows) for rows in state.pop("rows"))
        self.__dict__ |= {**state, "dataset": replace(state["dataset"], images=images, labels=labels)}

    @property
    def name(self) -> str:
        """Name of the data set."""
        return self.dataset.name

    @property
    def n_clients(self) -> int:
        """K."""
        return self.partition.n_clients

    @property
    def n_classes(self) -> int:
        """Y."""
        return self.dataset.n_classes

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input: (C, H, W) for pictures, (D,) for flat features."""
        return self.dataset.input_shape

    @property
    def normalisation(self) -> tuple[list[float], list[float]]:
        """Mean and deviation, per channel or feature: an input is (v - mean) / std, v a picture's pixel / 255, or the stored value."""
        std = 1 / (self._scale * (255 if self.is_picture else 1))
        mean = -self._shift * std
        per_channel = (value.reshape(-1).expand(self.input_shape[0]).tolist() for value in (mean, std))
        return next(per_channel), next(per_channel)

    def n_train(self, i: int) -> int:
        """How many training examples client `i` has."""
        return len(self.partition.train[i])

    def n_valid(self, i: int) -> int:
        """How many validation examples client `i` has."""
        return len(self.partition.valid[i])

    def n_test(self, i: int) -> int:
        """How many test examples of its own client `i` has."""
        return len(self.partition.test[i])

    def train(self, i: int) -> Batch:
        """Client `i`'s training examples: inputs (n, ...) in the default dtype, normalised, and labels (n,) int64."""
        return self.rows(self.partition.train[i])

    def train_of(self, clients: Sequence[int]) -> list[Batch]:
        """`train` of several clients, next to each other in memory."""
        x, y = self.rows(np.concatenate([self.partition.train[i] for i in clients]))
        sizes = [self.n_train(i) for i in clients]
        return list(zip(x.split_with_sizes(sizes), y.split_with_sizes(sizes), strict=True))

    def valid(self, i: int) -> Batch:
        """Client `i`'s validation examples, like `train`."""
        return self.rows(self.partition.valid[i])

    def test(self, i: int) -> Batch:
        """Client `i`'s own test examples, like `train`."""
        return self.rows(self.partition.test[i])

    def common(self) -> Batch:
        """The common test set, like `train`; kept after the first call, so it must not be written to."""
        if self._common is None or self._common[0].dtype != torch.get_default_dtype():
            self._common = self.rows(self.partition.common)
        return self._common

    def rows(self, index: Rows | Tensor) -> Batch:
        """Any rows of the pool by number, like `train`, as new contiguous tensors."""
        chosen = torch.as_tensor(index, dtype=torch.int64).to(self.dataset.images.device)
        dtype = torch.get_default_dtype()
        x = self.dataset.images.index_select(0, chosen).to(dtype)
        y = self.dataset.labels.index_select(0, chosen)
        # spread over a row: with few numbers for many, torch takes four times as long for the same bits
        shift, scale = (value.to(dtype).expand(self.input_shape).contiguous() for value in (self._shift, self._scale))
        return torch.addcmul(shift, x, scale), y

    def on(self, device: torch.device) -> Federation:
        """The same rows kept on a device, where `rows` then gathers and normalises them."""
        other = copy.copy(self)
        pool = self.dataset
        other.dataset = replace(pool, images=pool.images.to(device), labels=pool.labels.to(device))
        other._scale, other._shift, other._common = self._scale.to(device), self._shift.to(device), None
        return other

    @property
    def n_bytes(self) -> int:
        """What the rows take on a device: the pool as it is stored, and the common test set as inputs."""
        pool, wide = self.dataset, torch.get_default_dtype().itemsize
        common = len(self.partition.common) * math.prod(self.input_shape) * wide
        return sum(t.numel() * t.element_size() for t in (pool.images, pool.labels)) + common

    @property
    def augments(self) -> bool:
        """Whether `augmented` changes anything."""
        return self.augment in ("flip", "crop-flip", "resized-crop-flip")

    def pictures(self, x: Tensor) -> Tensor:
        """Inputs (n, ...) as `rows` gives them, back on the scale of pictures: black is 0 and white 1, values beyond are cut off."""
        unit = 255 if self.dataset.images.dtype == torch.uint8 else 1.0
        return ((x - self._shift.to(x.dtype)) / (self._scale.to(x.dtype) * unit)).clamp(0, 1)

    def augmented(self, x: Tensor, stream: Stream) -> Tensor:
        """A training batch (B, C, H, W) of normalised pictures, changed at random as `augment` says, on its device."""
        match self.augment:
            case "flip":
                return augmentation.flip(x, stream)
            case "crop-flip":
                return augmentation.flip(augmentation.crop(x, stream, black=self._black()), stream)
            case "resized-crop-flip":
                return augmentation.resized_crop_flip(x, stream)
        return x

    def pooled(self) -> Federation:
        """The upper reference: client 0 trains on all clients' training rows, the others on none."""
        none = np.empty(0, np.int64)
        together = np.sort(np.concatenate(self.partition.train))
        train = (together, *(none for _ in self.partition.train[1:]))
        other = copy.copy(self)
        other.partition = replace(self.partition, train=train)
        return other

    def _black(self) -> Tensor:
        return self._shift.reshape(-1).expand(self.input_shape[0])


def _readable(rows: Any) -> Tensor:
    """Rows as a tensor that shares the array's memory, which may be read-only: nobody writes to a data set."""
    if isinstance(rows, Tensor):
        return rows
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        return torch.from_numpy(rows)


def _check_fits(dataset: Dataset, partition: Partition) -> None:
    if not partition.n_clients == len(partition.valid) == len(partition.test) >= 1:
        raise DataError("partition: every client needs a training, a validation and a test split (maybe empty)")
    parts = [*partition.train, *partition.valid, *partition.test, partition.common]
    high = max((int(rows.max()) for rows in parts if len(rows)), default=0)
    low = min((int(rows.min()) for rows in parts if len(rows)), default=0)
    if low < 0 or high >= dataset.n_rows:
        raise DataError(
            f"partition: it names rows {low} to {high}, and data={dataset.name} has rows 0 to {dataset.n_rows - 1}"
        )


LARGE = 20.0
"""Inputs beyond it, left as they are by default, make ordinary learning rates diverge or stall."""


def _tell_of_scale(dataset: Dataset) -> None:
    """One line where large features will be used as they are, and nobody asked for that."""
    low, high = float(dataset.images.min()), float(dataset.images.max())
    if max(abs(low), abs(high)) > LARGE:
        log.warning(
            "data=%s: inputs run from %g to %g and are used as they are; data.normalise=standard scales them",
            dataset.name,
            low,
            high,
        )


def _scale_and_shift(dataset: Dataset, normalise: str) -> Batch:
    """Float64 a, b such that an input becomes a * stored + b; scalars, or shaped to broadcast over (n, ...)."""
    unit = 1 / 255 if dataset.images.dtype == torch.uint8 else 1.0
    if normalise == "standard":
        mean, std = _moments(dataset.images[: dataset.n_train])
        std = torch.where(std > 0, std, 1 / unit)
        return 1 / std, -mean / std
    scale, shift = (2 * unit, -1.0) if normalise == "half" else (unit, 0.0)
    return torch.tensor(scale, dtype=torch.float64), torch.tensor(shift, dtype=torch.float64)


def _moments(images: Tensor) -> Batch:
    """Mean and standard deviation in stored units, per channel of (N, C, H, W) or else per feature, in float64."""
    over = (0, 2, 3) if images.ndim == 4 else (0,)
    shape = (-1, 1, 1) if images.ndim == 4 else images.shape[1:]
    n = images.numel() // images.shape[1] if images.ndim == 4 else len(images)
    total = squares = torch.zeros((), dtype=torch.float64)
    for start in range(0, len(images), 256):  # float64 sums of bytes and of their squares are exact, in any order
        chunk = images[start : start + 256].double()
        total = total + chunk.sum(over)
        squares = squares + chunk.square().sum(over)
    mean = total / n
    return mean.reshape(shape), (squares / n - mean.square()).clamp(min=0).sqrt().reshape(shape)
