"""Raw values of new examples in stored form: rows of a table, images or arrays, converted as `preprocess.json` describes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedloom.data.preprocess import (
    LARGEST,
    CategoryColumn,
    CategoryInput,
    NumberColumn,
    NumberInput,
    PictureInput,
    Preprocess,
    TableFormat,
    TokenInput,
)
from fedloom.data.text import TextCoder
from fedloom.errors import DataError, suggest
from fedloom.inputs import Inputs, tensors_of

if TYPE_CHECKING:
    import pandas as pd
    from PIL import Image

log = logging.getLogger(__name__)

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class TableRows:
    """New rows of a table. Columns are text, float64 or categorical (see `table_files.RawTable`). `place` names a row for messages."""

    frame: pd.DataFrame
    place: Callable[[int], str]

    def column(self, name: str) -> pd.Series[Any]:
        """Return a column. Raise DataError if it is missing."""
        if name not in self.frame.columns:
            names = [str(column) for column in self.frame.columns]
            raise DataError(f"inputs: the column '{name}' is missing{suggest(name, names)}")
        return self.frame[name]


def is_table(preprocess: Preprocess) -> bool:
    """Return whether inputs are numbers or categories from columns of a table."""
    return any(getattr(part, "columns", ()) for part in preprocess.inputs)


def stored_inputs(preprocess: Preprocess, raw: Any) -> Inputs:
    """Return raw inputs in the same stored form as the training examples. Raise DataError if they do not match the description.

    Args:
        preprocess: see `Preprocess`.
        raw: for tables, a file (.csv, .tsv, also .gz, or .parquet), a pandas table, or a dictionary with values or lists by column. For
            images, one or several files, Pillow images, or uint8 arrays (H, W), (H, W, C) or (C, H, W). For texts, one or several strings,
            text files, or a table. Otherwise, arrays as in training, for one or several examples, or an .npy or .npz file.
    """
    if is_table(preprocess):
        return table_inputs(preprocess, table_rows(preprocess, raw))
    first = preprocess.inputs[0]
    if isinstance(first, TokenInput) and first.text is not None and not _are_ids(raw):
        return first.text.stored(_raw_texts(first.text, preprocess, raw))
    if isinstance(first, PictureInput) and len(preprocess.inputs) == 1:
        return torch.from_numpy(np.stack([_picture(first, *named) for named in _pictures(first, raw)]))
    return _arrays(preprocess, raw)


# tables


def table_rows(preprocess: Preprocess, raw: Any) -> TableRows:
    """Return the rows of a table file, a pandas table, or a dictionary of columns. Raise DataError for anything else."""
    import pandas as pd

    files = _files(raw)
    if files:
        from fedloom.data.table_files import read_files

        for file in files:
            if not file.is_file():
                raise DataError(f"inputs: the file {file} does not exist")
        table = read_files(files, [], preprocess.table.encoding if preprocess.table else None)
        return TableRows(table.frame, table.place)
    if isinstance(raw, Mapping):
        is_row = not any(isinstance(value, list | tuple | np.ndarray | pd.Series) for value in raw.values())
        try:
            raw = pd.DataFrame([dict(raw)]) if is_row else pd.DataFrame(dict(raw))
        except ValueError as error:
            raise DataError(f"inputs: the columns do not form a table ({error})") from None
    if isinstance(raw, pd.Series):
        raw = pd.DataFrame([raw])
    if isinstance(raw, list) and raw and all(isinstance(row, Mapping) for row in raw):
        raw = pd.DataFrame(raw)
    if isinstance(raw, np.ndarray | Tensor):
        raw = _unnamed(preprocess, np.asarray(raw))
    if not isinstance(raw, pd.DataFrame):
        raise DataError(
            f"inputs: are {type(raw).__name__}; give a table: a file, a pandas table, or a dictionary of its columns"
        )
    if not len(raw):
        raise DataError("inputs: the table has no rows")
    from fedloom.data.frames import frame_columns

    return TableRows(frame_columns(raw), lambda row: f"row {row}")


def _unnamed(preprocess: Preprocess, values: Array) -> Any:
    """Return an array of numbers as a table, if all columns contain numbers."""
    import pandas as pd

    only = preprocess.inputs[0]
    names = [column.name for column in only.columns] if isinstance(only, NumberInput) else []
    values = values[None] if values.ndim == 1 else values
    if len(preprocess.inputs) > 1 or values.ndim != 2 or values.shape[1] != len(names):
        raise DataError("inputs: are an array; give a table with the columns of training, in any order")
    return pd.DataFrame(values, columns=names)


def table_inputs(preprocess: Preprocess, rows: TableRows) -> Inputs:
    """Return the rows of a table as stored inputs."""
    form, found = preprocess.table or TableFormat(), dict[str, Tensor]()
    used = {*form.others, *(preprocess.coder.columns if preprocess.coder else ())}
    for part in preprocess.inputs:
        if isinstance(part, NumberInput):
            columns = [values for c in part.columns for values in c.filled(_present(c, rows, form))]
            found[part.name] = torch.from_numpy(np.stack(columns, axis=1))
        elif isinstance(part, CategoryInput):
            ids = np.stack([_ids(column, rows, form) for column in part.columns], axis=1)
            found[part.name] = torch.from_numpy(ids.astype(np.uint8 if max(part.levels) < 256 else np.int16))
        elif isinstance(part, TokenInput) and part.text is not None:
            found[part.name] = part.text.stored(column_texts(rows, part.text.columns))
        used |= {column.name for column in getattr(part, "columns", ())}
    if extra := [str(name) for name in rows.frame.columns if name not in used]:
        log.warning("inputs: the columns %s are not used", ", ".join(extra))
    return found[""] if preprocess.spec.is_single else found


def _present(column: NumberColumn, rows: TableRows, form: TableFormat) -> Floats:
    """Return the numbers of a column, with NaN for missing values. Raise DataError if missing values cannot be filled."""
    values = column_numbers(rows, column.name, form)
    lacking = np.isnan(values)
    if lacking.any() and column.fill is None:
        raise DataError(
            f"{rows.place(int(lacking.argmax()))}, column '{column.name}': no value; {int(lacking.sum()):,} missing values in the column, "
            "and the run was trained without any; fill or remove them, or train with data.missing=fill"
        )
    if lacking.any() and not column.marked:
        log.warning("inputs: column '%s': missing values are filled with %g", column.name, column.fill)
    if not lacking.all() and float(np.nanmax(np.abs(values))) > LARGEST:
        raise DataError(f"inputs: column '{column.name}': has a number too large for float32")
    return values


def column_numbers(rows: TableRows, name: str, form: TableFormat) -> Floats:
    """Return the numbers of a column (N,), with NaN for missing values. Words for true and false are 1 and 0."""
    from fedloom.data.table_columns import BLANK, is_number, number_of

    series = rows.column(name)
    marks = BLANK | set(form.missing_values)
    if series.dtype == np.float64:
        values: Floats = series.to_numpy(copy=True)
        values[np.isin(values, [float(mark) for mark in marks if is_number(mark)])] = np.nan
        bad = np.isinf(values)
    else:
        codes, words = _words(series)
        table = [number_of(word, form.decimal, marks) for word in words]
        values = np.array([np.nan if value is None else value for value in [*table, np.nan]], np.float64)[codes]
        bad = np.array([value is None or np.isinf(value) for value in [*table, np.nan]])[codes]
    if bad.any():
        row = int(bad.argmax())
        raise DataError(f"{rows.place(row)}, column '{name}': '{series.iloc[row]}' is not a finite number")
    return values


def _ids(column: CategoryColumn, rows: TableRows, form: TableFormat) -> npt.NDArray[np.int64]:
    """Return the ids (N,) of a column of categories, from 1. Unknown values have id 0, and are logged."""
    found = column_ids(column, rows, form)
    if unknown := found.unknown:
        shown = ", ".join(f"'{word}'" for word in unknown[:3]) + (", ..." if len(unknown) > 3 else "")
        log.warning("inputs: column '%s': %s did not occur in training; it counts as unknown", column.name, shown)
    return found.ids


class ColumnIds(NamedTuple):
    """The ids (N,) of a column of categories, and its unknown words.

    `is_unknown` (N,) marks the rows whose word is not a level of the column, and `unknown` contains these words.
    """

    ids: npt.NDArray[np.int64]
    is_unknown: npt.NDArray[np.bool_]
    unknown: list[str]


def column_ids(column: CategoryColumn, rows: TableRows, form: TableFormat) -> ColumnIds:
    """Return the ids of a column of categories, from 1. Unknown values, and missing values without a level, have id 0."""
    from fedloom.data.table_columns import BLANK, NO_NUMBER, is_number

    codes, words = column_words(rows, column.name)
    places = {level: i for i, level in enumerate(column.levels, start=1)}
    blank = BLANK | set(form.missing_values)
    if all(is_number(level) for level in column.levels if level):
        blank |= NO_NUMBER  # a column of codes
    ids = [places.get("" if word in blank and word not in places else word, 0) for word in words]
    is_new = [not place and word not in blank for word, place in zip(words, ids, strict=True)]
    unknown = [word for word, new in zip(words, is_new, strict=True) if new]
    found = np.array([*ids, places.get("", 0)], np.int64)[codes]  # the last one is for code -1
    return ColumnIds(found, np.array([*is_new, False])[codes], unknown)


def column_words(rows: TableRows, name: str) -> tuple[npt.NDArray[np.int64], list[str]]:
    """Return a column as positions (N,) in a list of words, with -1 for missing values."""
    series = rows.column(name)
    if series.dtype == np.float64:
        numbers, found = np.unique(series.to_numpy(), return_inverse=True)
        words = ["" if np.isnan(v) else str(int(v)) if v == np.rint(v) else str(v) for v in numbers.tolist()]
        return found.astype(np.int64), words
    return _words(series)


def _words(series: pd.Series[Any]) -> tuple[npt.NDArray[np.int64], list[str]]:
    import pandas as pd

    if isinstance(series.dtype, pd.CategoricalDtype):
        return series.cat.codes.to_numpy().astype(np.int64), [str(level) for level in series.cat.categories]
    codes, found = pd.factorize(series)
    return codes.astype(np.int64), [str(word) for word in found]


# texts


def column_texts(rows: TableRows, columns: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the texts of all rows, with one part per column. A missing part is an empty string."""
    import pandas as pd

    parts = [["" if pd.isna(v) else str(v) for v in rows.column(name).tolist()] for name in columns]
    return list(zip(*parts, strict=True))


