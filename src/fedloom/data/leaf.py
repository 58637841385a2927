"""LEAF's JSON files: Shakespeare, FEMNIST, Sent140, CelebA and other data sets whose examples belong to users.

The layout is `train/*.json` and `test/*.json`, or `all_data/*.json` before the split. These folders may be in a folder `data`. A file is
`{"users": [...], "num_samples": [...], "user_data": {user: {"x": [...], "y": [...]}}}`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from fedloom.data.arrays import from_arrays
from fedloom.data.cache import cache_key, cached
from fedloom.data.dataset import Dataset
from fedloom.data.layouts import NO_TEXT, Request, find_leaf
from fedloom.data.leaf_json import users_of
from fedloom.data.preprocess import Part
from fedloom.data.subset import choose_rows
from fedloom.data.text_sets import coded_texts
from fedloom.data.windows import ALPHABET, OVERLAP, char_ids, split_windows
from fedloom.errors import DataError

log = logging.getLogger(__name__)

Array = npt.NDArray[Any]
Kind = Literal["windows", "texts", "pictures", "files", "numbers"]
PIXELS: Final = 784
FOLDERS: Final = ("raw/img_align_celeba", "img_align_celeba", "images")
"""Folders for the images of CelebA, relative to the folder of the data. The first one is the folder that LEAF uses."""
SUFFIXES: Final = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp")
TWEET: Final = 4  # position of the text among the fields of Sent140: id, date, query, user, text

_FORMAT = 1  # part of the cache key: increment it when reading changes
_NAMES: Final = {"windows": "windows of 80 characters", "texts": "texts", "pictures": "images", "files": "images"}


class Examples(NamedTuple):
    """A user's examples: their kind, inputs and labels (n,). The inputs are a list of texts or file names, or an array (n, ...)."""

    kind: Kind
    x: Array | list[str]
    y: Array


Users = list[tuple[str, Examples]]
"""The users of a split who have examples, with their examples."""


def read_leaf(
    asked: Request,
    place: Path,
    *,
    classes: tuple[str, ...] | None = None,
    column: str = "client",
) -> Dataset:
    """Return the data set in LEAF's files. It comes from the cache if it was read before.

    Args:
        asked: what to load.
        place: the folder.
        classes: names of the classes; by default, they are derived from the labels.
        column: name of the column with the user of each example.

    Raises:
        DataError: a file is malformed, or the type of its examples is unknown.
    """
    splits, pictures = find_leaf(place), _picture_folder(place)
    files = [file for paths in splits.values() for file in paths]
    words = asked.texts.vocabulary
    files += sorted(pictures.iterdir()) if pictures else []
    files += [words.expanduser()] if isinstance(words, Path) else []
    counts = {name: len(paths) for name, paths in splits.items()}
    settings = ["leaf", _FORMAT, counts, asked.image_size, asked.rows, asked.texts, classes, column]
    key = cache_key(files, settings)
    return cached(asked.cache, asked.name, key, lambda: _read(asked, place, splits, classes, column))


def _read(
    asked: Request, place: Path, files: dict[str, list[Path]], classes: tuple[str, ...] | None, column: str
) -> Dataset:
    splits = {name: _read_split(paths) for name, paths in files.items()}
    train, test = splits["train"], splits.get("test", [])
    if not train:
        raise DataError(f"{files['train'][0]} has no users")
    kind = train[0][1].kind
    for user, examples in [*train, *test]:
        if examples.kind != kind:
            raise DataError(
                f"{place}: the examples of user '{user}' are {examples.kind}, but those of others are {kind}"
            )
    if kind == "windows" and "test" not in splits:
        train, test = _divided(train)
    y = np.concatenate([found.y for _, found in train + test])
    owners = np.repeat([user for user, _ in train + test], [len(found.y) for _, found in train + test])
    keep, n_train = choose_rows(asked.name, np.ones(len(y), bool), sum(len(found.y) for _, found in train), asked.rows)
    x, parts = _inputs(asked, place, train + test, keep, n_train)
    y, owners = y[keep], owners[keep]
    vocabulary = len(ALPHABET) if kind == "windows" else parts[0].sizes[0] if parts else None
    pool = from_arrays(
        x[:n_train],
        y[:n_train],
        *((x[n_train:], y[n_train:]) if n_train < len(y) else (None, None)),
        name=asked.name,
        classes=classes or (ALPHABET if kind == "windows" else None),
        columns={column: owners},
        kind="token" if vocabulary else None,
        vocabulary=vocabulary,
    )
    _tell(pool, kind, len(np.unique(owners)))
    return replace(pool, parts=parts, overlaps=OVERLAP if kind == "windows" else "")


def _tell(pool: Dataset, kind: Kind, users: int) -> None:
    n_test = pool.n_rows - pool.n_train
    log.warning(
        "%s: LEAF's files, %s %s of %s users, train %s%s",
        pool.name,
        f"{pool.n_rows:,}",
        _NAMES.get(kind, "examples"),
        f"{users:,}",
        f"{pool.n_train:,}",
        f", test {n_test:,}" if n_test else "",
    )


