"""Targets of new examples, for scoring predictions: columns of a table, folders named by class, arrays or a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedloom.data.dataset import Dataset
from fedloom.data.preprocess import Part, Preprocess, TableFormat
from fedloom.data.raw_inputs import TableRows, column_numbers, column_words, is_table, table_inputs, table_rows
from fedloom.errors import DataError, suggest
from fedloom.inputs import Inputs, n_examples
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
    if is_table(preprocess):
        rows = table_rows(preprocess, data)
        return _checked(preprocess, table_inputs(preprocess, rows), _of_table(preprocess, rows))
    raise DataError(
        "data: must be inputs and targets (x, y), a folder with one folder of pictures for each class, or a data set"
    )


def _of_dataset(preprocess: Preprocess, data: Dataset) -> Stored:
    mine, theirs = (tuple(map(_encoding, parts)) for parts in (preprocess.inputs, data.preprocess().inputs))
    if mine != theirs or type(data.objective) is not type(preprocess.objective):
        raise DataError(
            f"data={data.name}: its inputs or targets were not prepared as in training; pass the file instead"
        )
    values = data.targets
    if isinstance(data.objective, Classification):
        return data.inputs, _classes(preprocess.objective, np.array(data.objective.names)[values.numpy()])
    if isinstance(data.objective, Regression):
        raw = values.double().numpy() * np.array(data.objective.std) + np.array(data.objective.mean)
        return _checked(preprocess, data.inputs, _targets(preprocess.objective, raw))
    return _checked(preprocess, data.inputs, values)


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


def _of_table(preprocess: Preprocess, rows: TableRows) -> Tensor:
    form = preprocess.table or TableFormat()
    if not form.labels:
        raise DataError("data: the run was not trained on a table with labels; give inputs and targets (x, y)")
    if isinstance(preprocess.objective, Classification):
        places, words = column_words(rows, form.labels[0])
        if (places < 0).any():
            raise DataError(f"{rows.place(int((places < 0).argmax()))}, column '{form.labels[0]}': no label")
        return _classes(preprocess.objective, np.array(words)[places])
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


def _classes(objective: Objective, labels: npt.NDArray[Any]) -> Tensor:
    """Return the class numbers for labels, which are class names or class numbers.

    Class numbers may be text only if no class name is a number.
    """
    places = {name: i for i, name in enumerate(objective.names)}
    lower = {name.lower(): i for name, i in places.items()}
    are_words = not any(name.isdecimal() for name in places)
    found = []
    for label in labels.tolist():
        word = str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)
        place = places.get(word, lower.get(word.lower()))
        if place is None and (isinstance(label, int) or are_words) and word.isdecimal() and int(word) < len(places):
            place = int(word)
        if place is None:
            raise DataError(f"data: the label '{word}' is not a class of the run{suggest(word, places)}")
        found.append(place)
    return torch.tensor(found, dtype=torch.int64)


def _checked(preprocess: Preprocess, inputs: Inputs, targets: Tensor) -> Stored:
    if n_examples(inputs) != len(targets):
        raise DataError(f"data: {n_examples(inputs)} inputs, but {len(targets)} targets")
    if problem := preprocess.objective.checked(targets):
        raise DataError(f"data: {problem}")
    return inputs, targets