def _are_ids(raw: Any) -> bool:
    """Return whether raw inputs are arrays of token ids."""
    return isinstance(raw, np.ndarray | Tensor) and (isinstance(raw, Tensor) or raw.dtype.kind in "iu")


def _raw_texts(coder: TextCoder, preprocess: Preprocess, raw: Any) -> list[tuple[str, ...]]:
    """Return texts from one or several strings, text files, or the columns of a table."""
    if isinstance(raw, Path) or (isinstance(raw, str) and _names_file(raw)):
        raw = [Path(raw)]
    if isinstance(raw, str):
        raw = [raw]
    if isinstance(raw, list | tuple | np.ndarray) and len(raw) and all(isinstance(text, Path) for text in raw):
        if all(file.suffix.lower() == ".txt" for file in raw):
            from fedloom.data.text_sets import read_text

            return [(read_text(file.expanduser()),) for file in raw]
    elif hasattr(raw, "to_list") and not hasattr(raw, "columns"):
        raw = raw.to_list()
    if isinstance(raw, list | tuple | np.ndarray) and len(raw) and all(isinstance(text, str) for text in raw):
        return [(str(text),) for text in raw]
    if not coder.columns:
        raise DataError(f"inputs: are {type(raw).__name__}; give a text, a list of texts, or text files (.txt)")
    return column_texts(table_rows(preprocess, raw), coder.columns)


