"""Human activity recognition with smartphones (UCI HAR): windows of nine signals from several persons."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd

from fedloom.data.arrays import from_arrays
from fedloom.data.dataset import Dataset
from fedloom.data.layouts import Request
from fedloom.data.subset import choose_rows
from fedloom.errors import DataError, first_line

log = logging.getLogger(__name__)

SIGNALS: Final = tuple(f"{kind}_{axis}" for kind in ("body_acc", "body_gyro", "total_acc") for axis in "xyz")
LENGTH: Final = 128
N_FEATURES: Final = 561
ACTIVITIES: Final = ("WALKING", "WALKING_UPSTAIRS", "WALKING_DOWNSTAIRS", "SITTING", "STANDING", "LAYING")
OVERLAP: Final = "consecutive windows of a person overlap by half"


def read_har(asked: Request, folder: Path) -> Dataset:
    """Return the windows (N, 9, 128), channels first, or, with `data.features=true`, their features (N, 561).

    The column `subject` contains the person. The data set's own split is in time: of each person's windows of each activity, the last
    quarter is for testing (if there are at least three). The window at the border, which overlaps with both parts, is dropped. The
    official split, by persons, is not used.

    Raises:
        DataError: a file is missing, or its numbers do not match the other files.
    """
    root = next((place for place in (folder, folder / "UCI HAR Dataset") if (place / "train").is_dir()), None)
    if root is None:
        raise DataError(f"{folder} must contain the folders train and test of the 'UCI HAR Dataset'")
    parts = [_read_part(root, split, features=asked.features) for split in ("train", "test")]
    x, y, subjects = (np.concatenate(part) for part in zip(*parts, strict=True))
    train, test = _split_in_time(y, subjects)
    order, n_train = np.concatenate([train, test]), len(train)
    keep, n_train = choose_rows(asked.name, np.ones(len(order), dtype=bool), n_train, asked.rows)
    order = order[keep]
    first, then = order[:n_train], order[n_train:]
    owners = np.array([f"{subject:02}" for subject in subjects[order].tolist()])
    pool = from_arrays(
        x[first], y[first], x[then], y[then], name=asked.name, classes=ACTIVITIES, columns={"subject": owners}
    )
    log.warning(
        "%s: %s windows %s of %d persons, train %s, test %s, split in time",
        asked.name,
        f"{len(order):,}",
        "x".join(map(str, x.shape[1:])),
        len(np.unique(owners)),
        f"{n_train:,}",
        f"{len(then):,}",
    )
    return replace(pool, overlaps=OVERLAP)


def _split_in_time(y: npt.NDArray[Any], subjects: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    train, test = list[npt.NDArray[Any]](), list[npt.NDArray[Any]]()
    for subject in np.unique(subjects):
        for label in np.unique(y):
            rows = np.flatnonzero((subjects == subject) & (y == label))
            n_test = math.ceil(len(rows) / 4) if len(rows) > 2 else 0
            train.append(rows[: len(rows) - n_test - (n_test > 0)])
            test.append(rows[len(rows) - n_test :] if n_test else rows[:0])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(test))


def _read_part(root: Path, split: str, *, features: bool) -> tuple[npt.NDArray[Any], ...]:
    place = root / split
    labels = _numbers(place / f"y_{split}.txt", 1)[:, 0]
    subjects = _numbers(place / f"subject_{split}.txt", 1)[:, 0]
    if features:
        x = _numbers(place / f"X_{split}.txt", N_FEATURES)
    else:
        signals = [_numbers(place / "Inertial Signals" / f"{name}_{split}.txt", LENGTH) for name in SIGNALS]
        if len({len(values) for values in signals}) > 1:
            raise DataError(f"{place / 'Inertial Signals'}: the files have different numbers of lines")
        x = np.stack(signals, axis=1)
    if not len(x) == len(labels) == len(subjects):
        raise DataError(f"{place} has {len(x)} windows, {len(labels)} labels and {len(subjects)} subjects")
    if not set(labels.tolist()) <= set(range(1, len(ACTIVITIES) + 1)):
        raise DataError(f"{place / f'y_{split}.txt'}: labels must be from 1 to {len(ACTIVITIES)}")
    return x, labels.astype(np.int64) - 1, subjects.astype(np.int64)


def _numbers(file: Path, width: int) -> npt.NDArray[np.float32]:
    """Return the numbers in a text file as an array (n, width)."""
    try:
        found = pd.read_csv(file, sep=r"\s+", header=None, dtype=np.float32).to_numpy()
    except FileNotFoundError:
        raise DataError(f"{file}: file does not exist") from None
    except (OSError, ValueError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise DataError(f"{file} must have {width} numbers in every line ({first_line(error)})") from error
    if found.shape[1] != width or not np.isfinite(found).all():
        raise DataError(f"{file} must have {width} numbers in every line, without gaps")
    return np.ascontiguousarray(found, np.float32)
