"""Read tables as text, or with the types of parquet. This module infers no types; `table_columns.py` does."""

from __future__ import annotations

import csv
import gzip
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from fedloom.data.layouts import ClassNames
from fedloom.errors import DataError, first_line

_SEPARATORS = ",;\t|"


@dataclass(frozen=True, kw_only=True)
class RawTable:
    """The rows of all files, training rows first.

    Columns are text (from text files, and parquet's booleans), float64 (parquet's numbers) or categorical (parquet's strings and
    dictionaries). `lines` contains the line number of each row in its file, and `file_of` the number of that file.
    `names` contains class names, for columns of class numbers.
    """

    frame: pd.DataFrame
    files: tuple[Path, ...]
    file_of: npt.NDArray[np.int64]
    lines: npt.NDArray[np.int64]
    n_train: int
    names: ClassNames = field(default_factory=dict)

    def named(self, column: str) -> pd.Series[Any]:
        """Return a column. Class numbers become categories, which are the names of the classes, in their order; -1 means no class."""
        values, names = self.frame[column], self.names.get(column)
        if names is None or isinstance(values.dtype, pd.CategoricalDtype) or len(set(names)) < len(names):
            return values
        present = values[values.notna() & (values != "")]
        numbers = pd.to_numeric(present, errors="coerce")
        if not numbers.isin(range(-1, len(names))).all():  # values outside the range of the metadata
            return values
        codes = numbers.reindex(values.index, fill_value=-1).astype(np.int64)
        return pd.Series(pd.Categorical.from_codes(codes.to_numpy(), categories=pd.Index(names)), index=values.index)

    def place(self, row: int) -> str:
        """Return the file and the line (or row) number of a row, for messages."""
        file = self.files[self.file_of[row]]
        unit = "row" if file.suffix == ".parquet" else "line"
        return f"{file.name}, {unit} {self.lines[row]}"

    def taken(self, order: npt.NDArray[Any], n_train: int) -> RawTable:
        """Return a table that contains some of the rows, in the given order."""
        frame = self.frame.iloc[order].reset_index(drop=True)
        return replace(self, frame=frame, file_of=self.file_of[order], lines=self.lines[order], n_train=n_train)


def read_files(
    train: Sequence[Path], test: Sequence[Path], encoding: str | None, names: ClassNames | None = None
) -> RawTable:
    """Read all files of a table. Raise DataError if a file is malformed, or if its columns differ from those of the first file.

    `names` contains class names by column, for files without class names in their metadata.
    """
    files = (*train, *test)
    parts = [_parquet(file) if file.suffix == ".parquet" else _text(file, encoding) for file in files]
    columns = list(parts[0][0].columns)
    for file, (frame, _) in zip(files, parts, strict=True):
        for name in columns:
            if name not in frame.columns:
                raise DataError(f"{file}: column '{name}' is missing, but {files[0].name} has it")
        for name in frame.columns:
            if name not in columns:
                raise DataError(f"{file}: column '{name}' is not in {files[0].name}; remove it")
    sizes = [len(frame) for frame, _ in parts]
    frame = parts[0][0] if len(parts) == 1 else _joined([part[columns] for part, _ in parts])
    if not sum(sizes[: len(train)]):
        raise DataError(f"{files[0]} has no rows")
    return RawTable(
        frame=frame,
        files=files,
        file_of=np.repeat(np.arange(len(files)), sizes),
        lines=np.concatenate([lines for _, lines in parts]),
        n_train=sum(sizes[: len(train)]),
        names={**(names or {}), **_own_names(files[0])},
    )


def _own_names(file: Path) -> ClassNames:
    """Return the class names in the metadata of a parquet file. Other files have none."""
    if file.suffix != ".parquet":
        return {}
    from fedloom.data.parquet import class_names  # Pillow is slow to import

    return {column.strip(): names for column, names in class_names(pq.read_schema(file)).items()}


def _joined(frames: list[pd.DataFrame]) -> pd.DataFrame:
    """Return the rows of all frames. The levels of a categorical column are those of the first frame, followed by new levels."""
    columns: dict[str, Any] = {}
    for name in frames[0].columns:
        parts = [frame[name] for frame in frames]
        if {str(part.dtype) for part in parts} == {"category"}:
            levels = list(dict.fromkeys(level for part in parts for level in part.cat.categories))
            parts = [part.cat.set_categories(levels) for part in parts]
        elif len({part.dtype for part in parts}) > 1:
            raise DataError(f"column '{name}' has different types in the files; write all files with the same types")
        columns[str(name)] = pd.concat(parts, ignore_index=True)
    return pd.DataFrame(columns)


def _text(file: Path, encoding: str | None) -> tuple[pd.DataFrame, npt.NDArray[np.int64]]:
    """Return the columns of a text file as stripped text, and the line number of each row."""
    encoding = encoding or "utf-8-sig"
    with _reading(file, encoding):
        separator = "\t" if ".tsv" in file.suffixes else _separator(file, encoding)
        names, lines = _scanned(file, separator, encoding)
        frame = pd.read_csv(
            file,
            sep=separator,
            dtype=str,
            keep_default_na=False,
            na_filter=False,
            index_col=False,
            encoding=encoding,
            skipinitialspace=True,
        )
    if len(frame) != len(lines) or len(frame.columns) != len(names):
        raise DataError(f'{file}: rows cannot be told apart; check the quotes (") in the file')
    frame.columns = pd.Index(names)
    return frame.apply(lambda column: column.str.strip()) if len(frame) else frame, lines