def _names_file(text: str) -> bool:
    """Return whether a string is the name of a text file or table file, and not a text itself."""
    is_name = len(text) < 4096 and text.lower().endswith((".txt", ".csv", ".tsv", ".gz", ".parquet"))
    return is_name and Path(text).expanduser().is_file()


# pictures


def _pictures(part: PictureInput, raw: Any) -> list[tuple[str, Any]]:
    """Return single images, each with its name for messages, as file contents, Pillow images or arrays."""
    from PIL import Image

    if isinstance(raw, str | Path):
        file = Path(raw).expanduser()
        try:
            return [(str(file), file.read_bytes())]
        except OSError as error:
            raise DataError(f"{file} cannot be read as a picture ({error.strerror})") from None
    if isinstance(raw, Image.Image):
        return [("inputs", raw)]
    if isinstance(raw, list | tuple):
        if not raw:
            raise DataError("inputs: are an empty list; give at least one picture")
        found = [one for item in raw for one in _pictures(part, item)]
        return [(f"inputs[{i}]" if where.startswith("inputs") else where, one) for i, (where, one) in enumerate(found)]
    if isinstance(raw, np.ndarray | Tensor):
        values = _pixels(np.asarray(raw))
        return [(f"inputs[{i}]", one) for i, one in enumerate(values if _are_several(part, values) else [values])]
    raise DataError(f"inputs: are {type(raw).__name__}; give files, pictures of Pillow or arrays of uint8")


def _are_several(part: PictureInput, values: Array) -> bool:
    """Return whether an array of pixels contains several images."""
    if values.ndim == 4:
        return True
    is_one = values.ndim == 2 or (values.ndim == 3 and (values.shape == part.shape or values.shape[2] in (1, 3, 4)))
    if not is_one and (values.ndim != 3 or part.shape[0] != 1):
        raise DataError(
            f"inputs: have shape {values.shape}; pictures are (H, W), (H, W, C) or (C, H, W), or several of them"
        )
    return not is_one


