"""Users' own tables: the roles of their columns, and the data sets made from them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from fedloom.data.dataset import Column, Dataset, validated
from fedloom.data.layouts import NO_TEXT, SPLIT_WORDS, ClassNames, Files, TableOptions, TextOptions
from fedloom.data.parquet import LABELS
from fedloom.data.preprocess import (
    LARGEST,
    CategoryColumn,
    CategoryInput,
    NumberColumn,
    NumberInput,
    Part,
    TableFormat,
)
from fedloom.data.raw_inputs import TableRows, column_texts
from fedloom.data.subset import choose_rows
from fedloom.data.table_columns import TableColumn, check_levels, looks_like_id, typed
from fedloom.data.table_files import RawTable, read_files
from fedloom.data.table_targets import labelled
from fedloom.data.targets import objective_for
from fedloom.data.text import TextCoder
from fedloom.data.text_sets import Documents, coded_texts, language_set, tell
from fedloom.errors import DataError, suggest
from fedloom.inputs import Inputs

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Roles:
    """The names of the columns, by role."""

    labels: tuple[str, ...]
    owner: str | None
    inputs: tuple[str, ...]
    chosen: bool  # whether the user lists the input columns


def read_table(
    name: str,
    files: Files,
    options: TableOptions,
    *,
    task: str | None,
    rows: int | None,
    texts: TextOptions = NO_TEXT,
    names: ClassNames | None = None,
) -> Dataset:
    """Return the data set in the files of a table.

    Inputs are `numbers` (N, D), float32, and `categories` (N, C), integers, or the numbers alone as one tensor. A category is 1 or more; 0
    stands for values that do not occur in the table. Texts are one tensor of token ids, or `text` (N, T) if there are other inputs.

    Args:
        name: name of the data set.
        files: training and test files.
        options: see `TableOptions`.
        task: learning task; by default, it is derived from the label column.
        rows: number of training examples to keep.
        texts: the columns that contain texts, which become token ids. Other columns are then inputs only if `options.columns` lists them.
        names: class names by column, for files without class names in their metadata.

    Raises:
        DataError: the files are malformed, the type of a column is unclear, or values are missing.
    """
    return table_dataset(name, read_files(*files, options.encoding, names), options, task=task, rows=rows, texts=texts)


def table_dataset(
    name: str,
    raw: RawTable,
    options: TableOptions,
    *,
    task: str | None,
    rows: int | None,
    texts: TextOptions = NO_TEXT,
) -> Dataset:
    """Return the data set in the rows of a table; see `read_table`."""
    if texts.text and task == "language":
        return language_table(name, raw, options, rows=rows, texts=texts)
    raw, roles = _divided(raw, options, texts)
    file = title(raw)
    columns = [_typed(raw, column, options) for column in roles.inputs]
    columns = [column for column in columns if _is_input(column, raw.n_train, file, roles.chosen)]
    if not columns and not texts.text:
        raise DataError(f"{file}: no input columns are left; all other columns are labels or owners, dropped, or empty")
    labels = [_typed(raw, column, options, raw.named(column)) for column in roles.labels]
    _refuse_missing(raw, labels, "labels must be present; remove these rows")
    known = _known(raw, columns, options.missing)
    if not (columns and options.missing == "fill"):  # with other inputs, an empty text becomes an unknown token
        known &= known_texts(raw, texts.text, options.missing)
    keep, n_train = choose_rows(name, known, raw.n_train, rows)
    if not n_train:
        raise DataError(f"{file}: no training example is without missing values; set data.missing=fill")
    targets, names, task = labelled(labels, task, file)
    values, objective = objective_for(task, torch.from_numpy(targets[keep]), n_train, names=names)
    columns = [replace(column, values=column.values[keep]) for column in columns]
    inputs, parts = column_inputs(columns, n_train, file, fills=options.missing == "fill", alone=not texts.text)
    if texts.text:
        chosen = raw.taken(np.flatnonzero(keep), n_train)
        ids, part = coded_texts(raw_texts(chosen, texts.text), n_train, texts, name="text" if columns else "")
        inputs, parts = ({**inputs, "text": ids}, (*parts, part)) if columns else (ids, (part,))  # type: ignore[dict-item]
    used = {*texts.text, *(column.name for column in columns)}
    pool = Dataset.described(
        name=name,
        inputs=inputs,
        targets=values,
        n_train=n_train,
        objective=objective,
        parts=parts,
        table=TableFormat(
            labels=roles.labels,
            others=tuple(str(c) for c in raw.frame.columns if c not in used),
            missing_values=options.missing_values,
            decimal=options.decimal,
            encoding=options.encoding,
        ),
        columns={c: column_names(raw, c)[keep] for c in dict.fromkeys((roles.owner, options.by)) if c},
        normalise="standard" if any(column.kind == "number" for column in columns) or not texts.text else None,
    )
    if texts.text and not columns:
        return tell(pool)
    _tell(file, pool, columns, roles)
    return validated(pool)


def language_table(
    name: str,
    raw: RawTable,
    options: TableOptions,
    *,
    rows: int | None,
    texts: TextOptions,
    coder: TextCoder | None = None,
) -> Dataset:
    """Return blocks of the texts in a table, in which every row is a document. `coder` is as for `language_set`."""
    if options.columns:
        raise DataError(
            f"data.columns={','.join(options.columns)}: with data.task=language, the texts are the only inputs; remove it"
        )
    names, file = [str(name) for name in raw.frame.columns], title(raw)
    check_named(names, options, texts, file)
    split = options.split or split_column(raw, replace(options, columns=texts.text))
    raw = by_split(raw, split) if split else raw
    owner = options.owner or ("client" if "client" in names else None)
    known = known_texts(raw, texts.text, options.missing)
    documents = Documents(
        texts=raw_texts(raw.taken(np.flatnonzero(known), 0), texts.text),
        owners=column_names(raw, owner)[known].tolist() if owner else None,
        is_test=np.flatnonzero(known) >= raw.n_train,
    )
    return language_set(name, documents, texts, rows=rows, coder=coder)


def raw_texts(raw: RawTable, columns: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the texts of all rows, with one part per column."""
    return column_texts(TableRows(raw.frame, raw.place), columns)


