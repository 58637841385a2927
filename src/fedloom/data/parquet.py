"""Parquet files of encoded images, in the layout of the Hugging Face hub. The images are decoded once, to uint8."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from fedloom.data.cache import cache_key, cached
from fedloom.data.catalogue import Source
from fedloom.data.dataset import Column, Dataset
from fedloom.data.layouts import ClassNames
from fedloom.data.pictures import decode_picture
from fedloom.data.subset import choose_rows
from fedloom.data.targets import objective_for
from fedloom.errors import DataError, first_line, suggest

LABELS = ("label", "labels", "fine_label", "coarse_label", "character", "class", "target", "y")
_FORMAT = 4  # part of the cache key: increment it when decoding changes


class ColumnRoles(NamedTuple):
    """The roles of the files' columns. `names` contains class names from the hub's metadata, by column."""

    image: str
    label: str
    extra: tuple[str, ...]
    names: ClassNames


def read_parquet(
    name: str,
    files: tuple[list[Path], list[Path]],
    source: Source | None,
    *,
    image_size: int | None,
    rows: int | None,
    cache_root: Path,
    task: str = "classification",
    names: ClassNames | None = None,
) -> Dataset:
    """Return the pool in the training and test files, or from the cache if it was decoded before. Raise DataError for invalid files.

    With the `task` `regression`, the label column contains numbers, or lists of numbers; with `multilabel`, it contains lists of 0 and 1.
    `names` contains class names by column, for files without class names in their metadata.
    """
    train, test = files
    choice = Choice(source=source, image_size=image_size, rows=rows, task=task, names=names or {})
    key = cache_key(train + test, ["parquet", _FORMAT, len(train), choice])
    return cached(cache_root, name, key, lambda: _decode_pool(name, train, test, choice))


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The options for converting files into a pool."""

    source: Source | None
    image_size: int | None
    rows: int | None
    task: str
    names: ClassNames


def _decode_pool(name: str, train: list[Path], test: list[Path], choice: Choice) -> Dataset:
    source = choice.source
    layout = _layout(train[0], source, choice.names)
    facts = [_facts(file, layout) for file in train + test]
    try:
        table = pa.concat_tables(facts, promote_options="permissive")
    except pa.ArrowException as error:
        raise DataError(f"data={name}: the files have different columns ({first_line(error)})") from error
    if not table.num_rows:
        raise DataError(f"data={name}: {train[0]} has no rows")
    n_train = sum(_open(file).metadata.num_rows for file in train)
    if choice.task != "classification":
        return _with_targets(name, table, layout, files=train + test, n_train=n_train, choice=choice)
    labels, classes = _classes(name, table[layout.label], layout.names.get(layout.label), source)
    keep, n_train = choose_rows(name, labels >= 0, n_train, choice.rows)
    encoded = _encoded(train + test, layout.image, keep)
    return Dataset.labelled(
        name=name,
        images=torch.from_numpy(decode_picture(encoded, int(keep.sum()), choice.image_size)),
        labels=torch.from_numpy(labels[keep]),
        n_train=n_train,
        classes=classes,
        columns={c: _column(table[c], layout.names.get(c))[keep] for c in layout.extra},
    )


def _with_targets(
    name: str, table: Any, layout: ColumnRoles, *, files: list[Path], n_train: int, choice: Choice
) -> Dataset:
    """Return the pool with targets that are numbers or lists of numbers."""
    column = table[layout.label]
    if column.null_count:
        raise DataError(f"data={name}: {column.null_count} examples have no label")
    try:
        targets = np.asarray(column.to_pylist(), np.float64 if choice.task == "regression" else np.int64)
    except (TypeError, ValueError):
        needed = "numbers, or lists of equal length" if choice.task == "regression" else "lists of 0 and 1"
        raise DataError(f"data={name} data.task={choice.task}: column '{layout.label}' must have {needed}") from None
    keep, n_train = choose_rows(name, np.ones(len(targets), dtype=bool), n_train, choice.rows)
    images = torch.from_numpy(decode_picture(_encoded(files, layout.image, keep), int(keep.sum()), choice.image_size))
    values, objective = objective_for(choice.task, torch.from_numpy(targets[keep]), n_train, names=None)
    columns = {c: _column(table[c], layout.names.get(c))[keep] for c in layout.extra}
    return Dataset.described(
        name=name, inputs=images, targets=values, n_train=n_train, objective=objective, columns=columns
    )


def _open(file: Path) -> pq.ParquetFile:
    with _reading(file):
        return pq.ParquetFile(file)


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} cannot be read as a parquet file ({first_line(error)})") from error


def _layout(file: Path, source: Source | None, names: ClassNames) -> ColumnRoles:
    schema = _open(file).schema_arrow
    pictures = [field.name for field in schema if _is_picture(field.type)]
    if not pictures:
        raise DataError(
            f"{file}: no column has images (binary, or a struct with 'bytes'); its columns are {schema.names}"
        )
    image = next((c for c in ("image", "img") if c in pictures), pictures[0])
    wanted = (source.label, *LABELS) if source else LABELS
    label = next((c for c in wanted if c in schema.names), None)
    if label is None:
        raise DataError(f"{file}: no label column, such as {', '.join(LABELS)}; its columns are {schema.names}")
    extra = tuple(f.name for f in schema if f.name not in (image, label) and _is_plain(f.type))
    return ColumnRoles(image, label, extra, {**names, **class_names(schema)})


