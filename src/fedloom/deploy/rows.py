"""Data on devices. A node reads its own examples, and the server has only their counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedloom import data
from fedloom.config.settings import Settings
from fedloom.data import Dataset, Federation, Partition
from fedloom.data.hub import cache_root
from fedloom.data.partition import hold_out
from fedloom.data.picture_folders import read_pictures
from fedloom.deploy.messages import Call
from fedloom.errors import ConfigError, DataError
from fedloom.inputs import Inputs
from fedloom.rng import Stream

Counts = Mapping[int, Mapping[str, Sequence[int]]]  # number of examples per class, by client and split
SPLITS = ("train", "valid", "test")
NONE = np.empty(0, np.int64)


def read_own(folder: Path, clients: Sequence[int], settings: Settings, call: Call) -> Federation:
    """Return a node's own examples as a federation in which the clients of other nodes have none.

    `folder` contains the client's data or, for several clients, one folder `client-<number>` per client. Data are parquet files
    (train.parquet, and optionally test.parquet) or a folder of images (see `fedloom.data.picture_folders`). Without test examples, a
    fraction of the other examples is held out (`partition.test_fraction`, default 0.25), drawn with the run's seed.

    Args:
        folder: see above.
        clients: the node's clients.
        settings: the run's settings.
        call: contains the server's classes and input shape.

    Raises:
        DataError: data are missing, contain classes that the server lacks, or have a different shape.
    """
    refuse_pooled_statistics(settings)
    classes, input_shape = call.task.names, tuple(call.inputs[0].shape)
    if call.task.task != "classification" or len(call.inputs) != 1:
        raise DataError(f"own data on a node must have classes and one input; the server's task is {call.task.task}")
    pools = [_read(place, settings) for place in _places(folder, clients)]
    for pool, place in zip(pools, _places(folder, clients), strict=True):
        if pool.input_shape != input_shape:
            raise DataError(f"{place}: inputs have shape {pool.input_shape}, but the server's have {input_shape}")
    labels = torch.cat([_renamed(pool, classes) for pool in pools])
    images = torch.cat([pool.images for pool in pools])
    whole = Dataset.labelled(
        name=settings.data.name, images=images, labels=labels, n_train=len(labels), classes=tuple(classes)
    )
    parts: dict[str, list[Any]] = {split: [NONE] * _n_clients(settings) for split in SPLITS}
    start = 0
    for i, pool in zip(clients, pools, strict=True):
        for split, rows in _split(pool, i, settings).items():
            parts[split][i] = rows + start
        start += pool.n_rows
    partition = _partition(parts, NONE)
    return Federation(whole, partition, normalise=settings.data.normalise, augment=settings.data.augment)


def counts_of(federation: Federation, clients: Sequence[int]) -> dict[int, dict[str, list[int]]]:
    """Return the number of examples of each class, by client and split."""
    labels, n_classes = federation.dataset.labels, federation.n_classes
    every = {split: federation.partition.counts(labels, n_classes, split) for split in SPLITS}
    return {i: {split: every[split][i].tolist() for split in SPLITS} for i in clients}


class Remote(Federation):
    """The server's view of data on devices: the number of examples of each class.

    Only examples of the common test set are available.
    """

    counts_are_claims = True

    def __init__(self, held: Dataset, counts: Counts, settings: Settings) -> None:
        """Create the view. `held` contains the server's own examples.

        The common test set consists of its test examples or, if there are none, of all its examples.
        """
        refuse_pooled_statistics(settings)
        common = np.arange(held.n_train if held.n_train < held.n_rows else 0, held.n_rows)
        parts: dict[str, list[Any]] = {split: [NONE] * _n_clients(settings) for split in SPLITS}
        labels, end = [held.labels], held.n_rows
        for i in sorted(counts):
            for split in SPLITS:
                mine = np.repeat(np.arange(held.n_classes), counts[i][split])
                parts[split][i] = np.arange(end, end + len(mine))
                labels.append(torch.from_numpy(mine))
                end += len(mine)
        partition = _partition(parts, common)
        inputs = held.images[:1].expand(end, *held.input_shape)
        shown = replace(held, inputs=inputs, targets=torch.cat(labels), changed=None)  # devices have no changed images
        chosen = settings.data.normalise
        super().__init__(
            shown, partition, normalise="none" if chosen == "own" else chosen
        )  # clients' examples are not here
        self._held = Federation(
            held,
            Partition(train=(NONE,), valid=(NONE,), test=(NONE,), common=common, scheme={}),
            normalise=settings.data.normalise,
        )  # fmt: skip

    def example(self) -> Inputs:
        """Return two of the server's own examples (see `Federation.example`)."""
        return self._held.rows(np.resize(np.arange(self._held.dataset.n_rows), 2))[0]

    def rows(self, index: Any) -> tuple[Inputs, Tensor]:
        """Return examples of the common test set by index (see `Federation.rows`).

        Raises:
            DataError: an example of a client was requested, but the examples of clients stay on their devices.
        """
        chosen = torch.as_tensor(index, dtype=torch.int64)
        if len(chosen) and int(chosen.max()) >= self._held.dataset.n_rows:
            raise DataError("examples of clients stay on their devices; the server has only their counts")
        return self._held.rows(chosen)