def known_texts(raw: RawTable, columns: Sequence[str], missing: str) -> npt.NDArray[np.bool_]:
    """Return which rows (N,) have text in at least one of the columns, or all rows if there are no columns.

    Raise DataError if rows have no text, and `missing` is not "drop".
    """
    if not columns:
        return np.ones(len(raw.frame), dtype=bool)
    known = np.array([any(part.strip() for part in parts) for parts in raw_texts(raw, columns)])
    if not known.all() and missing != "drop":
        place, n = raw.place(int((~known).argmax())), int((~known).sum())
        raise DataError(
            f"{place}, column '{columns[0]}': no text; in all, {n:,} rows have no text; set data.missing=drop to drop them"
        )
    return known


def title(raw: RawTable) -> str:
    """Return the names of a table's files, for messages."""
    return " + ".join(file.name for file in raw.files)


def _divided(raw: RawTable, options: TableOptions, texts: TextOptions = NO_TEXT) -> tuple[RawTable, _Roles]:
    """Return the table with training rows first, and the roles of its columns."""
    names, file = [str(name) for name in raw.frame.columns], title(raw)
    check_named(names, options, texts, file)
    given, options = options.columns, replace(options, columns=(*options.columns, *texts.text))
    split = options.split or split_column(raw, options)
    owner = options.owner or ("client" if "client" in names and "client" not in options.columns else None)
    labels = _labels(names, options, file)
    taken = [*labels, *options.drop, *(column for column in (split, owner) if column)]
    column, count = Counter([*taken, *options.columns]).most_common(1)[0]
    if count > 1:
        raise DataError(
            f"{file}: column '{column}' is named more than once; it can be in one of data.label, data.text, data.columns, data.drop, "
            "data.split and partition.column"
        )
    inputs = given or (() if texts.text else tuple(name for name in names if name not in taken))
    roles = _Roles(labels=labels, owner=owner, inputs=inputs, chosen=bool(given))
    return (by_split(raw, split) if split else raw), roles


def check_named(names: Sequence[str], options: TableOptions, texts: TextOptions, file: str) -> None:
    """Raise DataError if the user names a column that does not exist."""
    wanted: dict[str, tuple[str | None, ...]] = {
        "data.label": _listed(options),
        "data.text": texts.text,
        "data.columns": options.columns,
        "data.drop": options.drop,
        "data.split": (options.split,),
        "partition.column": (options.owner,),
        "partition.by": (options.by,),
    }
    for key, columns in wanted.items():
        for column in columns:
            if column and column not in names:
                raise DataError(f"{key}={column}: {file} has no such column{suggest(column, names)}")


