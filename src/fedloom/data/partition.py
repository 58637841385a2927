"""Which client holds which rows: made by a scheme, or read from a file; saved with a hash."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fedloom.data import schemes
from fedloom.data.catalogue import SOURCES
from fedloom.data.dataset import Dataset
from fedloom.data.schemes import Rows
from fedloom.errors import DataError, suggest
from fedloom.rng import Stream

SCHEMES: Final = ("iid", "dirichlet", "pathological", "extended", "quantity", "natural", "own", "file")
_SPLITS = ("train", "valid", "test")


@dataclass(frozen=True, kw_only=True)
class Partition:
    """Row numbers of a `Dataset`, one sorted int64 array per client and split; `common` is the common test set.

    No row is in two clients' training or validation splits, and none of those is tested on. `scheme` says how it was
    made.
    """

    train: tuple[Rows, ...]
    valid: tuple[Rows, ...]
    test: tuple[Rows, ...]
    common: Rows
    scheme: dict[str, Any]

    @property
    def n_clients(self) -> int:
        """K."""
        return len(self.train)

    def hash(self) -> str:
        """32 hexadecimal digits that depend on the row numbers alone, not on how they were drawn."""
        digest = hashlib.blake2b(digest_size=16)
        for split in (self.train, self.valid, self.test, (self.common,)):
            for rows in split:
                digest.update(len(rows).to_bytes(8, "little"))
                digest.update(rows.astype("<i8").tobytes())
        return digest.hexdigest()

    def counts(self, labels: Tensor | npt.NDArray[Any], n_classes: int, split: str = "train") -> Rows:
        """(K, Y): how many examples of each class each client has in that split ("train", "valid" or "test")."""
        if split not in _SPLITS:
            raise DataError(f"split='{split}'; allowed are {', '.join(_SPLITS)}")
        labels = np.asarray(labels)
        parts: tuple[Rows, ...] = getattr(self, split)
        return np.stack([np.bincount(labels[rows], minlength=n_classes) for rows in parts])

    def save(self, path: str | Path) -> None:
        """Writes `content` as JSON, in one step."""
        path = Path(path)
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(self.content(), separators=(",", ":")))
        temporary.replace(path)

    def content(self) -> dict[str, Any]:
        """All of it as JSON-able values: the lists by split, `common`, `scheme` and `hash`."""
        lists: dict[str, Any] = {split: [rows.tolist() for rows in getattr(self, split)] for split in _SPLITS}
        return lists | {"common": self.common.tolist(), "scheme": self.scheme, "hash": self.hash()}

    @classmethod
    def load(cls, path: str | Path, n_rows: int, n_train: int | None = None) -> Partition:
        """Reads what `save` wrote, or a foreign file.

        A foreign file needs no more than `{"train": [[row, ...], ...]}`; it may hold `test`, `valid` and `common`.

        Without `common` the common test set is the union of the clients' test rows or, where they have none, the
        official test rows `n_train` .. `n_rows` - 1. Raises DataError for rows out of range, repeated, held by two
        clients, or both trained and tested on, and where a stored hash does not fit.
        """
        try:
            content = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise DataError(f"partition file {path}: cannot be read as JSON ({type(error).__name__})") from error
        if not isinstance(content, dict) or not isinstance(content.get("train"), list) or not content["train"]:
            raise DataError(f"partition file {path}: 'train' must be a list of lists of row numbers, one per client")
        splits = {split: _read_split(path, content, split, n_rows) for split in _SPLITS}
        common = _read_rows(path, content.get("common") or [], "common", n_rows)
        if len(common) == 0:
            common = _union(splits["test"]) if any(map(len, splits["test"])) else np.arange(n_train or n_rows, n_rows)
        scheme = content.get("scheme")
        made = cls(**splits, common=common, scheme=scheme if isinstance(scheme, dict) else {"name": "file"})
        _check_disjoint(made, n_rows, f"partition file {path}")
        if not len(common):
            raise DataError(f"partition file {path}: there are no rows to test on; it needs 'test' or 'common'")
        if "hash" in content and content["hash"] != made.hash():
            raise DataError(f"partition file {path}: its hash does not fit its rows; the file was changed or damaged")
        return made


def partition(
    dataset: Dataset,
    clients: int | None = None,
    *,
    scheme: str = "dirichlet",
    alpha: float = 0.1,
    classes_per_client: int = 2,
    balance: bool = False,
    column: str | None = None,
    min_examples: int = 10,
    merge: bool = True,
    test_fraction: float | None = None,
    valid: float = 0.0,
    path: str | Path | None = None,
    seed: int = 0,
) -> Partition:
    """Deals the rows of a data set to clients.

    `scheme` is one of `SCHEMES`: "iid", "dirichlet" (alpha), "pathological" (classes_per_client, balance), "extended"
    (classes_per_client, alpha), "quantity" (alpha), "natural" (column, by default a known data
    set's own, like Office-Caltech10's domain; `clients` keeps the largest; rows with "" there are nobody's, and only
    `merge=False` can leave such test rows out), "own" (the data set brings its split:
    training rows and test rows go to the client that `column`, default "client", names), "file" (path).

    With `merge` (the protocol of PFLlib and FedRIR) official training and test rows are pooled and dealt out
    together, and each client's rows split at random, `test_fraction` (default 0.25) for its test; the common set is
    the union of those. Without it only training rows are dealt, the common set is the official test set (if there is
    one), and `test_fraction` is 0 unless given: then clients have no test rows of their own. `valid` is the share of
    each client's training rows kept for validation. Every client gets at least `min_examples` rows, before these
    splits. The same settings and `seed` give the same rows anywhere. Raises DataError.
    """
    _check_settings(
        clients, scheme, alpha=alpha, classes_per_client=classes_per_client, min_examples=min_examples, valid=valid
    )
    if scheme == "file":
        return _from_file(dataset, clients, path, valid)
    if scheme == "own":
        return _own(dataset, clients, column or "client", valid, seed)
    has_official = dataset.n_train < dataset.n_rows
    fraction = _fraction(test_fraction, merge, merge or not has_official)
    n_dealt = dataset.n_rows if merge else dataset.n_train
    stream = Stream(seed, "partition", scheme)
    settings: dict[str, Any]
    if scheme == "natural":
        column = column or _natural_column(dataset)
        settings = {"column": column}
        dealt = schemes.natural(_owners(dataset, column, n_dealt), clients, min_examples)
    else:
        dealer, names = _DEALERS[scheme]
        choices = {"alpha": alpha, "classes_per_client": classes_per_client, "balance": balance}
        settings = {name: choices[name] for name in names}
        labels = _present(dataset.labels[:n_dealt].numpy(), clients, min_examples, settings)
        dealt = dealer(labels, clients, min_examples, stream, **settings)
    made = {"name": scheme, **_pool(dataset), "clients": len(dealt), "min_examples": min_examples, **settings}
    made |= {"merge": merge, "test_fraction": fraction, "valid": valid, "seed": seed}
    official = np.arange(dataset.n_train, dataset.n_rows) if has_official and not merge else None
    return _split(dealt, fraction, valid=valid, official=official, settings=made, stream=stream)


_DEALERS: Final[dict[str, tuple[Callable[..., list[Rows]], tuple[str, ...]]]] = {
    "iid": (schemes.iid, ()),
    "dirichlet": (schemes.dirichlet, ("alpha",)),
    "pathological": (schemes.pathological, ("classes_per_client", "balance")),
    "extended": (schemes.extended, ("classes_per_client", "alpha")),
    "quantity": (schemes.quantity, ("alpha",)),
}


def _fraction(test_fraction: float | None, merge: bool, must_split: bool) -> float:
    fraction = (0.25 if merge else 0.0) if test_fraction is None else test_fraction
    if not 0 <= fraction < 1 or (fraction == 0 and must_split):
        allowed = "over 0 (there is no other test set) and under 1" if must_split else "0, or under 1"
        raise DataError(f"partition.test_fraction={fraction} with partition.merge={merge}: allowed is {allowed}")
    return fraction


def _present(labels: Rows, clients: int | None, min_examples: int, settings: dict[str, Any]) -> Rows:
    """Labels counted over the classes with examples only: empty ones would shift the quotas of some schemes."""
    if clients is None:
        raise DataError("clients: this partition needs a number of clients")
    if clients * min_examples > len(labels):
        raise DataError(f"clients={clients}: {len(labels)} rows do not give each partition.min_examples={min_examples}")
    found, present = np.unique(labels, return_inverse=True)
    if (per_client := settings.get("classes_per_client", 1)) > len(found):
        raise DataError(f"partition.classes_per_client={per_client}: allowed is 1 to {len(found)}")
    return present.astype(np.int64)


def _split(
    dealt: Sequence[Rows],
    fraction: float,
    valid: float,
    official: Rows | None,
    settings: dict[str, Any],
    stream: Stream,
) -> Partition:
    train, held_out, test = [], [], []
    for i, rows in enumerate(dealt):
        kept, tested = hold_out(rows, fraction, stream.child("test", i))
        kept, validated = hold_out(kept, valid, stream.child("valid", i))
        train.append(kept)
        held_out.append(validated)
        test.append(tested)
    common = _union(test) if official is None else official
    return Partition(train=tuple(train), valid=tuple(held_out), test=tuple(test), common=common, scheme=settings)


def hold_out(rows: Rows, fraction: float, stream: Stream) -> tuple[Rows, Rows]:
    """Sorted rows, and the sorted share of them that is set apart at random, rounded up; one row at least stays."""
    if fraction == 0:
        return np.sort(rows), np.empty(0, np.int64)
    n_apart = min(math.ceil(len(rows) * fraction - 1e-9), len(rows) - 1)
    shuffled = stream.numpy.permutation(np.sort(rows))
    return np.sort(shuffled[n_apart:]), np.sort(shuffled[:n_apart])


def _own(dataset: Dataset, clients: int | None, column: str, valid: float, seed: int) -> Partition:
    values, owners = np.unique(_column(dataset, column), return_inverse=True)
    if clients not in (None, len(values)):
        raise DataError(f"clients={clients}: data={dataset.name} brings its own split for {len(values)} clients")
    is_train = np.arange(dataset.n_rows) < dataset.n_train
    mine = [
        (np.flatnonzero((owners == i) & is_train), np.flatnonzero((owners == i) & ~is_train))
        for i in range(len(values))
    ]
    for value, (rows, _) in zip(values, mine, strict=True):
        if len(rows) == 0:
            raise DataError(f"partition=own: client '{value}' of column '{column}' has no training rows")
    if is_train.all():
        raise DataError(
            f"partition=own: data={dataset.name} brings no test rows; deal it otherwise, such as partition=natural"
        )
    stream = Stream(seed, "partition", "own")
    parts = [hold_out(rows, valid, stream.child("valid", i)) for i, (rows, _) in enumerate(mine)]
    return Partition(
        train=tuple(rows for rows, _ in parts),
        valid=tuple(rows for _, rows in parts),
        test=tuple(rows for _, rows in mine),
        common=np.arange(dataset.n_train, dataset.n_rows),
        scheme={
            "name": "own",
            **_pool(dataset),
            "clients": len(values),
            "column": column,
            "valid": valid,
            "seed": seed,
        },
    )


def _from_file(dataset: Dataset, clients: int | None, path: str | Path | None, valid: float) -> Partition:
    if path is None:
        raise DataError("partition=file needs partition.path=FILE")
    made = Partition.load(path, dataset.n_rows, dataset.n_train)
    if clients not in (None, made.n_clients):
        raise DataError(f"clients={clients}: the partition file {path} is for {made.n_clients} clients")
    if valid and not any(map(len, made.valid)):
        raise DataError(f"eval.valid={valid}: the partition file {path} has no validation rows; give it some (`valid`)")
    for key, value in _pool(dataset).items():
        if (dealt := made.scheme.get(key, value)) != value:
            raise DataError(
                f"partition file {path}: it deals the rows of a pool with {key}={dealt}, here it is {value}"
            )
    return made


def _pool(dataset: Dataset) -> dict[str, Any]:
    """What row numbers are numbers of: without it they fit any data set that is large enough."""
    return {"data": dataset.name, "n_train": dataset.n_train, "n_rows": dataset.n_rows}


def _natural_column(dataset: Dataset) -> str | None:
    """The column that a known data set is divided by; of an unknown one its only column."""
    if dataset.name in SOURCES:
        return SOURCES[dataset.name].natural
    return next(iter(dataset.columns)) if len(dataset.columns) == 1 else None


def _column(dataset: Dataset, column: str | None) -> npt.NDArray[Any]:
    if column is None or column not in dataset.columns:
        known = ", ".join(dataset.columns) or "none"
        told = "partition.column: must be given" if column is None else f"partition.column={column}: there is none such"
        raise DataError(f"{told}; data={dataset.name} has the columns: {known}")
    return dataset.columns[column]


def _owners(dataset: Dataset, column: str | None, n_dealt: int) -> npt.NDArray[Any]:
    """Whose the first rows are; those with "" in the column are nobody's, and cannot be dealt."""
    owners = _column(dataset, column)[:n_dealt]
    if (owners == "").any():
        nobody = int((owners == "").sum())
        hint = "set partition.merge=false, and partition.test_fraction=0.25 for test rows of the clients' own"
        raise DataError(f"partition.column={column}: {nobody} rows of data={dataset.name} belong to nobody; {hint}")
    return owners


