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
from fedloom.data.partition import hold_out
from fedloom.data.preprocess import Given
from fedloom.errors import ConfigError, DataError
from fedloom.inputs import Inputs, map_inputs
from fedloom.rng import Stream

Counts = Mapping[int, Mapping[str, Sequence[int]]]  # number of examples per class, by client and split
SPLITS = ("train", "valid", "test")
NONE = np.empty(0, np.int64)
OWN = "own"  # name of a node's data


def read_own(folder: Path, clients: Sequence[int], settings: Settings, given: Given) -> Federation:
    """Return a node's own examples as a federation in which the clients of other nodes have none.

    `folder` is a file or folder with the client's data or, for several clients, a folder with one file or folder `client-<number>` per
    client. Data are tables, texts, arrays, parquet files or a folder of images, as for `data.path`. Without test examples, a fraction of
    the other examples is held out (`partition.test_fraction`, default 0.25). They are the last blocks of a text, or otherwise examples that
    are drawn with the run's seed.

    Args:
        folder: see above.
        clients: the node's clients.
        settings: the run's settings.
        given: the server's description of inputs and targets.

    Raises:
        DataError: data are missing, contain columns or classes that the server lacks, or have a different shape.
    """
    refuse_pooled_statistics(settings)
    pools = [_read(place, settings, given) for place in _places(folder, clients)]
    targets = torch.cat([pool.targets for pool in pools])
    inputs = map_inputs(lambda *parts: torch.cat(parts), *(pool.inputs for pool in pools))
    whole = replace(pools[0], name=settings.data.name, inputs=inputs, targets=targets, n_train=len(targets), columns={})
    parts: dict[str, list[Any]] = {split: [NONE] * _n_clients(settings) for split in SPLITS}
    start = 0
    for i, pool in zip(clients, pools, strict=True):
        for split, rows in _split(pool, i, settings).items():
            parts[split][i] = rows + start
        start += pool.n_rows
    return _federation(whole, _partition(parts, NONE), settings, augment=settings.data.augment)


def counts_of(federation: Federation, clients: Sequence[int]) -> dict[int, dict[str, list[int]]]:
    """Return the number of examples by client and split: one number per class, or a single number if the task has no classes."""
    groups, n = example_groups(federation.dataset)
    every = {split: federation.partition.counts(groups, n, split) for split in SPLITS}
    return {i: {split: every[split][i].tolist() for split in SPLITS} for i in clients}


def example_groups(dataset: Dataset) -> tuple[Any, int]:
    """Return the groups (N,) in which examples are counted, and the number of groups. Groups are classes, or one group of all examples."""
    n = dataset.objective.shapes()["rows"]
    return (dataset.targets.numpy() if n > 1 else np.zeros(dataset.n_rows, np.int64)), n


class Remote(Federation):
    """The server's view of data on devices: numbers of examples.

    Only examples of the common test set are available.
    """

    counts_are_claims = True

    def __init__(self, held: Dataset, counts: Counts, settings: Settings) -> None:
        """Create the view. `held` contains the server's own examples, with the scaling that nodes receive.

        The common test set consists of its test examples or, if there are none, of all its examples.
        """
        refuse_pooled_statistics(settings)
        common = np.arange(held.n_train if held.n_train < held.n_rows else 0, held.n_rows)
        parts: dict[str, list[Any]] = {split: [NONE] * _n_clients(settings) for split in SPLITS}
        targets, end = [held.targets], held.n_rows
        _, n_groups = example_groups(held)
        for i in sorted(counts):
            for split in SPLITS:
                n = sum(counts[i][split])
                parts[split][i] = np.arange(end, end + n)
                classes = torch.from_numpy(np.repeat(np.arange(n_groups), counts[i][split]))
                targets.append(classes if n_groups > 1 else held.targets[:1].expand(n, *held.targets.shape[1:]))
                end += n
        partition = _partition(parts, common)
        inputs = map_inputs(lambda t: t[:1].expand(end, *t.shape[1:]), held.inputs)
        is_own = settings.data.normalise == "own"  # the server does not know the clients' own scaling
        shown = replace(held, inputs=inputs, targets=torch.cat(targets), is_scaled=not is_own, changed=None)
        super().__init__(shown, partition, normalise="none" if is_own else None)
        own = Partition(train=(NONE,), valid=(NONE,), test=(NONE,), common=common, scheme={})
        self._held = _federation(held, own, settings)

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
            "data.normalise=standard: needs the examples of all clients; on devices use own, half or none, or leave it out: numbers are "
            "then scaled like the server's own examples, or as data.preprocess says"
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


def _federation(dataset: Dataset, partition: Partition, settings: Settings, augment: str = "none") -> Federation:
    """Return a federation with the scaling that the data set has, unless each client has its own."""
    own = "own" if settings.data.normalise == "own" else None
    return Federation(dataset, partition, normalise=own, augment=augment)


def _places(folder: Path, clients: Sequence[int]) -> list[Path]:
    if not folder.exists():
        raise DataError(f"{folder}: this node's data do not exist; set data in node.toml")
    if len(clients) == 1:
        return [folder]
    return [_place(folder, i) for i in clients]


def _place(folder: Path, i: int) -> Path:
    """Return the file or folder with the data of one of several clients."""
    found = [
        place for place in (folder.iterdir() if folder.is_dir() else ()) if place.name.split(".")[0] == f"client-{i}"
    ]
    if len(found) != 1:
        why = "is missing" if not found else f"exists {len(found)} times"
        raise DataError(f"{folder}: the file or folder 'client-{i}' with the data of client {i} {why}")
    return found[0]


def _read(place: Path, settings: Settings, given: Given) -> Dataset:
    """Return the examples of one client."""
    is_hub = given.preprocess.spec.is_picture and place.is_dir() and any(place.rglob("train*.parquet"))
    missing: Any = "drop" if settings.data.missing == "drop" else "refuse"
    table = data.TableOptions(drop=settings.data.drop, missing=missing)
    try:
        return data.load(settings.data.name if is_hub else OWN, place, table=table, given=given)
    except DataError as error:  # the node's owner has set neither data.path nor data
        raise DataError(
            str(error).replace(f"data.path={place}", str(place)).replace(f"data={OWN}", str(place))
        ) from error


def _split(pool: Dataset, i: int, settings: Settings) -> Mapping[str, Any]:
    """Return the indices of a client's training, validation and test examples, by split."""
    rng = Stream(settings.seed, "devices", i)
    train, test = np.arange(pool.n_train), np.arange(pool.n_train, pool.n_rows)
    if not len(test):
        given = settings.partition.test_fraction
        fraction = 0.25 if given is None else given
        if pool.overlaps:
            raise DataError(f"client {i}: {pool.overlaps}, so examples cannot be held out at random; add a test split")
        if pool.objective.task == "language":  # blocks are in the order of the text
            train, test = np.split(train, [len(train) - int(fraction * len(train))])
        else:
            train, test = hold_out(train, fraction, rng.child("test"))
    train, valid = hold_out(train, settings.eval.valid, rng.child("valid"))
    return {"train": train, "valid": valid, "test": test}