def refuse_pooled_statistics(settings: Settings) -> None:
    """Raise ConfigError for settings that need the examples of all clients in one place."""
    if settings.data.normalise == "standard":
        raise ConfigError(
            "data.normalise=standard: needs the examples of all clients; on devices use own, half or none"
        )
    if settings.data.augment == "resized-crop-flip-once":
        raise ConfigError(
            "data.augment=resized-crop-flip-once: needs the examples of all clients; on devices use resized-crop-flip"
        )


def _partition(parts: Mapping[str, Sequence[Any]], common: Any) -> Partition:
    train, valid, test = (tuple(parts[split]) for split in SPLITS)
    return Partition(train=train, valid=valid, test=test, common=common, scheme={"name": "devices"})


def _n_clients(settings: Settings) -> int:
    if settings.clients is None:
        raise ConfigError("clients: set the number of clients of the whole federation")
    return settings.clients


def _places(folder: Path, clients: Sequence[int]) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{folder}: the folder with this node's data does not exist; set data in node.toml")
    if len(clients) == 1:
        return [folder]
    for i in clients:
        if not (folder / f"client-{i}").is_dir():
            raise DataError(f"{folder}: the folder 'client-{i}' with the data of client {i} is missing")
    return [folder / f"client-{i}" for i in clients]


def _read(folder: Path, settings: Settings) -> Dataset:
    d = settings.data
    if any(folder.rglob("train*.parquet")):
        pool = data.load(d.name, folder, image_size=d.image_size)
        if not pool.spec.is_picture:
            raise DataError(f"{folder}: no column of train.parquet has images; nodes do not read tables yet")
        return pool
    return read_pictures(
        d.name,
        folder,
        where=str(folder),
        image_size=d.image_size,
        cache_root=cache_root(),
        needs_every_class=False,
    )


def _renamed(pool: Dataset, classes: Sequence[str]) -> Tensor:
    places = {name: place for place, name in enumerate(classes)}
    unknown = [pool.classes[c] for c in sorted(set(pool.labels.tolist())) if pool.classes[c] not in places]
    if unknown:
        raise DataError(f"class '{unknown[0]}' is unknown to the server, whose classes are {', '.join(classes)}")
    return torch.tensor([places.get(name, -1) for name in pool.classes])[pool.labels]


def _split(pool: Dataset, i: int, settings: Settings) -> Mapping[str, Any]:
    rng = Stream(settings.seed, "devices", i)
    train, test = np.arange(pool.n_train), np.arange(pool.n_train, pool.n_rows)
    if not len(test):
        fraction = settings.partition.test_fraction
        train, test = hold_out(train, 0.25 if fraction is None else fraction, rng.child("test"))
    train, valid = hold_out(train, settings.eval.valid, rng.child("valid"))
    return {"train": train, "valid": valid, "test": test}
