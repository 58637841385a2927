"""Tables from the UCI Machine Learning Repository without a header: Adult, and Heart Disease by hospital."""

from __future__ import annotations

import csv
import logging
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd

from fedloom.data.dataset import Dataset
from fedloom.data.layouts import Request, TableOptions
from fedloom.data.table_files import RawTable
from fedloom.data.tables import table_dataset
from fedloom.errors import DataError

log = logging.getLogger(__name__)

ADULT: Final = (
    "age", "workclass", "fnlwgt", "education", "education-num", "marital-status", "occupation", "relationship", "race", "sex",
    "capital-gain", "capital-loss", "hours-per-week", "native-country", "income",
)  # fmt: skip
HEART: Final = (
    "age", "sex", "cp", "trestbps", "chol", "fbs", "restecg", "thalach", "exang", "oldpeak", "slope", "ca", "thal", "num"
)  # fmt: skip
HOSPITALS: Final = ("cleveland", "hungarian", "switzerland", "va")
_ONE_HOT: Final = {"cp": ("1", "2", "3", "4"), "restecg": ("0", "1", "2")}  # without the first level, as in FLamby


def read_adult(asked: Request, folder: Path) -> Dataset:
    """Return Adult: adult.data (32,561 rows) and adult.test (16,281 rows).

    The columns fnlwgt (a census weight) and education (the same information as education-num) are not inputs. `?` is treated as a separate
    level or, with `data.missing=drop`, as a reason to drop the row. Raise DataError if a file is missing or malformed.
    """
    train, test = _required(folder, "adult.data"), _required(folder, "adult.test")
    rows, lines = _rows(train, len(ADULT))
    more, lines_of_test = _rows(test, len(ADULT), skipped="|")
    frame = pd.DataFrame([*rows, *more], columns=list(ADULT), dtype=str)
    frame["income"] = frame["income"].str.removesuffix(".")  # labels in adult.test end in a full stop
    raw = RawTable(
        frame=frame,
        files=(train, test),
        file_of=np.repeat([0, 1], [len(rows), len(more)]),
        lines=np.array(lines + lines_of_test),
        n_train=len(rows),
    )
    usual = TableOptions(label="income", drop=("fnlwgt", "education"), missing="fill")
    return table_dataset(asked.name, raw, _with(usual, asked.table), task=None, rows=asked.rows)


def read_heart_disease(asked: Request, folder: Path) -> Dataset:
    """Return Heart Disease by hospital, with the rows and features of FLamby: 740 patients and 13 features.

    The column `hospital` contains the hospital. The columns slope, ca and thal are dropped first, and then all rows with an unknown value.
    Chest pain (cp) and the electrocardiogram (restecg) become columns of 0 and 1, without the first level. The label states whether the
    disease is present (num > 0). Raise DataError if a file is missing or malformed.
    """
    files = tuple(_required(folder, f"processed.{hospital}.data") for hospital in HOSPITALS)
    parts = [_rows(file, len(HEART)) for file in files]
    file_of = np.repeat(np.arange(len(files)), [len(rows) for rows, _ in parts])
    lines = np.array([line for _, numbers in parts for line in numbers])
    frame = pd.DataFrame([row for rows, _ in parts for row in rows], columns=list(HEART), dtype=str)
    frame = frame.drop(columns=["slope", "ca", "thal"])
    known = ~(frame == "?").any(axis=1).to_numpy()
    frame, file_of, lines = frame[known].reset_index(drop=True), file_of[known], lines[known]
    raw = RawTable(frame=frame, files=files, file_of=file_of, lines=lines, n_train=len(frame))
    for column, levels in _ONE_HOT.items():
        codes = _numbers(raw, column)
        if (odd := np.flatnonzero(~codes.isin([float(level) for level in levels]))).size:
            raise DataError(f"{raw.place(int(odd[0]))}, column '{column}' must be one of {', '.join(levels)}")
        for level in levels[1:]:
            frame[f"{column}_{level}"] = np.where(codes == float(level), "1", "0")
    frame["disease"] = np.where(_numbers(raw, "num") > 0, "present", "absent")
    frame["hospital"] = [HOSPITALS[i] for i in file_of]
    raw = replace(raw, frame=frame.drop(columns=["num", *_ONE_HOT]))
    log.warning("%s: %d rows with unknown values are left out, as in FLamby", asked.name, int((~known).sum()))
    usual = TableOptions(label="disease", owner="hospital")
    pool = table_dataset(asked.name, raw, _with(usual, asked.table), task=None, rows=asked.rows)
    return replace(pool, normalise="own")


def _with(usual: TableOptions, given: TableOptions) -> TableOptions:
    """Return the usual options of a data set, overridden by those that the user sets."""
    plain = TableOptions()
    found = {f.name: getattr(given, f.name) for f in fields(given) if getattr(given, f.name) != getattr(plain, f.name)}
    return replace(usual, **found)


def _numbers(raw: RawTable, column: str) -> pd.Series[float]:
    found = pd.to_numeric(raw.frame[column], errors="coerce")
    if found.isna().any():
        row = int(np.flatnonzero(found.isna())[0])
        raise DataError(f"{raw.place(row)}, column '{column}': '{raw.frame[column][row]}' is not a number")
    return found


def _required(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        found = ", ".join(sorted(file.name for file in folder.iterdir())[:8]) or "no files"
        raise DataError(f"{folder} must contain the file {name}, but contains {found}")
    return folder / name


def _rows(file: Path, width: int, skipped: str = "") -> tuple[list[list[str]], list[int]]:
    """Return the fields and the line number of each row. Empty lines, and lines that start with `skipped`, are ignored."""
    rows, lines = list[Sequence[str]](), list[int]()
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            for line, row in enumerate(csv.reader(stream, skipinitialspace=True), start=1):
                if not row or row == [""] or (skipped and row[0].startswith(skipped)):
                    continue
                if len(row) != width:
                    raise DataError(f"{file}, line {line} has {len(row)} fields instead of {width}")
                rows.append([value.strip() for value in row])
                lines.append(line)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file} cannot be read as text ({error})") from error
    if not rows:
        raise DataError(f"{file} has no rows")
    return [list(row) for row in rows], lines
