"""Columns of pandas tables as inputs, by the same rules as for parquet files."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from fedloom.data.table_columns import TableColumn, check_levels, typed
from fedloom.data.table_files import own_type
from fedloom.data.tables import TypedInputs, column_inputs
from fedloom.errors import DataError, first_line


def read_frame(x: Any, x_test: Any) -> TypedInputs:
    """Return the inputs in the columns of a pandas table and, unless `x_test` is None, of a table of test examples.

    Every column is used, even if it looks like an identifier. Raise DataError if a value is missing, if the type of a column is unclear,
    or if the tables have different columns.
    """
    whole = _whole(x, x_test)
    columns = [_typed(whole, str(name)) for name in whole.columns]
    for column in columns:
        if column.missing.any():
            row = int(np.flatnonzero(column.missing)[0])
            raise DataError(
                f"from_arrays: x, row {row}, column '{column.name}': no value; {int(column.missing.sum()):,} missing values in the "
                "column; fill or drop them (pandas: fillna, dropna)"
            )
    return column_inputs(columns, len(x), "from_arrays: x")


def frame_columns(table: pd.DataFrame) -> pd.DataFrame:
    """Return a pandas table with the types that `table_files.read_files` uses: text, float64 or categories."""
    names = [str(name) for name in table.columns]
    if len(set(names)) < len(names):
        raise DataError("inputs: two columns have the same name; rename one")
    return pd.DataFrame({name: _own(table.iloc[:, i], name, "inputs") for i, name in enumerate(names)})


def _whole(x: Any, x_test: Any) -> pd.DataFrame:
    """Return the rows of both tables. Names of columns are converted to text."""
    frames = [x] if x_test is None else [x, x_test]
    for frame in frames:
        if not isinstance(frame, pd.DataFrame):
            raise DataError("from_arrays: x and x_test must both be tables (pandas.DataFrame)")
    names = [str(name) for name in x.columns]
    if len(set(names)) < len(names):
        raise DataError("from_arrays: two columns of x have the same name; rename one")
    if x_test is not None and [str(name) for name in x_test.columns] != names:
        raise DataError(f"from_arrays: x_test must have the same columns as x: {', '.join(names)}")
    if not len(x) or not names:
        raise DataError(f"from_arrays: x has shape {x.shape}; it must have rows and columns")
    whole: pd.DataFrame = pd.concat(frames, ignore_index=True)
    whole.columns = pd.Index(names)
    return whole


def _typed(whole: pd.DataFrame, name: str) -> TableColumn:
    """Return a column with its type. A pandas column of categories may have any number of levels."""
    try:
        column = typed(name, _own(whole[name], name, "from_arrays: x"), file="from_arrays: x")
        if not isinstance(whole[name].dtype, pd.CategoricalDtype):
            check_levels(column, "from_arrays: x")
    except DataError as error:
        raise DataError(str(error).replace(f"set data.drop={name}", "drop it")) from None
    return column


def _own(values: pd.Series[Any], name: str, where: str) -> pd.Series[Any]:
    """Return a column in the form of `own_type`. Raise DataError if its values have several types."""
    try:
        return own_type(pa.chunked_array([pa.Array.from_pandas(values)]), where, name)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise DataError(f"{where}, column '{name}' has values of several types ({first_line(error)})") from error