def _listed(options: TableOptions) -> tuple[str, ...]:
    return tuple(part.strip() for part in options.label.split(",") if part.strip()) if options.label else ()


def _labels(names: list[str], options: TableOptions, file: str) -> tuple[str, ...]:
    """Return the label columns: those that the user names, or the only column with a usual name."""
    if listed := _listed(options):
        return listed
    found = [name for name in names if name in LABELS and name not in (*options.drop, *options.columns)]
    if len(found) == 1:
        return (found[0],)
    why = f"{' and '.join(found)} could all be labels" if found else f"no column is called {', '.join(LABELS)}"
    raise DataError(f"{file}: {why}; set data.label to one of its columns: {', '.join(names)}")


def split_column(raw: RawTable, options: TableOptions) -> str | None:
    """Return "split" if a column has this name and names the split of every row."""
    named = (*options.columns, *options.drop, *_listed(options), options.owner)
    if "split" not in raw.frame.columns or "split" in named or raw.n_train < len(raw.frame):
        return None
    words = {str(value).lower() for value in raw.frame["split"].unique()}
    return "split" if words <= set(SPLIT_WORDS) and "train" in map(SPLIT_WORDS.get, words) else None


def by_split(raw: RawTable, column: str) -> RawTable:
    """Return the rows ordered by split, training rows first. Without test rows, validation rows are the test set."""
    if raw.n_train < len(raw.frame):
        raise DataError(f"data.split={column}: {title(raw)} already has a test file; remove data.split, or the file")
    words = np.char.lower(column_names(raw, column))
    for row, word in enumerate(words.tolist()):
        if word not in SPLIT_WORDS:
            raise DataError(f"{raw.place(row)}, column '{column}': '{word}' is not a split; use train, valid or test")
    splits = np.array([SPLIT_WORDS[word] for word in words.tolist()])
    valid, test = splits == "valid", splits == "test"
    if not test.any():
        valid, test = test, valid
    if valid.any():
        log.warning(
            "%s: %d validation rows are used as training examples; to hold out validation examples, set eval.valid",
            title(raw),
            valid.sum(),
        )
    if test.all():
        raise DataError(f"data.split={column}: {title(raw)} has no training rows")
    order = np.concatenate([np.flatnonzero(~test), np.flatnonzero(test)])
    return raw.taken(order, int((~test).sum()))


def column_names(raw: RawTable, column: str) -> Column:
    """Return a column's values as text. Raise DataError if one is missing."""
    values = raw.named(column)
    if values.dtype == np.float64:
        words = ["" if np.isnan(v) else str(int(v)) if v == np.rint(v) else str(v) for v in values.tolist()]
    else:
        words = ["" if pd.isna(value) else str(value) for value in values.tolist()]
    if "" in words:
        raise DataError(f"{raw.place(words.index(''))}, column '{column}' has no value, but every row needs one")
    return np.array(words, np.str_)


def _typed(raw: RawTable, column: str, options: TableOptions, values: pd.Series[Any] | None = None) -> TableColumn:
    return typed(
        column,
        raw.frame[column] if values is None else values,
        file=title(raw),
        decimal=options.decimal,
        missing_values=options.missing_values,
    )


def _is_input(column: TableColumn, n_train: int, file: str, chosen: bool) -> bool:
    """Return whether a column is used. If it is not, log the reason."""
    if column.missing.all():
        log.warning("%s, column '%s' is empty and is dropped", file, column.name)
        return False
    why = None if chosen else looks_like_id(column, n_train)
    if why:
        log.warning(
            "%s, column '%s': %s, like an identifier, and is dropped (to use it, list all input columns in data.columns)",
            file,
            column.name,
            why,
        )
        return False
    check_levels(column, file)
    return True


def _known(raw: RawTable, columns: Sequence[TableColumn], missing: str) -> npt.NDArray[np.bool_]:
    """Return which rows to keep. Raise DataError if values are missing and `missing` is "refuse"."""
    if not columns:
        return np.ones(len(raw.frame), dtype=bool)
    if missing == "refuse":
        _refuse_missing(raw, columns, "set data.missing=drop (rows) or fill, or data.drop=COLUMN")
    lacking: npt.NDArray[np.bool_] = np.any([column.missing for column in columns], axis=0)
    if missing == "drop" and lacking.any():
        log.warning("%s: %s rows with missing values are dropped", title(raw), f"{int(lacking.sum()):,}")
        return ~lacking
    return np.ones(len(lacking), dtype=bool)


