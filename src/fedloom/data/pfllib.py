"""PFLlib's folders: one `.npz` file per client and split, each with a pickled dictionary of arrays.

The layout is `train/0.npz` .. `train/K-1.npz`, the same in `test/`, and `config.json`. Each file contains one object array `data`: a
dictionary with `x` (n, ...) and `y` (n,). Object arrays are pickles, and loading a pickle can execute arbitrary code. Therefore, the
unpickler in this module accepts only five names and replaces each with a harmless class: arrays, dtypes and scalars become plain records,
and numeric arrays are built from their raw bytes. Any other name raises DataError.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedloom.data.arrays import from_arrays
from fedloom.data.dataset import Dataset, validated
from fedloom.errors import DataError
from fedloom.objectives import Classification

_NUMERIC = frozenset({"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"})


def load_pfllib(path: str | Path) -> Dataset:
    """Return the pool of a PFLlib folder: the training examples of all clients, then their test examples.

    The column `client` contains the owner. Inputs are returned as stored (PFLlib stores them normalised). `partition(dataset,
    scheme="own")` restores PFLlib's split. Raise DataError if files are missing or malformed, or contain anything other than arrays.
    """
    folder = Path(path).expanduser()
    splits = [_read_split(folder / split) for split in ("train", "test")]
    if len(splits[0]) != len(splits[1]):
        raise DataError(f"data.path={path}: {len(splits[0])} clients in train/, but {len(splits[1])} in test/")
    (x, y), (x_test, y_test) = (_join(path, split) for split in splits)
    owners = np.concatenate([np.repeat(np.arange(len(split)), [len(y) for _, y in split]) for split in splits])
    pool = from_arrays(x, y, x_test, y_test, name="pfllib", columns={"client": owners})
    n_classes = _declared_classes(folder)
    if n_classes is None:
        return pool
    return validated(replace(pool, objective=Classification(names=tuple(str(c) for c in range(n_classes)))))


Client = tuple[npt.NDArray[Any], npt.NDArray[np.int64]]


def _read_split(folder: Path) -> list[Client]:
    numbers = sorted(int(file.stem) for file in folder.glob("*.npz") if file.stem.isdigit())
    if not numbers or numbers != list(range(len(numbers))):
        raise DataError(f"{folder}: expected PFLlib's files 0.npz, 1.npz, ... without gaps; found {len(numbers)} files")
    return [_read_client(folder / f"{i}.npz") for i in numbers]


def _read_client(file: Path) -> Client:
    content = read_object(file)
    if not isinstance(content, dict) or not {"x", "y"} <= set(content):
        raise DataError(f"{file}: expected a dictionary with 'x' and 'y'")
    x, y = content["x"], content["y"]
    if isinstance(x, list) and x and isinstance(x[0], list | tuple):
        x = _token_ids(file, x)
    if not isinstance(x, np.ndarray) or not isinstance(y, np.ndarray) or y.ndim != 1 or len(x) != len(y):
        raise DataError(f"{file}: 'x' and 'y' must be arrays with one label per example")
    if not np.array_equal(y, y.astype(np.int64)):
        raise DataError(f"{file}: labels must be integers")
    return x, y.astype(np.int64)


def _token_ids(file: Path, x: list[Any]) -> npt.NDArray[np.int64]:
    """Return texts as token ids (n, T). PFLlib stores each text as a list of ids and its length.

    The lengths are dropped, because they include padding.
    """
    texts = [row[0] if isinstance(row, list | tuple) and len(row) == 2 else None for row in x]
    width = len(texts[0]) if texts and isinstance(texts[0], list) else 0
    if not width or any(
        not isinstance(ids, list) or len(ids) != width or any(type(i) is not int or not 0 <= i < 2**31 for i in ids)
        for ids in texts
    ):
        raise DataError(
            f"{file}: texts must be pairs of a list of token ids and its length; all lists must have the same length"
        )
    return np.array(texts, np.int64)


def _join(path: str | Path, clients: list[Client]) -> tuple[torch.Tensor, torch.Tensor]:
    if len({(x.shape[1:], x.dtype) for x, _ in clients}) != 1:
        raise DataError(f"data.path={path}: inputs of different clients differ in shape or type")
    return tuple(torch.from_numpy(np.concatenate(part)) for part in zip(*clients, strict=True))  # type: ignore[return-value]


def _declared_classes(folder: Path) -> int | None:
    """Return the number of classes Y in `config.json`. Return None if the file or the entry is missing (as in older folders)."""
    try:
        config = json.loads((folder / "config.json").read_text())
        return None if "num_classes" not in config else int(config["num_classes"])
    except FileNotFoundError:
        return None
    except (TypeError, ValueError) as error:
        raise DataError(f"{folder / 'config.json'} is not a valid PFLlib config.json ({error})") from error


def read_object(file: str | Path) -> Any:
    """Read the Python object that `np.savez(file, data=object)` stored, without running code from the file.

    Dictionaries, lists, tuples, strings, numbers and numeric arrays are accepted. Any other content raises DataError.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            stream = io.BytesIO(archive.read("data.npy"))
        version = np.lib.format.read_magic(stream)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        _, _, dtype = header(stream)
        if not dtype.hasobject:
            raise DataError(f"{file}: expected PFLlib's dictionary, found an array of {dtype}")
        content = _built(_ArraysOnly(stream).load())
    except DataError as error:
        raise DataError(str(error) if str(file) in str(error) else f"{file}: {error}") from None
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{file}: not an .npz file with an entry 'data' ({type(error).__name__})") from error
    except Exception as error:  # a malicious pickle can raise anything; none of its code has run
        raise DataError(f"{file}: malformed ({type(error).__name__})") from error
    return content[0] if isinstance(content, list) and len(content) == 1 else content


