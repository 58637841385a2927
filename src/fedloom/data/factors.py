"""Client factors that are known exactly: a colour or a rotation that each client's images have, made from any data set of images."""

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
"""Probability that a training example has its class's colour (`code`)."""
TEST_FRACTION: Final = 0.22
"""Fraction of the examples that become the test set if the data set has none."""
N_COLOURS: Final = 10  # of `nuisance`
RIGHT_ANGLE: Final = 90.0  # rotations are spread over this range in degrees, so a 6 never becomes a 9
AT_ONCE: Final = 4096  # images converted at the same time


class Factor(NamedTuple):
    """The value of the factor of each example (N,), another value of it, and the number of values."""

    value: Values
    other: Values
    n_values: int


def with_factor(pool: Dataset, kind: Kind, n_clients: int) -> Dataset:
    """Return the data set with a client factor. All draws depend only on the name of the data set, never on a run's seed.

    Every training example belongs to one of `n_clients` clients of equal size (column `client`; "" for test examples). The factor is:

    * `code`: the colour of the background, which tells the class by the client's own code: a permutation of as many colours as there are
      classes. A training example has its class's colour with probability 0.9, and otherwise another; test examples have random colours.
    * `tint`: the colour of the background, the same for all examples of a client; test examples have the colour of a random client.
    * `nuisance`: the colour of the background, drawn from ten for every example. It depends neither on class nor on client.
    * `rotation`: an angle, client k's is 90 k / K degrees; test examples have the angle of a random client.

    The column `colour` or `angle` has the value of each example, and `Dataset.changed` the same images with another value. Without
    official test examples, 22 % of the examples become the test set.

    Raises:
        DataError: the data set has no images, its images are not greyscale (colours), or it has no classes (`code`).
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
        raise DataError(f"{where}: data={pool.name} has a client factor already; remove data.factor")
    if "picture" not in pool.spec.kinds or not pool.spec.is_single:
        raise DataError(f"{where}: needs images, but data={pool.name} has {pool.spec}")
    if kind != "rotation" and pool.input_shape[0] != 1:
        raise DataError(f"{where}: colours greyscale images, but data={pool.name} has {pool.spec}; use rotation")
    if kind == "code" and not isinstance(pool.objective, Classification):
        raise DataError(f"{where}: needs classes, but data={pool.name} is {pool.objective.task}; use tint or nuisance")
    if not 2 <= n_clients <= pool.n_train:
        raise DataError(f"data.factor_clients={n_clients}: must be from 2 to {pool.n_train}, the training examples")
    if not {"client", "colour", "angle"}.isdisjoint(pool.columns):
        raise DataError(f"{where}: data={pool.name} has a column client, colour or angle already")


def _held_out(pool: Dataset, stream: Stream) -> Dataset:
    """Return the data set in random order, with test examples at the end."""
    order = stream.child("order").permutation(pool.n_rows)
    columns = {name: column[order.numpy()] for name, column in pool.columns.items()}
    n_train = pool.n_rows - round(TEST_FRACTION * pool.n_rows)
    return replace(
        pool, inputs=pool.images[order], targets=pool.targets[order], columns=columns, n_train=n_train, table=None
    )


def _draw_factor(kind: Kind, owner: Values, pool: Dataset, n_clients: int, stream: Stream) -> Factor:
    """Draw the factor of each example. `owner`: the client of each training example."""
    n, n_test = pool.n_rows, pool.n_rows - len(owner)
    if kind == "code":
        value, n_values = coded(owner, pool.labels.numpy(), pool.n_classes, n_clients, stream)
    elif kind == "nuisance":
        value, n_values = stream.child("colour").numpy.integers(0, N_COLOURS, n), N_COLOURS
    else:
        value, n_values = np.concatenate([owner, stream.child("test").numpy.integers(0, n_clients, n_test)]), n_clients
    return Factor(value, other_values(value, n_values, stream), n_values)


def coded(owner: Values, labels: Values, n_classes: int, n_clients: int, stream: Stream) -> tuple[Values, int]:
    """Draw colours that tell the class by each client's own code (`with_factor`), and return their number too."""
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
    """Return `n` evenly spaced colours hsv(i / n, 1, 200 / 255) as RGB in [0, 1]: (n, 3)."""
    return np.array([colorsys.hsv_to_rgb(i / n, 1, 200 / 255) for i in range(n)])


def painted(ink: npt.NDArray[np.float64], colours: npt.NDArray[np.float64]) -> Pixels:
    """Return white ink on a coloured background, (N, H, W, 3).

    Args:
        ink: (N, H, W) in [0, 1]: a pixel with ink v becomes v white + (1 - v) colour.
        colours: (N, 3) RGB in [0, 1].
    """
    pictures = ink[..., None] + (1 - ink[..., None]) * colours[:, None, None, :]
    found: Pixels = np.rint(pictures * 255).astype(np.uint8)
    return found


def _applied(kind: Kind, images: Tensor, values: Values, n_values: int) -> Tensor:
    """Return the images (N, C, H, W), uint8, with these values of the factor."""
    parts = []
    for start in range(0, len(images), AT_ONCE):
        some, mine = images[start : start + AT_ONCE].numpy(), values[start : start + AT_ONCE]
        if kind == "rotation":
            parts.append(np.stack([_rotated(p, RIGHT_ANGLE * v / n_values) for p, v in zip(some, mine, strict=True)]))
        else:
            parts.append(painted(some[:, 0] / 255.0, hues(n_values)[mine]).transpose(0, 3, 1, 2))
    return torch.from_numpy(np.ascontiguousarray(np.concatenate(parts)))


def _rotated(picture: Pixels, degrees: float) -> Pixels:
    """Return a picture (C, H, W) rotated counter-clockwise; corners become black."""
    planes: list[Any] = [
        np.asarray(Image.fromarray(plane).rotate(degrees, Image.Resampling.BILINEAR)) for plane in picture
    ]
    return np.stack(planes)
