"""Client factors that are known exactly: a colour or a rotation of all images of a client, added to any data set of images."""

from __future__ import annotations

import colorsys
from dataclasses import replace
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from fedloom.data.dataset import Dataset
from fedloom.errors import DataError
from fedloom.objectives import Classification
from fedloom.rng import Stream

Kind = Literal["code", "tint", "nuisance", "rotation"]
Values = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]

HOLDS: Final = 0.9
"""Probability with which a training example has the colour of its class (`code`)."""
TEST_FRACTION: Final = 0.22
"""Fraction of the examples that become the test set if the data set has none."""
N_COLOURS: Final = 10  # number of colours of `nuisance`
RIGHT_ANGLE: Final = 90.0  # range of rotations in degrees, so that a 6 never becomes a 9
AT_ONCE: Final = 4096  # number of images converted at the same time


class Factor(NamedTuple):
    """The value of the factor for each example (N,), another value for each example, and the number of values."""

    value: Values
    other: Values
    n_values: int


def with_factor(pool: Dataset, kind: Kind, n_clients: int) -> Dataset:
    """Return the data set with a client factor. All draws depend only on the name of the data set, never on the seed of a run.

    Every training example belongs to one of `n_clients` clients of equal size (column `client`; "" for test examples). The factor is:

    * `code`: the colour of the background, which indicates the class through the client's own code, a permutation of as many colours as
      there are classes. A training example has the colour of its class with probability 0.9, and otherwise another colour. Test examples
      have random colours.
    * `tint`: the colour of the background, which is the same for all examples of a client. Test examples have the colour of a random
      client.
    * `nuisance`: the colour of the background, drawn from ten colours for every example. It depends neither on the class nor on the
      client.
    * `rotation`: an angle, which is 90 k / K degrees for client k. Test examples have the angle of a random client.

    The column `colour` or `angle` contains the value for each example. `Dataset.changed` contains the same images with another value.
    Without official test examples, 22 % of the examples become the test set.

    Raises:
        DataError: the data set has no images, its images are not greyscale (for colours), or it has no classes (for `code`).
    """
    _check(pool, kind, n_clients)
    stream = Stream("factor", kind, pool.name)
    pool = pool if pool.n_train < pool.n_rows else _held_out(pool, stream)
    owner = stream.child("owner").permutation(pool.n_train).numpy() % n_clients
    factor = _draw_factor(kind, owner, pool, n_clients, stream)
    named = [f"{k:0{len(str(n_clients - 1))}d}" for k in range(n_clients)]
    clients = np.concatenate([np.array(named)[owner], np.full(pool.n_rows - pool.n_train, "")])
    column = "angle" if kind == "rotation" else "colour"
    images, changed = (_applied(kind, pool.images, values, factor.n_values) for values in (factor.value, factor.other))
    made = Dataset.described(
        name=pool.name,
        inputs=images,
        targets=pool.targets,
        n_train=pool.n_train,
        objective=pool.objective,
        columns={**pool.columns, "client": clients, column: factor.value},
        normalise=pool.normalise,
        parts=pool.parts if kind == "rotation" else (),
    )
    return replace(made, factor=column, changed=changed)


def _check(pool: Dataset, kind: Kind, n_clients: int) -> None:
    where = f"data.factor={kind}"
    if pool.factor:
        raise DataError(f"{where}: data={pool.name} already has a client factor; remove data.factor")
    if "picture" not in pool.spec.kinds or not pool.spec.is_single:
        raise DataError(f"{where}: needs images, but data={pool.name} has {pool.spec}")
    if kind != "rotation" and pool.input_shape[0] != 1:
        raise DataError(f"{where}: colours greyscale images, but data={pool.name} has {pool.spec}; use rotation")
    if kind == "code" and not isinstance(pool.objective, Classification):
        raise DataError(f"{where}: needs classes, but data={pool.name} is {pool.objective.task}; use tint or nuisance")
    if not 2 <= n_clients <= pool.n_train:
        raise DataError(f"data.factor_clients={n_clients}: must be from 2 to {pool.n_train}, the training examples")
    if not {"client", "colour", "angle"}.isdisjoint(pool.columns):
        raise DataError(f"{where}: data={pool.name} already has a column called client, colour or angle")


