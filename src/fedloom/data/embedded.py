"""Embedded data sets: scikit-learn's digits, the same digits on coloured backgrounds, diabetes (regression) and breast cancer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedloom.data.arrays import from_arrays
from fedloom.data.dataset import Column, Dataset
from fedloom.data.factors import coded, hues, other_values, painted
from fedloom.data.pictures import resized_all
from fedloom.data.subset import choose_rows
from fedloom.errors import DataError
from fedloom.rng import Stream

DIGITS: Final = Path(__file__).with_name("digits.npz")
"""The file digits.txt in the same folder states the source and the licence."""
DIABETES: Final = DIGITS.with_name("diabetes.npz")
BREAST_CANCER: Final = DIGITS.with_name("breast_cancer.npz")
CLASSES: Final = tuple("0123456789")
N_CLIENTS: Final = 4
N_TRAIN: Final = 1400  # of 1,797 examples, 350 per client; the others are the test set, with random colours

Pixels = npt.NDArray[np.uint8]
Rows = npt.NDArray[np.int64]


def load_embedded(name: str, image_size: int | None, rows: int | None) -> Dataset:
    """Return `digits`, `coloured-digits`, `diabetes` or `breast-cancer`. For `image_size` and `rows`, see `fedloom.data.load`."""
    if name in ("diabetes", "breast-cancer"):
        return _patients(name, image_size, rows)
    pixels, labels, n_train, columns = _coloured() if name == "coloured-digits" else _digits()
    keep, n_train = choose_rows(name, np.ones(len(labels), dtype=bool), n_train, rows)

    def images(pixels: Pixels) -> Tensor:
        return torch.from_numpy(resized_all(pixels[keep], image_size))

    pool = Dataset.labelled(
        name=name,
        images=images(pixels[0]),
        labels=torch.from_numpy(labels[keep]),
        n_train=n_train,
        classes=CLASSES,
        columns={key: column[keep] for key, column in columns.items()},
    )
    return replace(pool, factor="colour", changed=images(pixels[1])) if len(pixels) > 1 else pool


def _patients(name: str, image_size: int | None, rows: int | None) -> Dataset:
    if image_size is not None:
        raise DataError(f"data.image_size={image_size}: data={name} has no images; remove it")
    is_diabetes = name == "diabetes"
    with np.load(DIABETES if is_diabetes else BREAST_CANCER) as stored:
        features = stored["features"]
        target = stored["target"].astype(np.float64) if is_diabetes else stored["labels"].astype(np.int64)
    keep, _ = choose_rows(name, np.ones(len(target), dtype=bool), len(target), rows)
    made = from_arrays(
        features[keep],
        target[keep],
        name=name,
        task="regression" if is_diabetes else "classification",
        classes=["progression"] if is_diabetes else ["malignant", "benign"],
    )
    return replace(made, normalise="standard")


def _digits() -> tuple[list[Pixels], Rows, int, dict[str, Column]]:
    ink, labels = _ink()
    return [np.rint(ink * (255 / 16)).astype(np.uint8)], labels, len(labels), {}


def _coloured() -> tuple[list[Pixels], Rows, int, dict[str, Column]]:
    """Return white digits on coloured backgrounds. The colour indicates the class, with a different code for each client.

    This is the factor `code` (see `factors.with_factor`) with the following fixed choices.

    All draws come from `Stream("coloured-digits")`, so the pixels are the same in every run. The seed of a run affects the same things as
    with other data sets: splits, weights and batches.

    1. The 1,797 examples are permuted. The first 1,400 are training examples; example i belongs to client i mod 4. The other 397 are the
       official test set.
    2. Each client draws a permutation of the ten hues, which is its code from classes to colours.
    3. A training example has the colour of its class with probability 0.9, and otherwise one of the other nine colours, drawn uniformly. A
       test example has any of the ten colours, drawn uniformly.
    4. A pixel with ink intensity v in [0, 1] becomes v white + (1 - v) colour; colours are hsv(c / 10, 1, 200 / 255).

    The column `client` is "0" to "3", or "" for test examples, which have no owner. The column `colour` is c. The images in `changed` have
    another colour.
    """
    ink, labels = _ink()
    stream = Stream("coloured-digits")
    order = stream.child("order").numpy.permutation(len(labels))
    ink, labels = ink[order] / 16, labels[order]
    owner = np.arange(N_TRAIN) % N_CLIENTS
    colour, n_colours = coded(owner, labels, len(CLASSES), N_CLIENTS, stream)
    pictures = [painted(ink, hues(n_colours)[c]) for c in (colour, other_values(colour, n_colours, stream))]
    clients = np.concatenate([owner.astype(str), np.full(len(labels) - N_TRAIN, "")])
    return pictures, labels, N_TRAIN, {"client": clients, "colour": colour}


def _ink() -> tuple[npt.NDArray[np.float64], Rows]:
    """Return the ink intensity of each pixel (N, 8, 8), from 0 to 16, and the digits (N,)."""
    with np.load(DIGITS) as stored:
        return stored["pixels"].astype(np.float64), stored["labels"].astype(np.int64)
