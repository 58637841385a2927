"""Some of the rows of a data set."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedloom.errors import DataError
from fedloom.rng import Stream


def choose_rows(
    name: str, known: npt.NDArray[np.bool_], n_train: int, rows: int | None
) -> tuple[npt.NDArray[np.bool_], int]:
    """Which rows stay, and how many of them are training rows: all test rows, and `rows` training rows (None: all).

    The training rows are the first `rows` of one fixed permutation of them, from `Stream("rows", name)`, without
    regard to class; so a smaller choice lies within every larger one. They keep their order in the files.
    """
    candidates = np.flatnonzero(known[:n_train])
    if rows is None:
        return known, len(candidates)
    if not 0 < rows <= len(candidates):
        raise DataError(f"data.rows={rows}: '{name}' has {len(candidates)} training rows; allowed is 1 to that number")
    keep = known.copy()
    keep[:n_train] = False
    keep[candidates[Stream("rows", name).numpy.permutation(len(candidates))[:rows]]] = True
    return keep, rows
