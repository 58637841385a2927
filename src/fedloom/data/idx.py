"""IDX files, the format of MNIST and EMNIST: images (N, 28, 28) and labels (N,) as bytes, also compressed (.gz)."""

from __future__ import annotations

import gzip
import logging
import math
import zlib
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from fedloom.data.dataset import Dataset
from fedloom.data.layouts import Request, find_idx
from fedloom.data.subset import choose_rows
from fedloom.errors import DataError

log = logging.getLogger(__name__)

TYPES: Final = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
MOST_VALUES: Final = 2**33
_TRAIN, _TEST = ("train",), ("test", "t10k")


def read_idx(file: Path) -> npt.NDArray[Any]:
    """Return the array in an IDX file. Raise DataError if the file is malformed."""
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as stream:
            head = stream.read(4)
            if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in TYPES or not 1 <= head[3] <= 4:
                raise DataError(f"{file} is not an IDX file")
            shape = tuple(np.frombuffer(stream.read(4 * head[3]), ">u4").tolist())
            kind = np.dtype(TYPES[head[2]])
            size = math.prod(shape) * kind.itemsize
            if len(shape) != head[3] or size > MOST_VALUES:
                raise DataError(f"{file}: its header gives the shape {shape}, which cannot be read")
            content = stream.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file} cannot be read as an IDX file ({error})") from error
    if len(content) != size:
        more = "more" if len(content) > size else f"{len(content):,}"
        raise DataError(f"{file}: its header gives {size:,} bytes, but it has {more}; copy the file again")
    return np.frombuffer(content, kind).reshape(shape)


def read_idx_folder(asked: Request, folder: Path, prefix: str = "", classes: tuple[str, ...] | None = None) -> Dataset:
    """Return the data set in a folder of IDX files.

    The images of EMNIST (files called emnist-...) are stored transposed, so they are transposed back.

    Args:
        asked: what to load.
        folder: a folder with files such as train-images-idx3-ubyte.gz and train-labels-idx1-ubyte.gz, and the same for t10k or test.
        prefix: the first part of the names of the files to use.
        classes: names of the classes.

    Raises:
        DataError: a file is missing, the folder contains several data sets, or images and labels do not match.
    """
    found = find_idx(folder, prefix)
    train, test = _of_split(folder, found, _TRAIN), _of_split(folder, found, _TEST)
    if train is None:
        names = ", ".join(file.name for file in found)
        raise DataError(f"{folder} has {names}, but no training images, such as train-images-idx3-ubyte.gz")
    parts = [_pair(file) for file in (train, test) if file is not None]
    is_turned = train.name.startswith("emnist")
    images = np.concatenate([pictures for pictures, _ in parts])
    labels = np.concatenate([labels for _, labels in parts]).astype(np.int64)
    if images.shape[1:] != parts[0][0].shape[1:]:
        raise DataError(f"{folder}: images of the splits differ in size")
    if max(int(labels.max()), -int(labels.min())) >= 2**16:
        raise DataError(f"{train}: labels run from {labels.min()} to {labels.max()}")
    keep, n_train = choose_rows(asked.name, np.ones(len(labels), dtype=bool), len(parts[0][1]), asked.rows)
    images, labels = images[keep], labels[keep]
    if is_turned:
        images = images.transpose(0, 2, 1)
    shown = classes or tuple(str(c) for c in range(int(labels.max()) + 1))
    if int(labels.max()) >= len(shown):
        raise DataError(f"{train}: labels run to {labels.max()}, but data={asked.name} has {len(shown)} classes")
    log.warning(
        "%s: %s pictures %dx%d in IDX files, %d classes, train %s%s",
        asked.name,
        f"{len(labels):,}",
        *images.shape[1:],
        len(shown),
        f"{n_train:,}",
        (f", test {len(labels) - n_train:,}" if n_train < len(labels) else "") + ("; turned, as in EMNIST" * is_turned),
    )
    pictures = torch.from_numpy(np.ascontiguousarray(images[:, None]))
    return Dataset.labelled(
        name=asked.name, images=pictures, labels=torch.from_numpy(labels), n_train=n_train, classes=shown
    )


def _of_split(folder: Path, found: list[Path], words: tuple[str, ...]) -> Path | None:
    """Return the images of a split, or None. Raise DataError if there are several."""
    mine = [file for file in found if any(word in file.name for word in words)]
    if len(mine) > 1:
        names = ", ".join(file.name for file in mine)
        raise DataError(f"{folder} has several files of images for one split ({names}); keep one data set per folder")
    return mine[0] if mine else None


def _pair(file: Path) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return the images in a file, and the labels in the file next to it."""
    name = file.name.replace("images", "labels").replace("idx3", "idx1")
    places = [file.with_name(name), file.with_name(name.removesuffix(".gz")), file.with_name(f"{name}.gz")]
    labels = next((place for place in places if place != file and place.is_file()), None)
    if labels is None:
        raise DataError(f"{file}: the file of its labels, {name}, is missing")
    pictures, numbers = read_idx(file), read_idx(labels)
    if pictures.ndim != 3 or pictures.dtype != np.uint8 or numbers.ndim != 1 or numbers.dtype.kind not in "iu":
        raise DataError(f"{file} must contain bytes (N, height, width), and {labels.name} integers (N,)")
    if len(pictures) != len(numbers) or not len(numbers):
        raise DataError(f"{file} has {len(pictures):,} images, but {labels.name} has {len(numbers):,} labels")
    return pictures, numbers
