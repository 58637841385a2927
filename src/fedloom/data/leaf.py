"""LEAF's JSON files: Shakespeare, FEMNIST and other data sets in which every user has their own examples.

The layout is `train/*.json` and `test/*.json`, or `all_data/*.json` before the split. These folders may be in a folder `data`. A file is
`{"users": [...], "num_samples": [...], "user_data": {user: {"x": [...], "y": [...]}}}`. Files are read one at a time, and so are their
users, because the numbers in a whole file need about 1 GB as Python objects.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedloom.data.arrays import from_arrays
from fedloom.data.dataset import Dataset
from fedloom.data.layouts import Request, find_leaf
from fedloom.data.subset import choose_rows
from fedloom.data.windows import ALPHABET, OVERLAP, char_ids, split_windows
from fedloom.errors import DataError

log = logging.getLogger(__name__)

Array = npt.NDArray[Any]
PIXELS: Final = 784
MOST_BYTES: Final = 4 * 2**30
_BLANK = re.compile(r"[ \t\n\r]*")


@dataclass
class _Pool:
    """The examples of one split."""

    x: list[Array] = field(default_factory=list)
    y: list[Array] = field(default_factory=list)
    owners: list[str] = field(default_factory=list)

    def add(self, owner: str, x: Array, y: Array) -> None:
        self.x.append(x)
        self.y.append(y)
        self.owners += [owner] * len(y)


def read_leaf(
    asked: Request,
    place: Path,
    *,
    classes: tuple[str, ...] | None = None,
    column: str = "client",
) -> Dataset:
    """Return the data set in LEAF's files. The column `column` contains the user of each example.

    Args:
        asked: what to load.
        place: the folder.
        classes: names of the classes; by default, they are derived from the labels.
        column: name of the column of users.

    Raises:
        DataError: a file is malformed, or the type of its examples is unknown.
    """
    files = find_leaf(place)
    splits = {name: _read_split(paths) for name, paths in files.items()}
    train = splits["train"]
    if not train.y:
        raise DataError(f"{files['train'][0]} has no users")
    is_text = train.x[0].dtype == np.uint8 and train.x[0].ndim == 2
    test = splits.get("test", _Pool())
    if is_text and "test" not in splits:
        train, test = _divided(train)
    if {x.shape[1:] for x in (*train.x, *test.x)} != {train.x[0].shape[1:]}:
        raise DataError(f"{place}: examples of different users differ in shape")
    y = np.concatenate([*train.y, *test.y])
    x, n_train = np.concatenate([*train.x, *test.x]), sum(map(len, train.y))
    keep, n_kept = choose_rows(asked.name, np.ones(len(y), dtype=bool), n_train, asked.rows)
    owners = np.asarray(train.owners + test.owners)[keep]
    x, y = x[keep], y[keep]
    names = classes or (ALPHABET if is_text else None)
    pool = from_arrays(
        x[:n_kept],
        y[:n_kept],
        *((x[n_kept:], y[n_kept:]) if n_kept < len(y) else (None, None)),
        name=asked.name,
        classes=names,
        columns={column: owners},
        kind="token" if is_text else None,
        vocabulary=len(ALPHABET) if is_text else None,
    )
    what = "windows of 80 characters" if is_text else "examples"
    n_test = f", test {len(y) - n_kept:,}" if n_kept < len(y) else ""
    log.warning(
        "%s: LEAF's files, %s %s of %s users, train %s%s",
        asked.name,
        f"{len(y):,}",
        what,
        f"{len(np.unique(owners)):,}",
        f"{n_kept:,}",
        n_test,
    )
    return replace(pool, overlaps=OVERLAP) if is_text else pool


def _divided(whole: _Pool) -> tuple[_Pool, _Pool]:
    """Return the training and test windows by LEAF's rule. Users without test windows are omitted."""
    train, test, left_out, start = _Pool(), _Pool(), 0, 0
    for x, y in zip(whole.x, whole.y, strict=True):
        owner, (first, then) = whole.owners[start], split_windows(len(y))
        start += len(y)
        if not len(then):
            left_out += 1
            continue
        train.add(owner, x[first], y[first])
        test.add(owner, x[then], y[then])
    if left_out:
        log.warning("%d users with too few windows for a test split are left out", left_out)
    if not train.y:
        raise DataError("no user has enough windows for a test split")
    return train, test


def _read_split(files: list[Path]) -> _Pool:
    pool, seen = _Pool(), set[str]()
    for file in files:
        for user, content in _users(file):
            if user in seen:
                raise DataError(f"{file}: user '{user}' is also in another file of the same split")
            seen.add(user)
            x, y = _arrays(file, user, content)
            if len(y):
                pool.add(user, x, y)
    return pool


