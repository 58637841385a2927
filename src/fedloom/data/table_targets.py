"""The targets of a table: its task, which depends on the label columns, and class numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fedloom.data.table_columns import MAX_LEVELS, TableColumn
from fedloom.data.targets import MANY
from fedloom.errors import DataError

Targets = tuple[npt.NDArray[Any], tuple[str, ...], str]
"""Targets, names of the classes, labels or targets, and the task."""


def labelled(labels: Sequence[TableColumn], task: str | None, file: str) -> Targets:
    """Return the targets in the label columns. If `task` is None, the columns determine the task.

    Raise DataError if the columns do not fit the task.
    """
    task = task or _task(labels, file)
    names = tuple(column.name for column in labels)
    shown = f"{file}, label '{', '.join(names)}'"
    if task == "language":
        raise DataError("data.task=language: tables have no blocks of text; pass token ids in an .npz file")
    if task == "classification":
        if len(labels) > 1:
            raise DataError(f"{shown}: data.task=classification has one label column; name one, or use multilabel")
        return (*_classes(labels[0], shown), task)
    if task == "multilabel":
        if not all(_is_truth(column) for column in labels):
            raise DataError(f"{shown}: data.task=multilabel needs columns of 0 and 1")
        return np.stack([column.values for column in labels], axis=1).astype(np.int64), names, task
    for column in labels:
        if column.kind == "category":
            raise DataError(
                f"{file}, label '{column.name}': data.task={task} needs numbers, but has '{column.levels[0]}'"
            )
    return np.stack([column.values for column in labels], axis=1), names, task


def _task(labels: Sequence[TableColumn], file: str) -> str:
    if len(labels) > 1:
        if all(_is_truth(column) for column in labels):
            return "multilabel"
        raise DataError(
            f"{file}: several label columns that are not all 0 and 1; set data.task=regression, or name one"
        )
    column = labels[0]
    if column.kind == "category" or column.levels:
        return "classification"
    different = len(np.unique(column.values))
    if column.is_whole and different <= MANY:
        return "classification"
    raise DataError(
        f"{file}, label '{column.name}' has {different:,} different numbers; set data.task=regression, or classification "
        "if they are classes"
    )


def _is_truth(column: TableColumn) -> bool:
    return column.kind == "number" and bool(np.isin(column.values, (0, 1)).all())


def _classes(column: TableColumn, shown: str) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    """Return class numbers and class names. Words are in the order of their levels; numbers are sorted by value."""
    labels, names = column.values.astype(np.int64), column.levels
    if not names:
        if not column.is_whole:
            raise DataError(f"{shown} has numbers that are not integers; set data.task=regression")
        found, labels = np.unique(labels, return_inverse=True)
        names = tuple(str(value) for value in found.tolist())
    n = len(np.unique(labels))
    if n < 2:
        raise DataError(f"{shown} has only one value, '{names[labels[0]]}'; a classification needs two classes")
    if len(names) > MAX_LEVELS or 2 * n > len(labels):
        raise DataError(
            f"{shown} has {n:,} different values in {len(labels):,} rows, which is too many for classes; name another column "
            "with data.label, or set data.task=regression for numbers"
        )
    return labels, names