def _inputs(
    asked: Request, place: Path, users: Users, keep: npt.NDArray[np.bool_], n_train: int
) -> tuple[Any, tuple[Part, ...]]:
    """Return the inputs of the examples to keep and, for texts, a description of how they became token ids.

    Raise DataError if options do not apply to these inputs, or if the inputs of users have different shapes.
    """
    kind = users[0][1].kind
    if kind != "texts" and asked.texts != NO_TEXT:
        key, value = next((k, v) for k, v in vars(asked.texts).items() if v not in (None, ()))
        raise DataError(f"data.{key}={value}: {place} has no texts; remove it")
    if kind != "files" and asked.image_size is not None:
        raise DataError(f"data.image_size={asked.image_size}: {place} has no image files; remove it")
    if kind in ("texts", "files"):
        values = [value for _, found in users for value in found.x]
        chosen = [values[i] for i in np.flatnonzero(keep)]
        if kind == "files":
            return _pictures(asked, place, chosen), ()
        ids, part = coded_texts([(text,) for text in chosen], n_train, asked.texts)
        return ids.numpy(), (part,)
    arrays = [np.asarray(found.x) for _, found in users]
    if {array.shape[1:] for array in arrays} != {arrays[0].shape[1:]}:
        raise DataError(f"{place}: examples of different users differ in shape")
    return np.concatenate(arrays)[keep], ()


def _picture_folder(place: Path) -> Path | None:
    """Return the folder with the images that the files name, or None if there is none."""
    places = [root / folder for root in (place, place / "data") for folder in FOLDERS]
    return next((folder for folder in places if folder.is_dir()), None)


def _pictures(asked: Request, place: Path, names: Sequence[str]) -> Array:
    from fedloom.data.pictures import decode_picture  # Pillow is slow to import

    folder = _picture_folder(place)
    if folder is None:
        raise DataError(f"{place}: names images, such as {names[0]}; put them into {place / FOLDERS[0]}")
    return decode_picture(((str(folder / n), _bytes(folder / n)) for n in names), len(names), asked.image_size)


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror})") from error


def _divided(whole: Users) -> tuple[Users, Users]:
    """Return the training and test windows by LEAF's rule. Users without test windows are omitted."""
    train, test = Users(), Users()
    for user, (kind, x, y) in whole:
        first, then = split_windows(len(y))
        windows = np.asarray(x)
        if len(then):
            train.append((user, Examples(kind, windows[first], y[first])))
            test.append((user, Examples(kind, windows[then], y[then])))
    if len(train) < len(whole):
        log.warning("%d users with too few windows for a test split are left out", len(whole) - len(train))
    if not train:
        raise DataError("no user has enough windows for a test split")
    return train, test


def _read_split(files: list[Path]) -> Users:
    found = Users()
    seen = set[str]()
    for file in files:
        for user, content in users_of(file):
            if user in seen:
                raise DataError(f"{file}: user '{user}' is also in another file of the same split")
            seen.add(user)
            if examples := _examples(content, f"{file}: user '{user}'"):
                found.append((user, examples))
    return found


def _examples(content: Any, where: str) -> Examples | None:
    """Return a user's examples, or None if there are none. Raise DataError if they are malformed; its message starts with `where`."""
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in ("x", "y")):
        raise DataError(f"{where} must contain lists 'x' and 'y'")
    x, y = content["x"], content["y"]
    if len(x) != len(y):
        raise DataError(f"{where} has {len(x)} inputs and {len(y)} labels")
    if not y:
        return None
    if isinstance(x[0], str) and isinstance(y[0], str):
        return Examples("windows", char_ids(x, where), char_ids(y, where)[:, 0].astype(np.int64))
    if not all(isinstance(label, int | float) and abs(label) < 2**31 and label == int(label) for label in y):
        raise DataError(f"{where}: labels must be integers")
    return Examples(*_values(x, where), np.array([int(label) for label in y], np.int64))


def _values(x: list[Any], where: str) -> tuple[Kind, Array | list[str]]:
    """Return the kind of a user's inputs, and the inputs: texts, names of image files, images (n, 1, 28, 28) or numbers (n, D)."""
    if all(isinstance(value, str) for value in x):
        if not all(value.lower().endswith(SUFFIXES) for value in x):
            return "texts", x
        if odd := next((value for value in x if Path(value).name != value), None):
            raise DataError(f"{where}: '{odd}' is not the name of a file alone; remove its folder")
        return "files", x
    if isinstance(x[0], list) and x[0] and all(isinstance(value, str) for value in x[0]):
        if any(not isinstance(tweet, list) or len(tweet) <= TWEET or not isinstance(tweet[TWEET], str) for tweet in x):
            raise DataError(f"{where} has lists of text that are not those of Sent140: id, date, query, user, text")
        return "texts", [tweet[TWEET] for tweet in x]
    try:
        values = np.asarray(x, np.float64)
    except (TypeError, ValueError):
        raise DataError(f"{where}: its inputs are lists of different lengths, or of several types") from None
    if not np.isfinite(values).all() or values.ndim != 2:
        raise DataError(f"{where}: inputs must be texts, names of image files, or lists of finite numbers")
    if values.shape[1] == PIXELS:
        if values.min() < 0 or values.max() > 1:
            raise DataError(f"{where}: pixels run from {values.min():g} to {values.max():g}; LEAF's are from 0 to 1")
        return "pictures", np.rint(values * 255).astype(np.uint8).reshape(-1, 1, 28, 28)
    return "numbers", values.astype(np.float32)
