"""One pool of examples: the official training examples first, then the official test examples."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedloom.errors import DataError

log = logging.getLogger(__name__)

Column = npt.NDArray[Any]
Array = Tensor | npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A pool of N examples, training examples first.

    Examples 0 .. n_train-1 are the official training examples. The others are the official test examples; there may be
    none. `images` is (N, C, H, W) uint8 for images (0 .. 255), or a float tensor (N, ...) for other features. `labels`
    is (N,) int64 with values 0 .. Y-1. `classes` are the names of the Y classes. `columns` are further values, (N,)
    each, such as the domain or the writer of each example.
    """

    name: str
    images: Tensor
    labels: Tensor
    n_train: int
    classes: tuple[str, ...]
    columns: dict[str, Column]

    @property
    def n_rows(self) -> int:
        """Number of training and test examples, N."""
        return len(self.labels)

    @property
    def n_classes(self) -> int:
        """Number of classes, Y, including classes without examples."""
        return len(self.classes)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input: (C, H, W) for images, (D,) for flat features."""
        return tuple(self.images.shape[1:])


def from_arrays(
    x: Array,
    y: Array,
    x_test: Array | None = None,
    y_test: Array | None = None,
    *,
    name: str = "arrays",
    classes: Sequence[str] | None = None,
    columns: Mapping[str, Sequence[Any] | Column] | None = None,
) -> Dataset:
    """Return a pool made from NumPy arrays or torch tensors.

    `x` is (N, C, H, W) uint8 images, or finite floats of any shape (N, ...). `y` is (N,) integers from 0. Give `x_test` and `y_test`
    together or not at all. Each column has one value per example, training examples first. The arrays are copied.

    Images with channels last, (N, H, W, C), are converted to channels first. Float images with integer values from 0 to
    255 are converted to uint8. Both are logged.

    Raises:
        DataError: arrays have the wrong shape or type, or labels run from 1 to K without `classes` (class 0 would have no examples).
    """
    if (x_test is None) != (y_test is None):
        raise DataError("from_arrays: x_test and y_test must be given together; one of them is missing")
    images, labels = _inputs(x, "x"), _labels(y, "y")
    n_train = len(labels)
    if x_test is not None and y_test is not None:
        more = _inputs(x_test, "x_test")
        if (
            images.is_floating_point() and more.dtype == torch.uint8
        ):  # x was not converted: some of its pixels are not integers
            more = more.to(images.dtype)
        if more.shape[1:] != images.shape[1:] or more.dtype != images.dtype:
            raise DataError(f"from_arrays: x_test is {_describe(more)} and x is {_describe(images)}; they must agree")
        images, labels = torch.cat([images, more]), torch.cat([labels, _labels(y_test, "y_test")])
    if len(images) != len(labels):
        raise DataError(f"from_arrays: {len(images)} inputs and {len(labels)} labels; each input must have one label")
    names = tuple(classes) if classes is not None else _class_numbers(labels)
    pool = Dataset(
        name=name,
        images=images,
        labels=labels,
        n_train=n_train,
        classes=names,
        columns={key: np.asarray(v) for key, v in (columns or {}).items()},
    )
    return validated(pool)


def validated(dataset: Dataset) -> Dataset:
    """Return the data set after checking that inputs, labels and columns agree. Raise DataError if they do not."""
    n, low, high = len(dataset.images), int(dataset.labels.min()), int(dataset.labels.max())
    if len(dataset.labels) != n or not 0 < dataset.n_train <= n:
        raise DataError(
            f"data={dataset.name}: {n} inputs, {len(dataset.labels)} labels, {dataset.n_train} training examples; these must agree"
        )
    if low < 0 or high >= dataset.n_classes:
        raise DataError(
            f"data={dataset.name}: labels run from {low} to {high}; they must be 0 to {dataset.n_classes - 1}"
        )
    for key, column in dataset.columns.items():
        if column.shape != (n,):
            raise DataError(f"data={dataset.name}: column '{key}' has shape {column.shape}; it must be ({n},)")
    return dataset


def _class_numbers(labels: Tensor) -> tuple[str, ...]:
    """Return names for classes 0 to the largest label."""
    found, most = np.unique(labels.numpy()).tolist(), int(labels.max())
    if found[0] == 1:
        raise DataError(
            f"from_arrays: labels run from 1 to {most}; subtract 1, or name all classes from 0 with classes="
        )
    if len(found) <= most and found[0] >= 0:
        absent = sorted(set(range(most)) - set(found))
        shown = ", ".join(map(str, absent[:5])) + (" ..." if len(absent) > 5 else "")
        log.warning("from_arrays: no example has label %s; classes run from 0 to %d", shown, most)
    return tuple(str(c) for c in range(most + 1))


def _tensor(values: Array, what: str) -> Tensor:
    """Return a copy as a tensor, so that later changes to the caller's array do not affect the data set, and vice versa."""
    try:
        return (
            torch.tensor(values) if isinstance(values, np.ndarray) else torch.as_tensor(values).detach().cpu().clone()
        )
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"from_arrays: {what} cannot be converted to a tensor ({error})") from error


def _inputs(x: Array, what: str) -> Tensor:
    tensor = _tensor(x, what)
    if tensor.ndim < 2 or len(tensor) == 0:
        raise DataError(f"from_arrays: {what} has shape {tuple(tensor.shape)}; it must be (N, ...) with N > 0 examples")
    if tensor.ndim == 4 and tensor.shape[3] in (1, 3) and tensor.shape[1] not in (1, 3):
        log.warning("from_arrays: %s is %s; converted from channels last to channels first", what, _describe(tensor))
        tensor = tensor.permute(0, 3, 1, 2).contiguous()
    if tensor.is_floating_point() and tensor.ndim == 4 and _are_bytes(tensor):
        log.warning("from_arrays: %s holds integers from 0 to 255 as %s; converted to uint8", what, _describe(tensor))
        tensor = tensor.to(torch.uint8)
    if tensor.dtype == torch.uint8:
        if tensor.ndim != 4 or tensor.shape[1] not in (1, 3):
            raise DataError(
                f"from_arrays: {what} is {_describe(tensor)}; uint8 images must be (N, C, H, W) with C = 1 or 3"
            )
    elif not tensor.is_floating_point():
        raise DataError(f"from_arrays: {what} is {_describe(tensor)}; it must be uint8 images or floating point")
    elif not bool(torch.isfinite(tensor).all()):
        raise DataError(f"from_arrays: {what} has NaN or infinite values; remove or replace them")
    return tensor


def _are_bytes(x: Tensor) -> bool:
    """Return whether images are pixel values from 0 to 255 stored as floats."""
    return x.shape[1] in (1, 3) and 1.5 < float(x.max()) <= 255 and float(x.min()) >= 0 and bool((x == x.round()).all())


def _labels(y: Array, what: str) -> Tensor:
    tensor = _tensor(y, what)
    if tensor.ndim != 1 or tensor.is_floating_point() or tensor.dtype == torch.bool or len(tensor) == 0:
        raise DataError(f"from_arrays: {what} is {_describe(tensor)}; labels must be (N,) integers from 0")
    return tensor.to(torch.int64)


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
