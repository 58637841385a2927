"""Metadata files of folders of images: metadata.csv and metadata.jsonl, with the columns file_name and labels."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedloom.data.dataset import Column
from fedloom.errors import DataError

Parts = tuple[str, ...]
Row = dict[str, Any]

NAMES = ("metadata.csv", "metadata.jsonl")
LABELS = ("label", "labels", "class", "target", "y")
"""Names of label columns, in order of preference."""


class Targets(NamedTuple):
    """Targets of images (class numbers, numbers, or rows of 0 and 1), their names, and further columns."""

    values: npt.NDArray[Any]
    names: tuple[str, ...] | None
    columns: dict[str, Column]

    def chosen(self, keep: npt.NDArray[np.bool_]) -> Targets:
        """Return the targets and columns of the images to keep."""
        return Targets(self.values[keep], self.names, {name: column[keep] for name, column in self.columns.items()})


class Metadata(NamedTuple):
    """The rows of a folder's metadata files, by the path of the image relative to the folder."""

    files: list[Path]
    columns: tuple[str, ...]
    rows: dict[Parts, Row]

    def listed(self, pictures: Sequence[Parts], notes: list[str]) -> list[Parts]:
        """Return the images that are listed, and note how many are not. Raise DataError if a listed image does not exist."""
        found = [picture for picture in pictures if picture in self.rows]
        missing = sorted(self.rows.keys() - set(found))
        if missing:
            more = f" (and {len(missing) - 1:,} more)" if len(missing) > 1 else ""
            raise DataError(
                f"{self.files[0]} lists '{'/'.join(missing[0])}'{more}, which is not a picture in the folder"
            )
        if len(found) < len(pictures):
            left_out = counted(len(pictures) - len(found), "picture")
            notes.append(f"{left_out} not listed in {self.files[0].name} and left out")
        return found

    def targets(self, pictures: Sequence[Parts], task: str) -> Targets:
        """Return the targets and the other columns for these images. Raise DataError if they do not fit the task."""
        values = {column: [self.rows[picture][column] for picture in pictures] for column in self.columns}
        labels = self._label_columns(values, task)
        for column in labels:
            for picture, value in zip(pictures, values[column], strict=True):
                if value is None or value == "":
                    raise DataError(f"{self.files[0]}: '{'/'.join(picture)}' has no value in column '{column}'")
        others = {
            column: np.asarray(["" if value is None else str(value) for value in values[column]])
            for column in self.columns
            if column not in labels
        }
        if task == "classification":
            self._check_labels(labels[0], values[labels[0]])
            return _classes(values[labels[0]], others)
        return self._numbers({column: values[column] for column in labels}, others, task)

    def _check_labels(self, column: str, labels: Sequence[Any]) -> None:
        """Raise DataError if the labels for classification are lists, or numbers that are not integers."""
        are_lists = any(isinstance(label, list | dict) for label in labels)
        are_numbers = all(map(_is_number, labels)) and not all(float(label).is_integer() for label in labels)
        if are_lists or are_numbers:
            what, task = ("lists", "multilabel") if are_lists else ("numbers with fractions", "regression")
            raise DataError(
                f"{self.files[0]}: column '{column}' has {what}, not names of classes; set data.task={task}"
            )

    def _label_columns(self, values: dict[str, list[Any]], task: str) -> list[str]:
        """Return the target columns: the column with a usual name, or else all columns that fit the task."""
        known = [column for column in LABELS if column in self.columns]
        if known:
            return known[:1]
        if task == "classification" and len(self.columns) == 1:
            return list(self.columns)
        allowed = ("0", "1") if task == "multilabel" else None
        fitting = [column for column in self.columns if _holds_numbers(values[column], allowed)]
        if task == "classification" or not fitting:
            needed = {"classification": "labels", "multilabel": "0 and 1"}.get(task, "numbers")
            raise DataError(
                f"{self.files[0]}: no column of {needed}, such as {', '.join(LABELS)}; "
                f"its columns are file_name, {', '.join(self.columns) or 'and no others'}"
            )
        return fitting

    def _numbers(self, values: dict[str, list[Any]], others: dict[str, Column], task: str) -> Targets:
        names, kind = tuple(values), np.float64 if task == "regression" else np.int64
        is_list = len(names) == 1 and isinstance(values[names[0]][0], list)
        try:
            if is_list:
                return Targets(np.asarray(values[names[0]], kind), None, others)
            return Targets(np.stack([np.asarray(column, kind) for column in values.values()], axis=1), names, others)
        except (TypeError, ValueError):
            needed = "numbers, or lists of equal length" if task == "regression" else "0 and 1, or lists of 0 and 1"
            raise DataError(f"data.task={task}: {self.files[0]}: column '{names[0]}' must have {needed}") from None


