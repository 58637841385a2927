"""Targets of a learning task: checks, class numbers, and the objective that describes the targets."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedloom.errors import DataError, suggest
from fedloom.objectives import OBJECTIVES, Classification, Language, MultiLabel, Objective, Regression

log = logging.getLogger(__name__)

MANY = 20
"""Labels with at most this number of different integers are classes by default."""
MAX_CLASSES = 1000
"""Maximum number of classes without names."""


def class_numbers(
    labels: npt.NDArray[Any], classes: Sequence[str] | None
) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    """Return labels from 0 to Y-1, and the names of the classes.

    Labels are integers or names. Classes with names are sorted by name. The shape (N, 1) is accepted.
    """
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    shown = f"{labels.shape} {labels.dtype}"
    if labels.ndim != 1:
        raise DataError(
            f"from_arrays: y is {shown}; labels must be (N,) integers from 0 or names; "
            "for columns of 0 and 1, set task='multilabel'; for next tokens, set task='language'"
        )
    if labels.dtype.kind in "UOS" and all(isinstance(label, str) for label in labels.tolist()):
        return _named(labels, classes)
    if labels.dtype.kind == "b":
        return labels.astype(np.int64), tuple(classes) if classes is not None else ("False", "True")
    if labels.dtype.kind == "f" and np.isfinite(labels).all() and (labels == np.rint(labels)).all():
        log.warning(
            "from_arrays: y holds integers as %s; used as class labels; for numbers, set task='regression'", shown
        )
        labels = labels.astype(np.int64)
    if labels.dtype.kind not in "iu":
        raise DataError(
            f"from_arrays: y is {shown}; labels must be (N,) integers from 0 or names; for numbers, set task='regression'"
        )
    labels = labels.astype(np.int64)
    if classes is None:
        _refuse_numbers(labels)
    return labels, tuple(classes) if classes is not None else _numbered(labels)


def _refuse_numbers(labels: npt.NDArray[np.int64]) -> None:
    """Raise DataError if labels look like numbers to predict rather than classes."""
    n = len(np.unique(labels))
    if int(labels.max()) >= MAX_CLASSES or (n > MANY and 2 * n > len(labels)):
        raise DataError(
            f"from_arrays: y has {n:,} different values up to {int(labels.max()):,} in {len(labels):,} examples, which is too many "
            "for classes; set task='regression', or name the classes with classes="
        )


def _named(labels: npt.NDArray[Any], classes: Sequence[str] | None) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    names = tuple(classes) if classes is not None else tuple(sorted(set(labels.tolist())))
    places = {name: i for i, name in enumerate(names)}
    for label in labels.tolist():
        if label not in places:
            raise DataError(f"from_arrays: label '{label}' is not one of the classes{suggest(label, names)}")
    return np.array([places[label] for label in labels.tolist()], np.int64), names


def _numbered(labels: npt.NDArray[np.int64]) -> tuple[str, ...]:
    """Return names for the classes from 0 to the largest label."""
    found, most = np.unique(labels).tolist(), int(labels.max())
    if found[0] == 1:
        raise DataError(
            f"from_arrays: labels run from 1 to {most}; subtract 1, or name all classes from 0 with classes="
        )
    if len(found) <= most and found[0] >= 0:
        absent = sorted(set(range(most)) - set(found))
        shown = ", ".join(map(str, absent[:5])) + (" ..." if len(absent) > 5 else "")
        log.warning("from_arrays: no example has label %s; classes run from 0 to %d", shown, most)
    return tuple(str(c) for c in range(most + 1))


def check_options(task: str, classes: Any, vocabulary: int | None, loss: str, delta: float) -> None:
    """Raise DataError for options that do not apply to the task."""
    if isinstance(classes, str):
        raise DataError(f"from_arrays: classes={classes!r}: must be a list of names, such as [{classes!r}]")
    if task in OBJECTIVES and task != "regression" and loss != "mse":
        raise DataError(f"from_arrays: loss={loss}: applies only to task=regression, not task={task}; remove it")
    if delta != 1.0 and loss == "mse":
        raise DataError(f"from_arrays: delta={delta:g}: applies only to loss=huber; set loss='huber', or remove delta")
    if vocabulary is not None and not (isinstance(vocabulary, int | np.integer) and vocabulary >= 1):
        raise DataError(f"from_arrays: vocabulary={vocabulary!r}: must be an integer of at least 1")


def objective_for(
    task: str,
    targets: Tensor,
    n_train: int,
    *,
    names: Sequence[str] | None,
    vocabulary: int | None = None,
    loss: Literal["mse", "huber"] = "mse",
    delta: float = 1.0,
) -> tuple[Tensor, Objective]:
    """Return the targets in stored form, and the objective.

    Regression targets are stored in standard deviations from the mean; both statistics are computed over the first `n_train` examples.
    """
    if task not in OBJECTIVES:
        raise DataError(f"task={task}: unknown{suggest(task, OBJECTIVES)}")
    if loss not in ("mse", "huber") or not delta > 0:
        raise DataError(f"loss={loss}, delta={delta}: loss must be mse or huber, and delta must be above 0")
    given = tuple(names) if names is not None else ()
    if task == "classification":
        return targets.to(torch.int64), Classification(names=given)
    if task == "regression":
        return _standardised(targets, n_train, given, loss, delta)
    if task == "multilabel" and targets.is_floating_point() and bool(((targets == 0) | (targets == 1)).all()):
        targets = targets.to(torch.uint8)
    if targets.ndim != 2 or targets.is_floating_point() or (targets.dtype == torch.bool and task == "language"):
        needed = "(N, L) of 0 and 1" if task == "multilabel" else "(N, T) integers"
        raise DataError(f"task={task}: targets are {tuple(targets.shape)} {targets.dtype}; they must be {needed}")
    if task == "multilabel":
        if bool(((targets != 0) & (targets != 1)).any()):
            raise DataError("task=multilabel: targets must be 0 or 1")
        labels = given or tuple(f"label {i}" for i in range(targets.shape[1]))
        return targets.to(torch.uint8), MultiLabel(names=_counted(labels, targets.shape[1]))
    size = max(int(targets.max()) + 1, vocabulary or 1, len(given))
    return targets.to(torch.int64), Language(names=given, vocabulary=size)


def _standardised(
    targets: Tensor, n_train: int, names: tuple[str, ...], loss: Literal["mse", "huber"], delta: float
) -> tuple[Tensor, Objective]:
    if targets.ndim == 1:
        targets = targets[:, None]
    if targets.ndim != 2:
        raise DataError(f"task=regression: targets have shape {tuple(targets.shape)}; they must be (N,) or (N, M)")
    values = targets.double()
    if not bool(values.isfinite().all()):
        raise DataError("task=regression: targets contain NaN or infinite values; remove or replace them")
    mean, std = values[:n_train].mean(0), values[:n_train].std(0, correction=0)
    std = torch.where(std > 0, std, 1.0)
    width = values.shape[1]
    objective = Regression(
        names=_counted(names or (("target",) if width == 1 else tuple(f"target {i}" for i in range(width))), width),
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
        loss_name=loss,
        delta=delta,
    )
    return ((values - mean) / std).float(), objective


def _counted(names: tuple[str, ...], n: int) -> tuple[str, ...]:
    if len(names) != n:
        raise DataError(f"classes: {len(names)} names for {n} columns of targets; give one per column")
    return names
