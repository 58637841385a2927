"""A random subset of a data set."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedloom.errors import DataError
from fedloom.rng import Stream


def choose_rows(
    name: str, known: npt.NDArray[np.bool_], n_train: int, rows: int | None
) -> tuple[npt.NDArray[np.bool_], int]:
    """Return which examples to keep, and the number of training examples among them.

    All test examples and `rows` training examples (None means all) are kept. The latter are the first ones of a fixed permutation from
    `Stream("rows", name)`, which ignores classes. A smaller subset is therefore contained in every larger one. The order in the files is
    kept.
    """
    candidates = np.flatnonzero(known[:n_train])
    if rows is None:
        return known, len(candidates)
    if not 0 < rows <= len(candidates):
        raise DataError(
            f"data.rows={rows}: must be from 1 to {len(candidates)}, the number of training examples in '{name}'"
        )
    keep = known.copy()
    keep[:n_train] = False
    keep[candidates[Stream("rows", name).numpy.permutation(len(candidates))[:rows]]] = True
    return keep, rows