def _check_settings(
    clients: int | None, scheme: str, alpha: float, classes_per_client: int, min_examples: int, valid: float
) -> None:
    if scheme not in SCHEMES:
        raise DataError(f"partition={scheme}: unknown{suggest(scheme, SCHEMES)}")
    if clients is not None and clients < 1:
        raise DataError(f"clients={clients}: allowed is 1 or more")
    if not 0 < alpha < math.inf:
        raise DataError(f"partition.alpha={alpha}: allowed is any finite number over 0")
    if classes_per_client < 1:
        raise DataError(f"partition.classes_per_client={classes_per_client}: allowed is 1 to the number of classes")
    if min_examples < 2:
        raise DataError(
            f"partition.min_examples={min_examples}: allowed is 2 or more (one row to train on, one to test)"
        )
    if not 0 <= valid < 1:
        raise DataError(f"partition.valid={valid}: allowed is 0, or under 1")


def _union(parts: Sequence[Rows]) -> Rows:
    return np.unique(np.concatenate([np.empty(0, np.int64), *parts]))


def _read_split(path: str | Path, content: dict[str, Any], split: str, n_rows: int) -> tuple[Rows, ...]:
    lists = content.get(split)
    n_clients = len(content["train"])
    if lists is None:
        return tuple(np.empty(0, np.int64) for _ in range(n_clients))
    if not isinstance(lists, list) or len(lists) != n_clients:
        raise DataError(f"partition file {path}: '{split}' must hold one list for each of the {n_clients} clients")
    return tuple(_read_rows(path, rows, f"{split}[{i}]", n_rows) for i, rows in enumerate(lists))