def _users(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield the name and the examples of each user. Raise DataError if the file is malformed or states wrong numbers of examples."""
    try:
        if file.stat().st_size > MOST_BYTES:
            raise DataError(f"{file} is larger than {MOST_BYTES // 2**30} GiB; divide it into several files")
        text = file.read_text(encoding="utf-8")
        counts, found = dict[str, Any](), dict[str, int]()
        for key, value in _items(text, "user_data"):
            if isinstance(key, tuple):
                found[key[1]] = len(value["y"]) if isinstance(value, dict) and isinstance(value.get("y"), list) else -1
                yield key[1], value
            else:
                counts[key] = value
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{file} cannot be read as LEAF's JSON ({error})") from error
    users, numbers = counts.get("users"), counts.get("num_samples")
    if not isinstance(users, list) or not isinstance(numbers, list) or not found:
        raise DataError(f"{file} requires 'users', 'num_samples' and 'user_data'")
    if dict(zip(users, numbers, strict=False)) != found or len(users) != len(numbers):
        raise DataError(f"{file}: 'users' and 'num_samples' do not match the examples in 'user_data'; write it again")


def _items(text: str, nested: str) -> Iterator[tuple[Any, Any]]:
    """Yield the keys and values of a JSON object.

    For the object under the key `nested`, yield ((nested, key), value) for each of its entries.
    """
    decoder, at = json.JSONDecoder(), _after(text, 0, "{")
    while True:
        key, at = decoder.raw_decode(text, _skipped(text, at))
        at = _skipped(text, _after(text, at, ":"))
        if key == nested and text[at : at + 1] == "{":
            at = _after(text, at, "{")
            at = _skipped(text, at)
            while text[at : at + 1] != "}":
                name, at = decoder.raw_decode(text, _skipped(text, at))
                value, at = decoder.raw_decode(text, _skipped(text, _after(text, at, ":")))
                yield (nested, str(name)), value
                at = _skipped(text, at)
                at = at if text[at : at + 1] == "}" else _after(text, at, ",")
            at = _after(text, at, "}")
        else:
            value, at = decoder.raw_decode(text, at)
            yield key, value
        at = _skipped(text, at)
        if text[at : at + 1] == "}":
            return
        at = _after(text, at, ",")


def _skipped(text: str, at: int) -> int:
    found = _BLANK.match(text, at)
    return at if found is None else found.end()


def _after(text: str, at: int, mark: str) -> int:
    """Return the position after the next character, which must be `mark`."""
    at = _skipped(text, at)
    if text[at : at + 1] != mark:
        raise json.JSONDecodeError(f"expected '{mark}'", text, at)
    return at + 1


def _arrays(file: Path, user: str, content: Any) -> tuple[Array, Array]:
    """Return a user's inputs, which are character ids (n, 80), images (n, 1, 28, 28) or numbers (n, D), and labels (n,)."""
    where = f"{file}: user '{user}'"
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in ("x", "y")):
        raise DataError(f"{where} requires lists 'x' and 'y'")
    x, y = content["x"], content["y"]
    if len(x) != len(y):
        raise DataError(f"{where} has {len(x)} inputs and {len(y)} labels")
    if not y:
        return np.empty(0), np.empty(0, np.int64)
    if isinstance(x[0], str) and isinstance(y[0], str):
        return char_ids(x, where), char_ids(y, where)[:, 0].astype(np.int64)
    if isinstance(x[0], list) and x[0] and isinstance(x[0][0], str):
        raise DataError(
            f"{where} has text with further fields (Sent140); save text and user as a table and set data.text"
        )
    try:
        values, labels = np.asarray(x, np.float64), np.asarray(y)
    except (TypeError, ValueError):
        kind = "names of files or text" if isinstance(x[0], str) else "lists of different lengths"
        raise DataError(
            f"{where}: its inputs are {kind}; LEAF's windows of characters, pixels and numbers are read"
        ) from None
    if labels.dtype.kind not in "iu" or labels.ndim != 1 or not np.isfinite(values).all() or values.ndim != 2:
        raise DataError(f"{where}: inputs must be lists of finite numbers, and labels whole numbers")
    if values.shape[1] == PIXELS:
        if values.min() < 0 or values.max() > 1:
            raise DataError(f"{where}: pixels run from {values.min():g} to {values.max():g}; LEAF's are from 0 to 1")
        return np.rint(values * 255).astype(np.uint8).reshape(-1, 1, 28, 28), labels.astype(np.int64)
    return values.astype(np.float32), labels.astype(np.int64)
