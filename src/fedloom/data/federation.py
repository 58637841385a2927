"""A data set split across clients, and the conversion of its examples to model inputs."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedloom.data import augment as augmentation
from fedloom.data.augment import AUGMENTS
from fedloom.data.dataset import Dataset, validated
from fedloom.data.partition import Partition
from fedloom.data.preprocess import Preprocess, Scaling, given_scaling, model_input
from fedloom.data.scaling import NORMALISES, USUAL, owners_of, scale_and_shift, tell_of_scale
from fedloom.data.schemes import Rows
from fedloom.errors import DataError, suggest
from fedloom.inputs import Field, Inputs, InputSpec, map_inputs, named_tensors, tensors_of
from fedloom.objectives import Objective
from fedloom.rng import Stream

Batch = tuple[Inputs, Tensor]


class Federation:
    """The examples of all clients as model inputs. A federation is read-only.

    Images (uint8) are first scaled to [0, 1]; float features are used as they are. Then `normalise` is applied to images and floats.
    Tokens and categories are never scaled. "half" computes (x - 0.5) / 0.5, which maps images to [-1, 1] (the protocol of FedRIR and
    PFLlib). "standard" subtracts the mean and divides by the standard deviation of each channel of images, or of each feature of other
    inputs; both are computed over the training examples of the whole pool. "own" does the same with each client's own training examples;
    test examples of the common test set that belong to no client are scaled as with "standard". "none" changes nothing. The default is
    that of the data set, or else "half" for images and "none" for float features.

    `augment` selects how `augmented` changes training batches: "none", "flip", "crop-flip" (crops after padding with 4 black pixels) or
    "resized-crop-flip" (crops of 0.75 to 1 of the area). "resized-crop-flip-once" changes every training and test example once, when the
    federation is created, with a fixed stream. This is the protocol of FedRIR's released code for Office-Caltech10 and DomainNet.

    Raise DataError if labels are out of range, or if the partition contains example numbers that the data set lacks.
    """

    has_examples = True  # whether the examples themselves can be read
    counts_are_claims = False  # whether clients report the numbers of examples, which cannot be checked

    def __init__(
        self, dataset: Dataset, partition: Partition, *, normalise: str | None = None, augment: str = "none"
    ) -> None:
        self.is_picture = "picture" in dataset.spec.kinds
        chosen, is_given = normalise is not None, dataset.is_scaled and normalise != "own"
        if is_given and chosen:
            raise DataError(
                f"data.normalise={normalise}: data={dataset.name} has its scaling from data.preprocess; remove data.normalise, or use own"
            )
        normalise = normalise or dataset.normalise or ("half" if self.is_picture else "none")
        for key, value, known in (("normalise", normalise, NORMALISES), ("augment", augment, AUGMENTS)):
            if value not in known:
                raise DataError(f"data.{key}={value}: unknown{suggest(value, known)}")
        if augment != "none" and not (dataset.spec.is_single and len(dataset.input_shape) == 3):
            raise DataError(
                f"data.augment={augment}: needs images, but inputs are {dataset.spec}; use data.augment=none"
            )
        if chosen and normalise != "none" and not dataset.spec.kinds & {"picture", "number"}:
            raise DataError(f"data.normalise={normalise}: applies to images and numbers, but inputs are {dataset.spec}")
        if normalise == "own" and augment == "crop-flip":
            raise DataError(
                "data.augment=crop-flip: pads with black, which data.normalise=own makes different for every client; use "
                "resized-crop-flip"
            )
        _check_fits(validated(dataset), partition)
        if augment == "resized-crop-flip-once":
            images, changed = (
                None if pool is None else augmentation.once(pool, Stream("augment once", dataset.name))
                for pool in (dataset.images, dataset.changed)
            )
            assert images is not None
            dataset = replace(dataset, inputs=images, changed=changed)
        self.dataset, self.partition = dataset, partition
        self.normalise, self.augment = normalise, augment
        usual = not (chosen or is_given or dataset.normalise)  # every field then has the default for its kind
        self._scaling: dict[str, Scaling] = (
            given_scaling(dataset.parts)
            if is_given
            else {
                f.name: scale_and_shift(dataset, f, USUAL[f.kind] if usual else normalise, partition)
                for f in dataset.spec.fields
                if not f.is_integer
            }
        )
        self._owner_of = owners_of(dataset, partition) if normalise == "own" else None
        if usual:
            tell_of_scale(dataset)
        self._common: Batch | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for other processes. Examples are arrays, which pickle protocol 5 can share without a copy."""
        pool = self.dataset
        rows = {
            name: t if t.dtype is torch.bfloat16 else t.numpy() for name, t in named_tensors(pool.inputs).items()
        }  # NumPy has no bfloat16
        none = torch.empty(0)
        dataset = replace(pool, inputs=none, targets=none)
        return {**self.__dict__, "dataset": dataset, "rows": rows, "targets": pool.targets.numpy(), "_common": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        fields = {name: _readable(rows) for name, rows in state.pop("rows").items()}
        inputs = fields[""] if list(fields) == [""] else fields
        dataset = replace(state["dataset"], inputs=inputs, targets=_readable(state.pop("targets")))
        self.__dict__ |= {**state, "dataset": dataset}

    @property
    def name(self) -> str:
        """Name of the data set."""
        return self.dataset.name

    @property
    def n_clients(self) -> int:
        """Number of clients K."""
        return self.partition.n_clients

    @property
    def n_classes(self) -> int:
        """Number of classes, Y. Raise DataError if the task has no classes."""
        return self.dataset.n_classes

    @property
    def objective(self) -> Objective:
        """The learning task."""
        return self.dataset.objective

    @property
    def spec(self) -> InputSpec:
        """The description of the inputs."""
        return self.dataset.spec

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example's input, such as (C, H, W) for images or (D,) for flat features.

        If there are several inputs, that of the first.
        """
        return self.dataset.input_shape

    def normalisation(self, client: int) -> dict[str, tuple[list[float], list[float]]]:
        """Return the mean and standard deviation of each image or number field, per channel or feature, by name ("" for a single tensor).

        An input of the client is (v - mean) / std, where v is pixel / 255 for images, and the stored value otherwise.
        """
        found = {}
        for part in self.spec.fields:
            if part.name in self._scaling:
                scale, shift = self._scaling_of(part, client)
                std = 1 / (scale * (255 if part.kind == "picture" else 1))
                mean = -shift * std
                width = part.shape[0] if len(part.shape) == 3 else math.prod(part.shape)
                shown = (value.reshape(-1).expand(width).tolist() for value in (mean, std))
                found[part.name] = (next(shown), next(shown))
        return found

    def example(self) -> Inputs:
        """Return two inputs, for dry runs: the first two training examples of the first client that has any."""
        rows = next((rows for rows in self.partition.train if len(rows)), np.arange(1))
        return self.rows(np.resize(rows, 2))[0]

    def n_train(self, i: int) -> int:
        """Return the number of training examples of client `i`."""
        return len(self.partition.train[i])

    def n_valid(self, i: int) -> int:
        """Return the number of validation examples of client `i`."""
        return len(self.partition.valid[i])

    def n_test(self, i: int) -> int:
        """Return the number of examples in client `i`'s own test split."""
        return len(self.partition.test[i])

    def train(self, i: int) -> Batch:
        """Return client `i`'s training examples as inputs (n, ...) and targets (n, ...).

        Images and numbers are normalised and have the default dtype; tokens and categories are int64.
        """
        return self.rows(self.partition.train[i])

    def train_targets(self, i: int) -> Tensor:
        """Return the targets (n, ...) of client `i`'s training examples."""
        targets = self.dataset.targets
        return targets.index_select(0, torch.as_tensor(self.partition.train[i], dtype=torch.int64).to(targets.device))

    def train_of(self, clients: Sequence[int]) -> list[Batch]:
        """Return the result of `train` for several clients, contiguous in memory."""
        x, y = self.rows(np.concatenate([self.partition.train[i] for i in clients]))
        sizes = [self.n_train(i) for i in clients]
        parts = split_inputs(x, sizes)
        return list(zip(parts, y.split_with_sizes(sizes), strict=True))

    def valid(self, i: int) -> Batch:
        """Return client `i`'s validation examples, in the form of `train`."""
        return self.rows(self.partition.valid[i])

    def test(self, i: int) -> Batch:
        """Return client `i`'s own test examples, in the form of `train`."""
        return self.rows(self.partition.test[i])

    def common(self) -> Batch:
        """Return the common test set, in the form of `train`. It is cached, so do not modify it in place."""
        wide = torch.get_default_dtype()
        if self._common is None or any(t.dtype != wide for t in tensors_of(self._common[0]) if t.is_floating_point()):
            self._common = self.rows(self.partition.common)
        return self._common

    def rows(self, index: Rows | Tensor) -> Batch:
        """Return the examples with the given numbers, in the form of `train`, as new contiguous tensors."""
        pool = self.dataset
        chosen = torch.as_tensor(index, dtype=torch.int64).to(pool.targets.device)
        owners = None if self._owner_of is None else self._owner_of.index_select(0, chosen)
        if isinstance(pool.inputs, Tensor):
            x: Inputs = self._scaled(pool.spec.fields[0], pool.inputs.index_select(0, chosen), owners)
        else:
            fields = pool.spec.fields
            x = {
                part.name: self._scaled(part, pool.inputs[part.name].index_select(0, chosen), owners) for part in fields
            }
        return x, pool.targets.index_select(0, chosen)

    @property
    def preprocess(self) -> Preprocess:
        """The conversion of raw values to model inputs."""
        return self.dataset.preprocess(self._scaling, 0 if self._owner_of is None else self.n_clients + 1)

    def _scaled(self, part: Field, values: Tensor, owners: Tensor | None) -> Tensor:
        """Return a stored input tensor as a model input. `owners` (n,) has the form of `owners_of`."""
        if owners is None or part.is_integer:
            return model_input(part, values, self._scaling.get(part.name))
        dtype = torch.get_default_dtype()
        scale, shift = (value.index_select(0, owners).to(dtype) for value in self._scaling[part.name])
        return torch.addcmul(shift, values.to(dtype), scale)

    def _scaling_of(self, part: Field, client: int) -> tuple[Tensor, Tensor]:
        """Return the scale and shift of a client's inputs."""
        scale, shift = self._scaling[part.name]
        return (scale, shift) if self._owner_of is None else (scale[client + 1], shift[client + 1])

    @property
    def changed(self) -> Federation | None:
        """The same federation with another value of the client factor for each example, or None if the data have no known factor."""
        if self.dataset.changed is None:
            return None
        other = copy.copy(self)
        other.dataset, other._common = replace(self.dataset, inputs=self.dataset.changed, changed=None), None
        return other

    def on(self, device: torch.device) -> Federation:
        """Return a federation whose examples are stored and normalised on a device."""
        other = copy.copy(self)
        pool = self.dataset
        inputs = map_inputs(lambda t: t.to(device), pool.inputs)
        changed = None if pool.changed is None else pool.changed.to(device)
        other.dataset = replace(pool, inputs=inputs, targets=pool.targets.to(device), changed=changed)
        other._scaling = {name: (a.to(device), b.to(device)) for name, (a, b) in self._scaling.items()}
        other._owner_of = None if self._owner_of is None else self._owner_of.to(device)
        other._common = None
        return other

    @property
    def n_bytes(self) -> int:
        """Memory in bytes that `on` needs for the stored pool and for the common test set as inputs."""
        pool, wide = self.dataset, torch.get_default_dtype().itemsize
        example = sum(math.prod(part.shape) * (8 if part.is_integer else wide) for part in pool.spec.fields)
        stored = sum(
            t.numel() * t.element_size()
            for t in (*tensors_of(pool.inputs), pool.targets, pool.changed)
            if t is not None
        )
        return stored + len(self.partition.common) * example

    @property
    def augments(self) -> bool:
        """Whether `augmented` changes anything."""
        return self.augment in ("flip", "crop-flip", "resized-crop-flip")

    def pictures(self, x: Tensor, client: int) -> Tensor:
        """Return a client's inputs (n, ...) from `rows` as images again, where 0 is black and 1 is white.

        Values outside [0, 1] are clipped.
        """
        unit = 255 if self.is_picture else 1.0
        scale, shift = self._scaling_of(self.spec.fields[0], client)
        return ((x - shift.to(x.dtype)) / (scale.to(x.dtype) * unit)).clamp(0, 1)

    def augmented(self, x: Tensor, stream: Stream) -> Tensor:
        """Augment a training batch (B, C, H, W) of normalised images at random, according to `augment`, on the device of the batch."""
        match self.augment:
            case "flip":
                return augmentation.flip(x, stream)
            case "crop-flip":
                return augmentation.flip(augmentation.crop(x, stream, black=self._black()), stream)
            case "resized-crop-flip":
                return augmentation.resized_crop_flip(x, stream)
        return x

    def pooled(self) -> Federation:
        """Return the federation for centralised training: client 0 has the training examples of all clients, and the others have none."""
        none = np.empty(0, np.int64)
        together = np.sort(np.concatenate(self.partition.train))
        train = (together, *(none for _ in self.partition.train[1:]))
        other = copy.copy(self)
        other.partition = replace(self.partition, train=train)
        return other

    def _black(self) -> Tensor:
        return self._scaling[""][1].reshape(-1).expand(self.input_shape[0])


def split_inputs(x: Inputs, sizes: Sequence[int]) -> list[Inputs]:
    """Split the inputs of concatenated examples into parts of the given sizes."""
    if isinstance(x, Tensor):
        return list(x.split_with_sizes(list(sizes)))
    parts = {name: value.split_with_sizes(list(sizes)) for name, value in x.items()}
    return [{name: values[k] for name, values in parts.items()} for k in range(len(sizes))]


def _readable(rows: Any) -> Tensor:
    """Return a tensor that shares the array's memory. The memory may be read-only, because data sets are never modified."""
    if isinstance(rows, Tensor):
        return rows
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        return torch.from_numpy(rows)


def _check_fits(dataset: Dataset, partition: Partition) -> None:
    if not partition.n_clients == len(partition.valid) == len(partition.test) >= 1:
        raise DataError("partition: every client needs a training, a validation and a test split; a split may be empty")
    parts = [*partition.train, *partition.valid, *partition.test, partition.common]
    high = max((int(rows.max()) for rows in parts if len(rows)), default=0)
    low = min((int(rows.min()) for rows in parts if len(rows)), default=0)
    if low < 0 or high >= dataset.n_rows:
        raise DataError(
            f"partition: has example numbers {low} to {high}, but data={dataset.name} has 0 to {dataset.n_rows - 1}"
        )