def _separator(file: Path, encoding: str) -> str:
    """Return the separator with which the header has the most fields."""
    with _opened(file, encoding) as stream:
        header = next((line for line in stream if line.strip()), "")
    counts = {mark: len(next(csv.reader([header], delimiter=mark), [])) for mark in _SEPARATORS}
    return max(_SEPARATORS, key=lambda mark: counts[mark])


def _scanned(file: Path, separator: str, encoding: str) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Return the column names, and the number of the first line of each row.

    Raise DataError unless every row has one field per column.
    """
    names: list[str] = []
    lines: list[int] = []
    with _opened(file, encoding) as stream:
        reader, line = csv.reader(_ended(stream, file), delimiter=separator, skipinitialspace=True), 1
        for fields in reader:
            if fields and not names:
                names = _checked_names([field.strip() for field in fields], f"{file}, line {line}")
            elif fields and len(fields) != len(names):
                raise DataError(
                    f"{file}, line {line} has {len(fields)} fields, but the header has {len(names)} names; remove a "
                    f"'{separator}' at the end of the line, or put values that contain it in quotes"
                )
            elif fields:
                lines.append(line)
            line = reader.line_num + 1
    if not names:
        raise DataError(f"{file} is empty")
    return names, np.array(lines, np.int64)


def _ended(stream: TextIO, file: Path) -> Iterator[str]:
    """Yield the lines of a file. Raise DataError if a line ends in a carriage return alone, which parsers treat differently."""
    for number, line in enumerate(stream, start=1):
        if line.endswith("\r"):
            raise DataError(
                f"{file}, line {number}: ends in a carriage return without a line feed; convert the line ends"
            )
        yield line


def _checked_names(names: list[str], where: str) -> list[str]:
    for i, name in enumerate(names, start=1):
        if not name:
            raise DataError(f"{where}: column {i} has no name; name it, or remove a separator at the end of each line")
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise DataError(f"{where}: {count} columns are called '{name}'; rename all but one")
    if all(name.replace(".", "", 1).lstrip("+-").isdecimal() for name in names):
        raise DataError(f"{where} has numbers instead of column names; add a line with the names")
    return names


def _opened(file: Path, encoding: str) -> TextIO:
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding=encoding, newline="")
    return file.open(encoding=encoding, newline="")


@contextmanager
def _reading(file: Path, encoding: str) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}, line {_bad_line(file, error.encoding)} is not encoded as {encoding}; if it is Latin-1, set "
            "data.encoding=latin-1"
        ) from error
    except LookupError as error:
        raise DataError(f"data.encoding={encoding}: unknown encoding; use utf-8, latin-1 or another one") from error
    except (OSError, EOFError, zlib.error, csv.Error, pd.errors.ParserError, UnicodeError) as error:
        raise DataError(f"{file} cannot be read as a table ({first_line(error)})") from error


def _bad_line(file: Path, encoding: str) -> int:
    """Return the number of the first line that cannot be decoded."""
    with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                line.decode(encoding)
            except UnicodeDecodeError:
                return number
    return 1


def _parquet(file: Path) -> tuple[pd.DataFrame, npt.NDArray[np.int64]]:
    """Return the columns of a parquet file with their own types, and the number of each row, from 1."""
    try:
        table = pq.read_table(file)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} cannot be read as a parquet file ({first_line(error)})") from error
    names = _checked_names([name.strip() for name in table.column_names], str(file))
    columns = {name: own_type(table.column(i), file, name) for i, name in enumerate(names)}
    return pd.DataFrame(columns), np.arange(1, table.num_rows + 1)


def own_type(values: Any, file: Path | str, name: str) -> pd.Series[Any]:
    """Return a pyarrow column as float64, text or categorical values."""
    kind = values.type
    if pa.types.is_dictionary(kind):
        found: pd.Series[Any] = values.to_pandas()
        return found.cat.rename_categories([str(level) for level in found.cat.categories])
    if pa.types.is_boolean(kind):
        return pd.Series([{True: "true", False: "false", None: ""}[v] for v in values.to_pylist()], dtype=str)
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return pd.Series([np.nan if v is None else float(v) for v in values.to_pylist()], dtype=np.float64)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        words = pd.Series(values.to_pylist(), dtype=object).str.strip()
        return pd.Series(pd.Categorical(words, categories=sorted(set(words.dropna()))))
    if pa.types.is_temporal(kind):  # the rules for text refuse dates and name the remedy
        return pd.Series(["" if v is None else str(v) for v in values.cast(pa.string()).to_pylist()], dtype=str)
    if pa.types.is_null(kind):
        return pd.Series([""] * len(values), dtype=str)
    raise DataError(f"{file}: column '{name}' has type {kind}, which a table cannot hold; remove it from the file")
