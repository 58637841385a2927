"""Targets of new examples in stored form: columns of a table, folders named by class, arrays or a data set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedloom.data.dataset import Dataset, validated
from fedloom.data.preprocess import Given, Part, Preprocess, TableFormat, check_stored
from fedloom.data.raw_inputs import TableRows, column_numbers, column_words, is_table, table_inputs, table_rows
from fedloom.errors import DataError, suggest
from fedloom.inputs import Inputs, InputSpec, n_examples
from fedloom.objectives import Classification, MultiLabel, Objective, Regression

Stored = tuple[Inputs, Tensor]
"""Stored inputs (N, ...) and targets, as in `Dataset`."""


def stored_examples(preprocess: Preprocess, data: Any) -> Stored:
    """Return examples with targets in stored form. Raise DataError if they do not match the description.

    `data` is a table with the label columns of the training table, a folder with one folder of images for each class, a pair of inputs and
    targets, or a data set whose inputs were made in the same way (all of its examples are used).
    """
    if isinstance(data, Dataset):
        return _of_dataset(preprocess, data)
    if isinstance(data, tuple) and len(data) == 2:
        return _checked(preprocess, preprocess.stored(data[0]), _targets(preprocess.objective, data[1]))
    if isinstance(data, str | Path) and Path(data).expanduser().is_dir():
        return _of_folder(preprocess, Path(data).expanduser())
    if is_table(preprocess) or (preprocess.coder and preprocess.coder.columns):
        rows = table_rows(preprocess, data)
        return _checked(preprocess, table_inputs(preprocess, rows), table_targets(preprocess, rows))
    raise DataError(
        "data: must be inputs and targets (x, y), a folder with one folder of pictures for each class, or a data set"
    )


def conformed(pool: Dataset, given: Given) -> Dataset:
    """Return a data set with the inputs, targets and scaling of `given`. Raise DataError if its examples do not match."""
    described = given.preprocess
    if pool.spec.is_picture and described.spec.is_picture and (pool.input_shape[0], described.spec.shape[0]) == (1, 3):
        colours = pool.images.expand(-1, 3, -1, -1).contiguous()  # like new greyscale images
        shape = (3, *pool.input_shape[1:])
        pool = replace(pool, inputs=colours, spec=InputSpec((replace(pool.spec.fields[0], shape=shape),)), parts=())
    mine, theirs = ([(f.name, f.kind, f.shape) for f in spec.fields] for spec in (pool.spec, described.spec))
    if mine != theirs:
        raise DataError(f"data={pool.name}: inputs are {pool.spec}, but those of {given.where} are {described.spec}")
    if pool.objective.task != described.objective.task:
        raise DataError(
            f"data={pool.name}: the task is {pool.objective.task}, but that of {given.where} is {described.objective.task}"
        )
    for mine_part, their_part in zip(pool.preprocess().inputs, described.inputs, strict=True):
        is_made = any(getattr(part, key, None) for part in (mine_part, their_part) for key in ("columns", "text"))
        if is_made and _encoding(mine_part) != _encoding(their_part):
            raise DataError(
                f"data={pool.name}: its columns, levels or words differ from those of {given.where}; use another data.preprocess"
            )
    check_stored(described.spec, pool.inputs)
    return validated(
        replace(
            pool,
            targets=targets_as(described.objective, pool),
            objective=described.objective,
            spec=described.spec,
            parts=described.inputs,
            table=described.table,
            is_scaled=True,
            normalise=None,
        )
    )


def _of_dataset(preprocess: Preprocess, data: Dataset) -> Stored:
    mine, theirs = (tuple(map(_encoding, parts)) for parts in (preprocess.inputs, data.preprocess().inputs))
    if mine != theirs or type(data.objective) is not type(preprocess.objective):
        raise DataError(
            f"data={data.name}: its inputs or targets were not prepared as in training; pass the file instead"
        )
    return _checked(preprocess, data.inputs, targets_as(preprocess.objective, data))


def targets_as(objective: Objective, data: Dataset) -> Tensor:
    """Return the targets of a data set in the stored form of an objective of the same task. Raise DataError if a class is unknown."""
    mine = data.objective
    if mine == objective:
        return data.targets
    if isinstance(mine, Classification):
        return _classes(objective, np.array(mine.names)[data.targets.numpy()])
    if isinstance(mine, Regression):
        return _targets(objective, data.targets.double().numpy() * np.array(mine.std) + np.array(mine.mean))
    return data.targets


def _encoding(part: Part) -> dict[str, Any]:
    """Return the properties that two parts must share to store the same raw values as the same tensors."""
    return part.model_dump(exclude={"scale", "shift", "own", "resize"})


def _of_folder(preprocess: Preprocess, folder: Path) -> Stored:
    if not isinstance(preprocess.objective, Classification) or is_table(preprocess):
        raise DataError(f"{folder} is a folder; folders named by class fit only pictures with classes")
    files = sorted(file for file in folder.glob("*/*") if file.is_file() and not file.name.startswith("."))
    if not files:
        raise DataError(f"{folder} has no pictures in folders named by class")
    return preprocess.stored(files), _classes(preprocess.objective, np.array([file.parent.name for file in files]))


def table_targets(preprocess: Preprocess, rows: TableRows) -> Tensor:
    """Return the targets in the label columns of a table. Raise DataError, which names the place, if a label is missing or not a class."""
    form = preprocess.table or TableFormat()
    if not form.labels:
        raise DataError("data: the run was not trained on a table with labels; give inputs and targets (x, y)")
    if isinstance(preprocess.objective, Classification):
        places, words = column_words(rows, form.labels[0])
        found = np.array([*words, ""])[places]  # place -1 is the empty word
        if (lacking := found == "").any():
            raise DataError(f"{rows.place(int(lacking.argmax()))}, column '{form.labels[0]}': no label")
        return _classes(preprocess.objective, found, lambda row: f"{rows.place(row)}, column '{form.labels[0]}'")
    columns = np.stack([column_numbers(rows, name, form) for name in form.labels], axis=1)
    if np.isnan(columns).any():
        row, place = np.argwhere(np.isnan(columns))[0].tolist()
        raise DataError(f"{rows.place(row)}, column '{form.labels[place]}': no label")
    return _targets(preprocess.objective, columns)


def _targets(objective: Objective, raw: Any) -> Tensor:
    """Return raw targets in stored form. They may have any form that `fedloom.from_arrays` accepts."""
    values = np.asarray(raw)
    if isinstance(objective, Classification):
        return _classes(objective, values.reshape(-1) if values.ndim == 2 and values.shape[1] == 1 else values)
    if values.dtype.kind not in "bifu":
        raise DataError(f"data: targets of task={objective.task} must be numbers, but are {values.dtype}")
    if isinstance(objective, Regression):
        table = values.reshape(len(values), -1).astype(np.float64)
        if table.shape[1] != objective.n_outputs:
            raise DataError(
                f"data: {table.shape[1]} targets per example, but the run predicts {', '.join(objective.names)}"
            )
        return torch.from_numpy(((table - np.array(objective.mean)) / np.array(objective.std)).astype(np.float32))
    return torch.from_numpy(values.astype(np.uint8 if isinstance(objective, MultiLabel) else np.int64))


def _classes(objective: Objective, labels: npt.NDArray[Any], where: Callable[[int], str] = lambda _: "data") -> Tensor:
    """Return the class numbers for labels, which are class names or class numbers.

    Class numbers may be text only if no class name is a number. `where` returns the place of a label, for messages.
    """
    places = {name: i for i, name in enumerate(objective.names)}
    lower = {name.lower(): i for name, i in places.items()}
    are_words = not any(name.isdecimal() for name in places)
    found = []
    for row, label in enumerate(labels.tolist()):
        word = str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)
        place = places.get(word, lower.get(word.lower()))
        if place is None and (isinstance(label, int) or are_words) and word.isdecimal() and int(word) < len(places):
            place = int(word)
        if place is None:
            raise DataError(f"{where(row)}: the label '{word}' is not a class of the run{suggest(word, places)}")
        found.append(place)
    return torch.tensor(found, dtype=torch.int64)


def _checked(preprocess: Preprocess, inputs: Inputs, targets: Tensor) -> Stored:
    if n_examples(inputs) != len(targets):
        raise DataError(f"data: {n_examples(inputs)} inputs, but {len(targets)} targets")
    if problem := preprocess.objective.checked(targets):
        raise DataError(f"data: {problem}")
    return inputs, targets
