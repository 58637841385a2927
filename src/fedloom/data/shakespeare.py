"""LEAF's Shakespeare as one table: shakespeare.csv from the hub.

It has the columns character_id, x (80 characters) and y (the next character).
"""

from __future__ import annotations

import logging
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
from fedloom.data.windows import ALPHABET, OVERLAP, char_ids, split_windows
from fedloom.errors import DataError, first_line

log = logging.getLogger(__name__)

Array = npt.NDArray[Any]
COLUMNS: Final = ("character_id", "x", "y")
AT_ONCE: Final = 200_000


def read_shakespeare(asked: Request, folder: Path) -> Dataset:
    """Return the windows of all roles, split in time by LEAF's rule. The column `client` contains the role.

    Raise DataError if the file is missing or malformed.
    """
    file = folder / "shakespeare.csv"
    x, y, roles = [], [], list[str]()
    try:
        for part in pd.read_csv(
            file, usecols=list(COLUMNS), dtype=str, keep_default_na=False, na_filter=False, chunksize=AT_ONCE
        ):
            where = f"{file}, rows {len(roles) + 1} to {len(roles) + len(part)}"
            x.append(char_ids(part["x"].tolist(), where))
            y.append(char_ids(part["y"].tolist(), where)[:, 0])
            roles += part["character_id"].tolist()
    except FileNotFoundError:
        raise DataError(
            f"{file}: file does not exist; give its folder, or LEAF's folder with train/*.json and test/*.json"
        ) from None
    except (OSError, ValueError, UnicodeDecodeError, pd.errors.ParserError) as error:
        raise DataError(f"{file} must have the columns {', '.join(COLUMNS)} ({first_line(error)})") from error
    if not roles:
        raise DataError(f"{file} has no rows")
    inputs, labels = np.concatenate(x), np.concatenate(y).astype(np.int64)
    owners = np.asarray(roles)
    train, test = _split(owners)
    order = np.concatenate([train, test])
    keep, n_train = choose_rows(asked.name, np.ones(len(order), dtype=bool), len(train), asked.rows)
    order = order[keep]
    pool = from_arrays(
        inputs[order[:n_train]],
        labels[order[:n_train]],
        inputs[order[n_train:]],
        labels[order[n_train:]],
        name=asked.name,
        classes=ALPHABET,
        columns={"client": owners[order]},
        kind="token",
        vocabulary=len(ALPHABET),
    )
    n = len(np.unique(owners[order]))
    log.warning("%s: %s windows of %s roles, split in time", asked.name, f"{len(order):,}", f"{n:,}")
    return replace(pool, overlaps=OVERLAP)


def _split(owners: Array) -> tuple[Array, Array]:
    """Return the training and test windows of all roles, in the order of the file."""
    _, places = np.unique(owners, return_inverse=True)
    train, test = [], []
    for rows in np.split(np.argsort(places, kind="stable"), np.cumsum(np.bincount(places))[:-1]):
        first, then = split_windows(len(rows))
        if len(then):
            train.append(rows[first])
            test.append(rows[then])
    if not train:
        raise DataError("no role has enough windows for a test split")
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(test))