def _held_out(pool: Dataset, stream: Stream) -> Dataset:
    """Return the data set in random order, with the held-out test examples at the end."""
    order = stream.child("order").permutation(pool.n_rows)
    columns = {name: column[order.numpy()] for name, column in pool.columns.items()}
    n_train = pool.n_rows - round(TEST_FRACTION * pool.n_rows)
    return replace(
        pool, inputs=pool.images[order], targets=pool.targets[order], columns=columns, n_train=n_train, table=None
    )


def _draw_factor(kind: Kind, owner: Values, pool: Dataset, n_clients: int, stream: Stream) -> Factor:
    """Draw the value of the factor for each example. `owner` is the client of each training example."""
    n, n_test = pool.n_rows, pool.n_rows - len(owner)
    if kind == "code":
        value, n_values = coded(owner, pool.labels.numpy(), pool.n_classes, n_clients, stream)
    elif kind == "nuisance":
        value, n_values = stream.child("colour").numpy.integers(0, N_COLOURS, n), N_COLOURS
    else:
        value, n_values = np.concatenate([owner, stream.child("test").numpy.integers(0, n_clients, n_test)]), n_clients
    return Factor(value, other_values(value, n_values, stream), n_values)


def coded(owner: Values, labels: Values, n_classes: int, n_clients: int, stream: Stream) -> tuple[Values, int]:
    """Draw colours that indicate the class through each client's own code (see `with_factor`). Return them and their number."""
    n_train = len(owner)
    maps = np.stack([stream.child("map", i).numpy.permutation(n_classes) for i in range(n_clients)])
    draws = stream.child("colour").numpy
    colour = draws.integers(0, n_classes, len(labels))
    wanted = maps[owner, labels[:n_train]]
    another = (wanted + draws.integers(1, n_classes, n_train)) % n_classes
    colour[:n_train] = np.where(draws.random(n_train) < HOLDS, wanted, another)
    return colour, n_classes


def other_values(value: Values, n_values: int, stream: Stream) -> Values:
    """Draw one of the other values for each example, uniformly."""
    away: Values = stream.child("changed").numpy.integers(1, n_values, len(value))
    return (value + away) % n_values


def hues(n: int) -> npt.NDArray[np.float64]:
    """Return `n` evenly spaced colours hsv(i / n, 1, 200 / 255) as RGB values in [0, 1], with shape (n, 3)."""
    return np.array([colorsys.hsv_to_rgb(i / n, 1, 200 / 255) for i in range(n)])


def painted(ink: npt.NDArray[np.float64], colours: npt.NDArray[np.float64]) -> Pixels:
    """Return white ink on a coloured background (N, H, W, 3).

    Args:
        ink: the ink intensity v in [0, 1] of each pixel (N, H, W). A pixel becomes v white + (1 - v) colour.
        colours: RGB values in [0, 1] (N, 3).
    """
    pictures = ink[..., None] + (1 - ink[..., None]) * colours[:, None, None, :]
    found: Pixels = np.rint(pictures * 255).astype(np.uint8)
    return found


def _applied(kind: Kind, images: Tensor, values: Values, n_values: int) -> Tensor:
    """Return the uint8 images (N, C, H, W) with these values of the factor."""
    parts = []
    for start in range(0, len(images), AT_ONCE):
        some, mine = images[start : start + AT_ONCE].numpy(), values[start : start + AT_ONCE]
        if kind == "rotation":
            parts.append(np.stack([_rotated(p, RIGHT_ANGLE * v / n_values) for p, v in zip(some, mine, strict=True)]))
        else:
            parts.append(painted(some[:, 0] / 255.0, hues(n_values)[mine]).transpose(0, 3, 1, 2))
    return torch.from_numpy(np.ascontiguousarray(np.concatenate(parts)))


def _rotated(picture: Pixels, degrees: float) -> Pixels:
    """Return an image (C, H, W), rotated counter-clockwise. The corners become black."""
    planes: list[Any] = [
        np.asarray(Image.fromarray(plane).rotate(degrees, Image.Resampling.BILINEAR)) for plane in picture
    ]
    return np.stack(planes)