def _read_rows(path: str | Path, rows: object, where: str, n_rows: int) -> Rows:
    if not isinstance(rows, list) or not all(type(row) is int for row in rows):
        raise DataError(f"partition file {path}: {where} must be a list of whole numbers")
    if rows and not (min(rows) >= 0 and max(rows) < n_rows):
        bad = next(row for row in rows if not 0 <= row < n_rows)
        raise DataError(f"partition file {path}: {where} names row {bad}, allowed is 0 to {n_rows - 1}")
    array = np.sort(np.asarray(rows, np.int64))
    if len(repeated := array[1:][array[1:] == array[:-1]]):
        raise DataError(f"partition file {path}: {where} names row {repeated[0]} twice")
    return array


def _check_disjoint(made: Partition, n_rows: int, what: str) -> None:
    n_holders = np.zeros(n_rows, np.int64)
    for rows in (*made.train, *made.valid):
        n_holders[rows] += 1
    if n_holders.max(initial=0) > 1:
        raise DataError(f"{what}: row {n_holders.argmax()} is in two training or validation splits")
    if len(both := np.flatnonzero(n_holders[_union([*made.test, made.common])])):
        row = _union([*made.test, made.common])[both[0]]
        raise DataError(f"{what}: row {row} is both trained and tested on")
