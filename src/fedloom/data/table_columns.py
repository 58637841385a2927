"""Decide whether a table column contains numbers or categories. The decision depends on the whole column, never on its first rows."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from fedloom.errors import DataError

log = logging.getLogger(__name__)

BLANK = frozenset({"", "?"})
"""Missing values, in all columns."""
NO_NUMBER = frozenset({"NA", "N/A", "NaN", "nan", "null", "None"})
"""Missing values in columns whose other values are all numbers."""
MAX_LEVELS = 1000
LARGEST_EXACT = 2**24
"""Up to this value, float32 represents every integer exactly."""

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_GROUPED = re.compile(r"[+-]?(\d{1,3}(,\d{3})+|\d+|(?=\.\d))(\.\d*)?([eE][+-]?\d+)?", re.ASCII)
_CODE = re.compile(r"0\d+", re.ASCII)
_DATE = re.compile(r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d+)?)?( ?(Z|[+-]\d\d:?\d\d))?)?", re.ASCII)
_TRUTH = (("false", "true"), ("no", "yes"))
_SWAPPED = str.maketrans(",.", ".,")


@dataclass(frozen=True, kw_only=True)
class TableColumn:
    """A column with its type.

    `values` are float64 numbers, with NaN for missing values, or positions (N,) in `levels`, with -1 for missing values. A column of two
    words for false and true contains the numbers 0 and 1, and `levels` contains the words.
    """

    name: str
    kind: Literal["number", "category"]
    values: npt.NDArray[Any]
    levels: tuple[str, ...] = ()

    @property
    def missing(self) -> npt.NDArray[np.bool_]:
        """Whether each value is missing (N,)."""
        found: npt.NDArray[np.bool_] = self.values < 0 if self.kind == "category" else np.isnan(self.values)
        return found

    @property
    def is_whole(self) -> bool:
        """Whether all numbers are integers."""
        present = self.values[~self.missing]
        return self.kind == "number" and bool((present == np.rint(present)).all())


def typed(
    name: str, values: pd.Series[Any], *, file: str, decimal: str | None = None, missing_values: Sequence[str] = ()
) -> TableColumn:
    """Return a column with its type. Raise DataError for dates, and for numbers with commas unless `decimal` is set."""
    blank = BLANK | set(missing_values)
    if isinstance(values.dtype, pd.CategoricalDtype):
        levels = [str(level) for level in values.cat.categories]
        return _category(name, values.cat.codes.to_numpy().astype(np.int64), levels, blank, ordered=True)
    if values.dtype == np.float64:
        numbers = values.to_numpy(copy=True)
        numbers[np.isin(numbers, [float(word) for word in missing_values if _NUMBER.fullmatch(word)])] = np.nan
        if np.isinf(numbers).any():
            raise DataError(f"{file}, column '{name}' has infinite values; remove or replace them")
        return TableColumn(name=name, kind="number", values=numbers)
    codes, found = pd.factorize(values)
    words = [str(word) for word in found]
    return _from_words(name, codes.astype(np.int64), words, blank=blank, file=file, decimal=decimal)


def _from_words(
    name: str,
    codes: npt.NDArray[np.int64],
    words: list[str],
    *,
    blank: frozenset[str] | set[str],
    file: str,
    decimal: str | None,
) -> TableColumn:
    no_number = blank | NO_NUMBER
    rest = [word for word in words if word not in no_number]
    if rest and all(_plain(word, decimal) is not None for word in rest):
        if coded := next((word for word in rest if _CODE.fullmatch(word)), None):
            log.warning(
                "%s, column '%s' has leading zeros (%s), so its values are used as categories", file, name, coded
            )
            return _category(name, codes, words, no_number)
        table = [np.nan if word in no_number else float(_plain(word, decimal) or "nan") for word in words]
        numbers = np.array(table, np.float64)
        if np.isinf(numbers).any():
            raise DataError(f"{file}, column '{name}' has a number too large for float64; remove it")
        return TableColumn(name=name, kind="number", values=numbers[codes])
    if decimal is None and rest and all(_plain(word, ".") or _plain(word, ",") for word in rest):
        comma = next(word for word in rest if "," in word)
        raise DataError(
            f"{file}, column '{name}' has numbers with commas ({comma}); set data.decimal=. if commas separate thousands, "
            "or data.decimal=, if they are decimal commas"
        )
    present = [word for word in words if word not in blank]
    for pair in _TRUTH:
        if {word.lower() for word in present} == set(pair):
            table = [pair.index(word.lower()) if word.lower() in pair else np.nan for word in words]
            levels = tuple(next(word for word in present if word.lower() == truth) for truth in pair)
            return TableColumn(name=name, kind="number", values=np.array(table, np.float64)[codes], levels=levels)
    if present and all(_DATE.fullmatch(word) for word in present):
        raise DataError(
            f"{file}, column '{name}' has dates ({present[0]}); derive numbers from it, or set data.drop={name}"
        )
    return _category(name, codes, words, blank)


def number_of(word: str, decimal: str | None, blank: Collection[str]) -> float | None:
    """Return the number that a word stands for: NaN if it is missing, 0 or 1 for false and true, and None if it is not a number."""
    if word in blank or word in NO_NUMBER:
        return math.nan
    if (plain := _plain(word, decimal)) is not None:
        return float(plain)
    return next((float(pair.index(word.lower())) for pair in _TRUTH if word.lower() in pair), None)


def is_number(word: str) -> bool:
    """Return whether a word is a number in Python's notation."""
    return _NUMBER.fullmatch(word) is not None


def _plain(word: str, decimal: str | None) -> str | None:
    """Return a number in Python's notation, or None if the word is not a number."""
    if decimal is None:
        return word if _NUMBER.fullmatch(word) else None
    word = word.translate(_SWAPPED) if decimal == "," else word
    return word.replace(",", "") if _GROUPED.fullmatch(word) else None


def _category(
    name: str,
    codes: npt.NDArray[np.int64],
    words: list[str],
    blank: frozenset[str] | set[str],
    *,
    ordered: bool = False,
) -> TableColumn:
    """Return a column of categories. Levels are sorted as strings, unless their order is given."""
    present = [word for word in words if word not in blank]
    levels = present if ordered else sorted(present)
    places = {word: i for i, word in enumerate(levels)}
    table = np.array([*(places.get(word, -1) for word in words), -1], np.int64)  # the last entry is for code -1
    return TableColumn(name=name, kind="category", values=table[codes], levels=tuple(levels))


def looks_like_id(column: TableColumn, n_train: int) -> str | None:
    """Return the reason why integers look like an identifier, or None."""
    present = column.values[~column.missing]
    if column.kind != "number" or not column.is_whole or not len(present):
        return None
    if float(np.abs(present).max()) > LARGEST_EXACT:
        return f"has integers above {LARGEST_EXACT:,}"
    parts = [part for part in (column.values[:n_train], column.values[n_train:]) if len(part)]
    rising = all(bool((np.diff(part) > 0).all()) for part in parts) and len(parts[0]) > 2
    return "rises from row to row" if rising else None


def check_levels(column: TableColumn, file: str) -> None:
    """Raise DataError if a column of categories looks like free text."""
    n, levels = int((~column.missing).sum()), len(column.levels)
    if column.kind == "category" and n and (levels > MAX_LEVELS or 2 * levels >= n):
        raise DataError(
            f"{file}, column '{column.name}' has {levels:,} different values in {n:,} rows, which looks like free text; "
            f"categories may have at most {MAX_LEVELS:,}, and fewer than half as many as rows; set data.drop={column.name}"
        )