def _pixels(values: Array) -> Array:
    if values.dtype == np.uint8:
        return values
    is_whole = values.dtype.kind in "fiu" and values.size and bool((values == np.rint(values)).all())
    if not is_whole or values.min() < 0 or not 1.5 < values.max() <= 255:
        raise DataError(
            f"inputs: have type {values.dtype}; pixels are uint8 from 0 to 255; multiply values from 0 to 1 by 255 and round them"
        )
    return values.astype(np.uint8)


def _picture(part: PictureInput, where: str, raw: Any) -> Array:
    """Return one image as uint8 (C, H, W)."""
    if isinstance(raw, np.ndarray):
        if raw.shape == part.shape:
            return raw
        raw = _from_array(where, raw)
    pixels, n_channels = _read_picture(part, where, raw), part.shape[0]
    if len(pixels) < n_channels:
        pixels = np.repeat(pixels, n_channels, axis=0)
    if pixels.shape != part.shape:
        sizes = f"{pixels.shape[2]} x {pixels.shape[1]}", f"{part.shape[2]} x {part.shape[1]}"
        raise DataError(f"{where} is {sizes[0]} pixels, but the run's pictures are {sizes[1]}; resize it")
    return pixels


def _read_picture(part: PictureInput, where: str, raw: bytes | Image.Image) -> Array:
    from PIL import Image

    from fedloom.data.pictures import decode_picture, resized

    size = part.shape[1] if part.resize else None
    if isinstance(raw, bytes):
        pixels: Array = decode_picture([(where, raw)], 1, size)[0]
    else:
        pixels = resized(raw, size)
    if len(pixels) > part.shape[0]:
        log.warning("%s: has colours, but the run's pictures are greyscale; it is converted", where)
        pixels = np.asarray(Image.fromarray(pixels.transpose(1, 2, 0)).convert("L"))[None]
    return pixels


def _from_array(where: str, values: Array) -> Image.Image:
    from PIL import Image

    if values.ndim == 3 and values.shape[0] in (1, 3, 4) and values.shape[2] not in (1, 3, 4):
        values = values.transpose(1, 2, 0)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (3, 4)):
        raise DataError(f"{where} has shape {values.shape}; a picture is (H, W), (H, W, C) or (C, H, W)")
    return Image.fromarray(np.ascontiguousarray(values))


# arrays


def _arrays(preprocess: Preprocess, raw: Any) -> Inputs:
    """Return arrays as stored inputs. A single example becomes a batch of one."""
    from fedloom.data.arrays import arrays_as_inputs

    if files := _files(raw):
        if len(files) > 1:
            raise DataError("inputs: give one .npy or .npz file, or one table")
        raw = _array_file(files[0])
    spec = preprocess.spec
    if isinstance(raw, Mapping) != (not spec.is_single) and not isinstance(raw, tuple):
        raise DataError(f"inputs: must be {spec}, as in training, but are {type(raw).__name__}")
    named = (
        raw
        if isinstance(raw, Mapping)
        else {str(i): v for i, v in enumerate(raw)}
        if isinstance(raw, tuple)
        else {"": raw}
    )
    shapes = {field.name: field.shape for field in spec.fields}
    if named.keys() != shapes.keys():
        raise DataError(f"inputs: must be {spec}, as in training, but have the names {', '.join(map(str, named))}")
    try:
        arrays = {name: values if isinstance(values, Tensor) else np.asarray(values) for name, values in named.items()}
    except ValueError as error:
        raise DataError(f"inputs: cannot be converted to arrays ({error})") from None
    given = {name: _batch(values, shapes[name]) for name, values in arrays.items()}
    found = arrays_as_inputs(given[""] if spec.is_single else given, spec)
    if len({len(values) for values in tensors_of(found)}) > 1:
        raise DataError("inputs: have different numbers of examples")
    return found


def _batch(values: Any, shape: tuple[int, ...]) -> Any:
    """Return one or several examples as a batch, with the channels of images first."""
    values = values[None] if values.ndim == len(shape) else values
    is_last = len(shape) == 3 and values.ndim == 4 and values.shape[1:] != shape
    if is_last and (values.shape[3], *values.shape[1:3]) == shape:
        return torch.as_tensor(values).permute(0, 3, 1, 2).contiguous()
    return values


def _array_file(file: Path) -> Any:
    """Return the inputs in an .npy or .npz file."""
    from fedloom.data.array_files import input_array

    if file.suffix.lower() not in (".npy", ".npz"):
        raise DataError(f"{file}: unknown kind of file; inputs are arrays, so give an .npy or .npz file")
    return input_array(file)


def _files(raw: Any) -> list[Path]:
    """Return the files that raw inputs name, or an empty list if the inputs are values."""
    if isinstance(raw, str | Path):
        return [Path(raw).expanduser()]
    if isinstance(raw, Sequence) and raw and all(isinstance(item, str | Path) for item in raw):
        return [Path(item).expanduser() for item in raw]
    return []