def _refuse_missing(raw: RawTable, columns: Sequence[TableColumn], remedy: str) -> None:
    lacking = np.stack([column.missing for column in columns], axis=1)
    places = [f"{raw.place(row)}, column '{columns[i].name}'" for row, i in np.argwhere(lacking)[:3].tolist()]
    if places:
        raise DataError(f"{'; '.join(places)}: no value; {int(lacking.sum()):,} missing values in all; {remedy}")


TypedInputs = tuple[Inputs, tuple[Part, ...]]
"""Inputs, and a description of how they were made from columns."""


def column_inputs(
    columns: Sequence[TableColumn], n_train: int, file: str, *, fills: bool = False, alone: bool = True
) -> TypedInputs:
    """Return `numbers` and `categories`, or the numbers alone as one tensor.

    `fills` states whether missing numbers become the training mean, and `alone` whether there are no other inputs.
    """
    numbers = [column for column in columns if column.kind == "number"]
    categories = [_with_missing(column) for column in columns if column.kind == "category"]
    inputs, parts = dict[str, torch.Tensor](), list[Part]()
    if numbers:
        made = [_number_column(column, n_train, file, fills=fills) for column in numbers]
        stored = [values for c, column in zip(made, numbers, strict=True) for values in c.filled(column.values)]
        name = "numbers" if categories or not alone else ""
        inputs[name] = torch.from_numpy(np.stack(stored, axis=1))
        parts.append(NumberInput(name=name, shape=(len(stored),), columns=tuple(made)))
    if categories:
        levels = tuple(len(column.levels) for column in categories)
        named = tuple(CategoryColumn(name=column.name, levels=column.levels) for column in categories)
        parts.append(CategoryInput(name="categories", shape=(len(levels),), levels=levels, columns=named))
        ids = np.stack([column.values + 1 for column in categories], axis=1)
        inputs["categories"] = torch.from_numpy(ids.astype(np.uint8 if max(levels) < 256 else np.int16))
    return inputs.get("", inputs), tuple(parts)


def _number_column(column: TableColumn, n_train: int, file: str, *, fills: bool) -> NumberColumn:
    """Return how a column of numbers is made.

    If values are missing, the training mean replaces them, and an additional column marks them.
    """
    values, lacking = column.values, column.missing
    if (~lacking).any() and np.nanmax(np.abs(values)) > LARGEST:
        raise DataError(f"{file}, column '{column.name}' has a number too large for float32; rescale it")
    present = values[:n_train][~lacking[:n_train]]
    fill = (float(present.mean()) if len(present) else 0.0) if fills else None
    words = (column.levels[0], column.levels[1]) if column.levels else ()
    return NumberColumn(name=column.name, words=words, fill=fill, marked=bool(lacking.any()))


def _with_missing(column: TableColumn) -> TableColumn:
    """Return a column of categories in which missing values have their own level, the first one."""
    if not column.missing.any():
        return column
    return replace(column, values=column.values + 1, levels=("", *column.levels))


def _tell(file: str, pool: Dataset, columns: Sequence[TableColumn], roles: _Roles) -> None:
    """Log how the table was interpreted."""
    n_test, kinds = pool.n_rows - pool.n_train, [str(column.kind) for column in columns]
    found = [f"{pool.n_rows:,} rows" + (f" ({pool.n_train:,} train + {n_test:,} test)" if n_test else "")]
    for kind, plural in (("number", "numbers"), ("category", "categories")):
        if n := kinds.count(kind):
            found.append(f"{n} {plural if n > 1 else kind}")
    if text := pool.spec.of("token"):
        found.append(f"text of {text.shape[0]} tokens of {text.levels[0]:,} different")
    what = f"{pool.n_classes} classes" if pool.objective.task == "classification" else pool.objective.task
    found.append(f"label {', '.join(roles.labels)} ({what})")
    if roles.owner:
        found.append(f"owner {roles.owner} ({len(np.unique(pool.columns[roles.owner])):,})")
    log.warning("%s: %s", file, ", ".join(found))
