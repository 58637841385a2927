"""Users' own arrays: an .npz file, or a folder with x.npy and y.npy."""

from __future__ import annotations

import logging
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedloom.data.arrays import from_arrays
from fedloom.data.dataset import Dataset
from fedloom.data.subset import choose_rows
from fedloom.errors import DataError, first_line

log = logging.getLogger(__name__)

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Keys:
    """The names of the arrays in a file. `more` names arrays of validation examples, which are used for training."""

    x: str
    y: str
    x_test: str = ""
    y_test: str = ""
    more: tuple[str, str] | None = None


CONVENTIONS = (
    Keys(x="x_train", y="y_train", x_test="x_test", y_test="y_test"),
    Keys(x="x", y="y", x_test="x_test", y_test="y_test"),
    Keys(x="X_train", y="y_train", x_test="X_test", y_test="y_test"),
    Keys(x="X", y="y"),
    Keys(x="data", y="target"),
    Keys(x="data", y="labels"),
    Keys(x="images", y="labels"),
    Keys(
        x="train_images",
        y="train_labels",
        x_test="test_images",
        y_test="test_labels",
        more=("val_images", "val_labels"),
    ),
)
OWNERS = ("client", "owner")


def read_arrays(name: str, place: Path, *, task: str | None, rows: int | None) -> Dataset:
    """Return the data set in an .npz file, or in a folder with x.npy, y.npy and, optionally, x_test.npy, y_test.npy, client.npy.

    Raises:
        DataError: the file is malformed, contains Python objects, or uses unknown names for its arrays.
    """
    found = {file.stem: _reading(file) for file in sorted(place.glob("*.npy"))} if place.is_dir() else _reading(place)
    return _made(name, place, found, task=task or "classification", rows=rows)


def input_array(file: Path) -> Any:
    """Return the inputs in an .npy file, or the array with a usual name in an .npz file. Raise DataError if there are no inputs."""
    found = _reading(file)
    if not isinstance(found, dict):
        return found
    name = next((name for keys in CONVENTIONS for name in (keys.x_test, keys.x) if name in found), None)
    if name is None and len(found) > 1:
        raise DataError(f"{file} has the arrays {', '.join(found)}; call the inputs x")
    return found[name or next(iter(found))]


def _reading(file: Path) -> Any:
    """Return the array in an .npy file, or the arrays in an .npz file by name."""
    try:
        with file.open("rb") as stream:
            loaded = np.load(stream, allow_pickle=False)
            return {key: loaded[key] for key in loaded.files} if isinstance(loaded, np.lib.npyio.NpzFile) else loaded
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        reason = first_line(error)
        if "allow_pickle" in reason:
            reason = "it contains Python objects, which are not read; save numbers or fixed-width text"
        raise DataError(f"{file} cannot be read as arrays: {reason}") from error


def _made(name: str, place: Path, found: Any, *, task: Any, rows: int | None) -> Dataset:
    if not isinstance(found, dict):
        raise DataError(
            f"{place} has one array without a name; save inputs and labels with numpy.savez(file, x=..., y=...)"
        )
    keys = next((keys for keys in CONVENTIONS if {keys.x, keys.y} <= found.keys()), None)
    if keys is None:
        known = "; ".join(f"{keys.x}, {keys.y}" for keys in CONVENTIONS)
        raise DataError(
            f"{place} has the arrays {', '.join(found) or 'none'}; name inputs and labels in one of these ways: {known}"
        )
    used = {keys.x, keys.y, keys.x_test, keys.y_test, *(keys.more or ()), *OWNERS}
    if ignored := sorted(found.keys() - used):
        log.warning("%s: the arrays %s are not used", place.name, ", ".join(ignored))
    x, y = _training(place, found, keys)
    keep, _ = choose_rows(name, np.ones(len(y), dtype=bool), len(y), rows)
    x_test, y_test = found.get(keys.x_test), found.get(keys.y_test)
    n_test = 0 if y_test is None else len(y_test)
    every = np.concatenate([keep, np.ones(n_test, dtype=bool)])
    columns = {key: _owners(place, key, found[key], every) for key in OWNERS if key in found}
    try:
        pool = from_arrays(x[keep], y[keep], x_test, y_test, name=name, task=task, columns=columns)
    except DataError as error:
        shown = str(error).removeprefix("from_arrays: ")
        raise DataError(f"{place}: {shown} (x is '{keys.x}', y is '{keys.y}')") from error
    log.warning("%s: %s", place.name, repr(pool).strip("<>").removeprefix(f"Dataset {name}: "))
    return pool


def _training(place: Path, found: dict[str, Array], keys: Keys) -> tuple[Array, Array]:
    """Return the training examples, followed by the file's validation examples, if it has any."""
    x, y = found[keys.x], found[keys.y]
    if x.ndim == 0 or y.ndim == 0 or len(x) != len(y):
        raise DataError(f"{place}: '{keys.x}' has shape {x.shape} and '{keys.y}' {y.shape}; give one label per input")
    if keys.more and set(keys.more) <= found.keys():
        more = [found[key] for key in keys.more]
        log.warning(
            "%s: %d validation examples are used for training; to hold out some, set eval.valid",
            place.name,
            len(more[1]),
        )
        x, y = np.concatenate([x, more[0]]), np.concatenate([y, more[1]])
    return x, y


def _owners(place: Path, key: str, values: Array, every: npt.NDArray[np.bool_]) -> Array:
    if values.shape != every.shape:
        raise DataError(
            f"{place}: '{key}' has shape {values.shape}; it must be ({len(every)},), training examples first"
        )
    return values[every]
