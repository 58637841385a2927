"""Windows of 80 characters and the next character, as in LEAF's Shakespeare: their alphabet, and their split in time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedloom.errors import DataError

ALPHABET: Final = tuple("\n !\"&'(),-.0123456789:;>?ABCDEFGHIJKLMNOPQRSTUVWXYZ[]abcdefghijklmnopqrstuvwxyz}")
"""LEAF's 80 characters, in LEAF's order. Windows contain no line feeds, so id 0 does not occur in them."""
OVERLAP: Final = "windows of text overlap in all but one character"
GAP: Final = 79  # number of windows that overlap with both training and test windows

_PLACES = np.full(129, -1, np.int16)  # by code point; the last entry is for all code points above 127
_PLACES[[ord(c) for c in ALPHABET]] = np.arange(len(ALPHABET))


def char_ids(texts: Sequence[str], where: str) -> npt.NDArray[Any]:
    """Return the ids of characters (n, T), uint8. Raise DataError if texts differ in length or contain unknown characters."""
    width = len(texts[0])
    if not width or any(len(text) != width for text in texts):
        raise DataError(f"{where}: its windows of text differ in length")
    codes = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
    ids = _PLACES[np.minimum(codes, 128)]
    if (ids < 0).any():
        odd = chr(codes[int(np.argmax(ids < 0))])
        raise DataError(
            f"{where} has the character {odd!r}, which is not one of LEAF's {len(ALPHABET)}; remove it from the text"
        )
    return ids.astype(np.uint8).reshape(len(texts), width)


def split_windows(n: int) -> tuple[slice, npt.NDArray[np.int64]]:
    """Return which of a role's n windows are for training and which are for testing, by LEAF's rule.

    The first 90 %, but at least one window, are for training. They are followed by a gap of windows that overlap with both parts. There
    may be no test windows.
    """
    n_train = max(1, int(0.9 * n))
    first = np.arange(n_train + GAP, n)
    return slice(0, n_train), first if n >= 2 else first[:0]