def has_pictures(file: Path) -> bool:
    """Return whether a column of the file contains encoded images."""
    return any(_is_picture(field.type) for field in _open(file).schema_arrow)


def _is_picture(kind: Any) -> bool:
    if pa.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_plain(kind: Any) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    tests = (
        pa.types.is_integer,
        pa.types.is_floating,
        pa.types.is_boolean,
        pa.types.is_string,
        pa.types.is_large_string,
    )
    return any(test(kind) for test in tests)


def class_names(schema: Any) -> dict[str, tuple[str, ...]]:
    """Return class names by column, from the metadata that the `datasets` library writes into the schema."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        known = {c: f["names"] for c, f in features.items() if isinstance(f, dict) and f.get("names")}
        return {c: tuple(str(n) for n in names) for c, names in known.items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def _facts(file: Path, layout: ColumnRoles) -> Any:
    missing = {layout.image, layout.label, *layout.extra} - set((parquet := _open(file)).schema_arrow.names)
    if missing:
        raise DataError(f"{file}: column '{min(missing)}' is missing, but the first training file has it")
    with _reading(file):
        return parquet.read(columns=[layout.label, *layout.extra]).replace_schema_metadata(None)


def _column(values: Any, names: Sequence[str] | None) -> Column:
    values = values.combine_chunks()
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if values.null_count and pa.types.is_string(values.type):
        values = values.fill_null("")
    column: Column = values.to_numpy(zero_copy_only=False)
    if (
        names
        and np.issubdtype(column.dtype, np.integer)
        and len(column)
        and 0 <= column.min() <= column.max() < len(names)
    ):
        return np.asarray(names)[column]
    return column.astype(np.str_) if column.dtype == object else column


def _classes(
    name: str, values: Any, names: Sequence[str] | None, source: Source | None
) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    """Return labels 0 .. Y-1 (-1 for classes to omit) and the names of the Y classes."""
    if values.null_count:
        raise DataError(f"data={name}: {values.null_count} examples have no label")
    if pa.types.is_nested(values.type) or pa.types.is_floating(values.type):
        raise DataError(
            f"data={name}: labels have type {values.type}; they must be integers or strings (data.task=regression for numbers, "
            "data.task=multilabel for lists of 0 and 1)"
        )
    column = _column(values, None)
    classes: tuple[str, ...]
    if np.issubdtype(column.dtype, np.integer):
        labels = column.astype(np.int64)
        expected = _expected(labels, names, source)
        if expected is None:
            found, labels = np.unique(labels, return_inverse=True)
            expected = tuple(str(value) for value in found)
        classes = expected
    elif column.dtype.kind == "U":
        found, labels = np.unique(column, return_inverse=True)
        classes = tuple(str(value) for value in found)
    else:
        raise DataError(f"data={name}: labels have type {column.dtype}; they must be integers or strings")
    if labels.min() < 0 or labels.max() >= len(classes):
        raise DataError(
            f"data={name}: labels run from {labels.min()} to {labels.max()}; they must be from 0 to {len(classes) - 1}"
        )
    return _only(name, labels.astype(np.int64), classes, source.only if source else None)


def _expected(
    labels: npt.NDArray[np.int64], names: Sequence[str] | None, source: Source | None
) -> tuple[str, ...] | None:
    """Return the class names of integer labels 0 .. Y-1, or None if they are not known."""
    if names:
        return tuple(names)
    if source is None:
        return None
    if source.only:  # without class names, at most as many classes as in `only` are assumed to be these
        return source.only if labels.max() < len(source.only) else None
    return source.classes or tuple(str(c) for c in range(source.n_classes))


def _only(
    name: str, labels: npt.NDArray[np.int64], classes: tuple[str, ...], only: tuple[str, ...] | None
) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    if only is None:
        return labels, classes
    for wanted in only:
        if wanted not in classes:
            raise DataError(f"data={name}: the files have no class '{wanted}'{suggest(wanted, classes)}")
    places = np.full(len(classes), -1, np.int64)
    places[[classes.index(wanted) for wanted in only]] = np.arange(len(only))
    return places[labels], only


def _encoded(files: list[Path], image: str, keep: npt.NDArray[np.bool_]) -> Iterator[tuple[str, bytes | None]]:
    """Yield the images to keep, in order. They are read in batches, because full-size images may not fit into memory together."""
    start = 0
    for file in files:
        batches = _open(file).iter_batches(1024, columns=[image])
        while True:
            with _reading(file):
                batch = next(batches, None)
            if batch is None:
                break
            cells = batch.column(0)
            cells = cells.field("bytes") if pa.types.is_struct(cells.type) else cells
            for i in np.flatnonzero(keep[start : start + len(cells)]):
                yield f"{file.name}, row {start + i} of the pool", cells[int(i)].as_py()
            start += len(cells)
