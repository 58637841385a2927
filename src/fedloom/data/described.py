"""Tables that are read by an existing `preprocess.json`.

Types of columns, vocabularies and scaling come from the file, not from the data.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from fedloom.data.dataset import Dataset, validated
from fedloom.data.layouts import NO_TEXT, Files, Request, TextOptions
from fedloom.data.preprocess import CategoryInput, Given, NumberInput, TableFormat
from fedloom.data.raw_inputs import TableRows, column_ids, column_numbers, is_table, table_inputs
from fedloom.data.raw_targets import table_targets
from fedloom.data.subset import choose_rows
from fedloom.data.table_files import RawTable, read_files
from fedloom.data.tables import by_split, check_named, column_names, known_texts, language_table, split_column, title
from fedloom.errors import DataError, suggest

SHOWN = 5  # maximum number of levels in a message


def described_table(asked: Request, given: Given, files: Files) -> Dataset:
    """Return the data set in the files of a table, with the inputs and targets that `given` describes.

    Raises:
        DataError: a column is missing or new, a value is not a level of its column or a class, or `given` contains no replacement for a
            missing value.
    """
    described, options = given.preprocess, asked.table
    coder, form = described.coder, described.table or TableFormat()
    inputs = [column.name for part in described.inputs for column in getattr(part, "columns", ())]
    inputs += coder.columns if coder else ()
    if not inputs:
        raise DataError(f"{files[0][0]} is a table, but the inputs of {given.where} are {described.spec}")
    raw = read_files(*files, form.encoding)
    check_named([str(name) for name in raw.frame.columns], replace(options, drop=()), NO_TEXT, title(raw))
    _check_columns(raw, [*form.labels, *inputs], asked, given)
    if described.objective.task == "language" and coder:
        texts = TextOptions(text=coder.columns)
        return language_table(asked.name, raw, options, rows=asked.rows, texts=texts, coder=coder)
    split = options.split or split_column(raw, replace(options, columns=(*form.labels, *inputs)))
    raw = by_split(raw, split) if split else raw
    keep, n_train = choose_rows(asked.name, _known(raw, given, options.missing), raw.n_train, asked.rows)
    raw = raw.taken(np.flatnonzero(keep), n_train)
    rows = TableRows(raw.frame, raw.place)
    owner = options.owner or ("client" if "client" in raw.frame.columns and "client" not in inputs else None)
    pool = Dataset.described(
        name=asked.name,
        inputs=table_inputs(described, rows),
        targets=table_targets(described, rows),
        n_train=n_train,
        objective=described.objective,
        parts=described.inputs,
        columns={name: column_names(raw, name) for name in dict.fromkeys((owner, options.by)) if name},
    )
    return validated(pool)


def _check_columns(raw: RawTable, needed: list[str], asked: Request, given: Given) -> None:
    """Raise DataError if a column is missing, or if there is a column that the preprocess.json does not mention."""
    names, options, form = list(raw.frame.columns), asked.table, given.preprocess.table or TableFormat()
    for column in needed:
        if column not in names:
            raise DataError(f"{title(raw)} lacks the column '{column}' of {given.where}{suggest(column, names)}")
    if not is_table(given.preprocess):
        return  # texts are chosen by name, so other columns have no effect
    known = {*needed, *form.others, *options.drop, options.split, options.owner, options.by, "client", "split"}
    if strange := next((name for name in names if name not in known), None):
        raise DataError(
            f"{title(raw)} has the column '{strange}', which is not in {given.where}; remove it (data.drop={strange}), or make a new "
            "preprocess.json with it"
        )


def _known(raw: RawTable, given: Given, missing: str) -> npt.NDArray[np.bool_]:
    """Return which rows (N,) to keep. Raise DataError if levels are unknown, or if values are missing and `missing` is not "drop"."""
    described, rows = given.preprocess, TableRows(raw.frame, raw.place)
    lacking = _lacking(rows, given)
    first = next((name for name, rows_without in lacking.items() if rows_without.any()), None)
    if first is not None and missing != "drop":
        n = sum(int(each.sum()) for each in lacking.values())
        raise DataError(
            f"{raw.place(int(lacking[first].argmax()))}, column '{first}': no value; {n:,} missing values in all, and {given.where} has "
            "none to fill in; set data.missing=drop (rows), or make it with data.missing=fill"
        )
    known: npt.NDArray[np.bool_] = ~np.any([np.zeros(len(raw.frame), dtype=bool), *lacking.values()], axis=0)
    if described.coder and (missing == "drop" or not is_table(described)):
        known &= known_texts(raw, described.coder.columns, missing)
    return known


def _lacking(rows: TableRows, given: Given) -> dict[str, npt.NDArray[np.bool_]]:
    """Return, for each column, the rows (N,) with missing values that cannot be filled.

    Raise DataError if there are unknown levels, and `given` does not accept them.
    """
    form, found = given.preprocess.table or TableFormat(), dict[str, npt.NDArray[np.bool_]]()
    for part in given.preprocess.inputs:
        if isinstance(part, NumberInput):
            found |= {c.name: np.isnan(column_numbers(rows, c.name, form)) for c in part.columns if c.fill is None}
        for column in part.columns if isinstance(part, CategoryInput) else ():
            ids = column_ids(column, rows, form)
            if ids.unknown and not given.accepts_unknown:
                levels = [level for level in column.levels if level]
                shown = ", ".join(levels[:SHOWN]) + (", ..." if len(levels) > SHOWN else "")
                raise DataError(
                    f"{rows.place(int(ids.is_unknown.argmax()))}, column '{column.name}': '{ids.unknown[0]}' is not among the levels in "
                    f"{given.where} ({shown}); correct it, or make a new preprocess.json with it"
                )
            if not given.accepts_unknown:
                found[column.name] = ids.ids == 0
    return found