class _Type:
    """A dtype in the pickle, given by its code, such as 'f4', and its byte order."""

    def __init__(self, code: str, *_: object) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = "=" if state[1] == "|" else state[1]

    def numeric(self) -> np.dtype[Any]:
        if self.code not in _NUMERIC or self.order not in ("<", ">", "="):
            raise DataError(f"arrays of type {self.code!r} are not allowed")
        return np.dtype(self.order + self.code)


class _Array:
    """An array in the pickle, given by its shape, dtype, memory order and raw bytes (a list of objects for dtype 'O8')."""

    def __init__(self, *_: object) -> None:
        self.state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def built(self) -> Any:
        _, shape, dtype, is_fortran, raw = self.state
        if dtype.code == "O8":
            items, width = [_built(item) for item in raw], math.prod(shape[1:])
            if len(shape) < 2 or is_fortran or not 0 < len(items) == width * shape[0]:
                return items
            return [items[k : k + width] for k in range(0, len(items), width)]
        flat = np.frombuffer(raw, dtype.numeric())
        return np.array(flat.reshape(shape, order="F" if is_fortran else "C"), flat.dtype.newbyteorder("="))


class _Scalar:
    """A NumPy scalar in the pickle."""

    def __init__(self, dtype: _Type, raw: bytes) -> None:
        self.dtype, self.raw = dtype, raw

    def built(self) -> Any:
        return np.frombuffer(self.raw, self.dtype.numeric())[0].item()


def _latin(text: str, encoding: str) -> bytes:
    """Replace `_codecs.encode`, which old pickle protocols use for bytes."""
    if encoding != "latin1":
        raise DataError(f"encoding {encoding!r} is not allowed")
    return text.encode("latin1")


class _ArraysOnly(pickle.Unpickler):
    """An unpickler that accepts only arrays.

    Each lookup returns a new object, so that a pickle cannot set attributes on shared objects.
    """

    def find_class(self, module: str, name: str) -> Any:
        home = module.replace("numpy._core.", "numpy.core.", 1)
        match home, name:
            case ("numpy.core.multiarray", "_reconstruct") | ("numpy", "ndarray"):
                return partial(_Array)
            case "numpy.core.multiarray", "scalar":
                return partial(_Scalar)
            case "numpy", "dtype":
                return partial(_Type)
            case "_codecs", "encode":
                return partial(_latin)
        raise DataError(f"refused: it contains {module}.{name}, but only arrays are allowed")


def _built(value: Any) -> Any:
    if isinstance(value, _Array | _Scalar):
        return value.built()
    if isinstance(value, dict):
        return {_built(key): _built(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_built(item) for item in value)
    if value is None or isinstance(value, str | bytes | bool | int | float):
        return value
    raise DataError(f"values of type {type(value).__name__} are not allowed")