def read_metadata(folder: Path, splits: Collection[str]) -> Metadata | None:
    """Return the metadata in a folder and its split folders, or None if there are none. Raise DataError if a file is malformed."""
    try:
        places = [folder, *sorted(place for place in folder.iterdir() if place.name.lower() in splits)]
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror})") from error
    files = [place / name for place in places for name in NAMES if (place / name).is_file()]
    if not files:
        return None
    rows: dict[Parts, Row] = {}
    columns: tuple[str, ...] | None = None
    for file in files:
        for line, row in _rows(file):
            picture = (*file.parent.relative_to(folder).parts, *PurePosixPath(str(row.pop("file_name"))).parts)
            columns = tuple(row) if columns is None else columns
            if set(row) != set(columns):
                odd = min(set(row) ^ set(columns))
                raise DataError(
                    f"{file}, line {line}: column '{odd}' is not in all rows; all rows need the same columns"
                )
            if picture in rows:
                raise DataError(
                    f"{file}, line {line} lists '{'/'.join(picture)}' a second time; remove one of the lines"
                )
            rows[picture] = row
    if columns is None:
        raise DataError(f"{files[0]} has no rows")
    return Metadata(files, columns, rows)


def _rows(file: Path) -> Iterator[tuple[int, Row]]:
    """Yield the number of the line and the values of each row."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            for line, row in _csv_rows(file, stream) if file.suffix == ".csv" else _json_rows(file, stream):
                if "file_name" not in row:
                    shown = ", ".join(map(str, row))
                    raise DataError(f"{file}, line {line} has no column 'file_name'; its columns are {shown}")
                yield line, row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file} cannot be read as UTF-8 text ({error})") from error


def _csv_rows(file: Path, stream: Any) -> Iterator[tuple[int, Row]]:
    reader = csv.reader(stream, strict=True)
    names = next(reader, [])
    if len(set(names)) < len(names):
        raise DataError(f"{file}: two columns have the same name; its columns are {', '.join(names)}")
    for cells in reader:
        if cells and len(cells) != len(names):
            raise DataError(f"{file}, line {reader.line_num} has {len(cells)} values for {len(names)} columns")
        if cells:
            yield reader.line_num, dict(zip(names, cells, strict=True))


def _json_rows(file: Path, stream: Any) -> Iterator[tuple[int, Row]]:
    for line, text in enumerate(stream, 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{file}, line {line}: not JSON ({error.msg})") from None
        if not isinstance(row, dict):
            raise DataError(
                f'{file}, line {line} must be a JSON object, such as {{"file_name": "1.png", "label": "cat"}}'
            )
        yield line, row


def _holds_numbers(values: Sequence[Any], allowed: Collection[str] | None) -> bool:
    """Return whether all values that are not missing are numbers, or are among `allowed`."""
    present = [value for value in values if value is not None and value != ""]
    if allowed is not None:
        return bool(present) and all(str(value) in allowed for value in present)
    return bool(present) and all(_is_number(value) for value in present)


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _classes(labels: Sequence[Any], others: dict[str, Column]) -> Targets:
    """Return class numbers. Integers are sorted by value, other labels as text."""
    text = [str(label) for label in labels]
    names = sorted(set(text))
    if all(name.isdecimal() for name in names):
        names.sort(key=int)
    places = {name: i for i, name in enumerate(names)}
    return Targets(np.array([places[label] for label in text], np.int64), tuple(names), others)


def counted(n: int, one: str, many: str = "") -> str:
    """Return a number and its noun, such as "1 picture" or "1,234 pictures"."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"
