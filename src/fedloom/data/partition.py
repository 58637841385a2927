"""Partitions, which assign examples to clients. A partition is drawn by a scheme or read from a file, and is saved with a hash."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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

SCHEMES: Final = ("iid", "dirichlet", "pathological", "extended", "quantity", "natural", "own", "file", "given")
_SPLITS = ("train", "valid", "test")


@dataclass(frozen=True, kw_only=True)
class Partition:
    """The example numbers of each client: one sorted int64 array per client and split. `common` is the common test set.

    No training or validation example belongs to two clients or to a test split. `scheme` describes how the partition was created. `owners`
    contains the names of the clients, if they have names.
    """

    train: tuple[Rows, ...]
    valid: tuple[Rows, ...]
    test: tuple[Rows, ...]
    common: Rows
    scheme: dict[str, Any]
    owners: tuple[str, ...] = ()

    @property
    def n_clients(self) -> int:
        """The number of clients K."""
        return len(self.train)

    def hash(self) -> str:
        """Return a hash of 32 hexadecimal digits, which depends only on the example numbers, not on how they were drawn."""
        digest = hashlib.blake2b(digest_size=16)
        for split in (self.train, self.valid, self.test, (self.common,)):
            for rows in split:
                digest.update(len(rows).to_bytes(8, "little"))
                digest.update(rows.astype("<i8").tobytes())
        return digest.hexdigest()

    def counts(self, labels: Tensor | npt.NDArray[Any], n_classes: int, split: str = "train") -> Rows:
        """Return the number of examples by client and class (K, Y) in a split ("train", "valid" or "test")."""
        if split not in _SPLITS:
            raise DataError(f"split='{split}': must be one of {', '.join(_SPLITS)}")
        labels = np.asarray(labels)
        parts: tuple[Rows, ...] = getattr(self, split)
        return np.stack([np.bincount(labels[rows], minlength=n_classes) for rows in parts])

    def save(self, path: str | Path) -> None:
        """Write `content` as JSON, atomically."""
        path = Path(path)
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(self.content(), separators=(",", ":")))
        temporary.replace(path)

    def content(self) -> dict[str, Any]:
        """Return the partition as JSON values: the lists by split, `common`, `scheme`, `hash` and, if known, the names of `clients`."""
        lists: dict[str, Any] = {split: [rows.tolist() for rows in getattr(self, split)] for split in _SPLITS}
        names = {"clients": list(self.owners)} if self.owners else {}
        return lists | names | {"common": self.common.tolist(), "scheme": self.scheme, "hash": self.hash()}

    @classmethod
    def load(cls, path: str | Path, n_rows: int, n_train: int | None = None) -> Partition:
        """Read a file written by `save` or by another program.

        Only `{"train": [[number, ...], ...]}` is required; `test`, `valid` and `common` are optional. Without `common`, the common test
        set is the union of the clients' test examples. If there are none, it is the official test set, examples `n_train` to `n_rows` - 1.

        Raises:
            DataError: an example number is out of range, is repeated, is in the splits of two clients, or is both in a training and in a
                test split; or the stored hash does not match.
        """
        try:
            content = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise DataError(f"partition file {path} cannot be read as JSON ({type(error).__name__})") from error
        if not isinstance(content, dict) or not isinstance(content.get("train"), list) or not content["train"]:
            raise DataError(
                f"partition file {path}: 'train' must be a list of lists of example numbers, one list per client"
            )
        splits = {split: _read_split(path, content, split, n_rows) for split in _SPLITS}
        common = _read_rows(path, content.get("common") or [], "common", n_rows)
        if len(common) == 0:
            common = _union(splits["test"]) if any(map(len, splits["test"])) else np.arange(n_train or n_rows, n_rows)
        scheme = content.get("scheme")
        scheme = scheme if isinstance(scheme, dict) else {"name": "file"}
        made = cls(**splits, common=common, scheme=scheme, owners=_read_owners(path, content))
        _check_disjoint(made, n_rows, f"partition file {path}")
        if not len(common):
            raise DataError(f"partition file {path}: there are no test examples; add 'test' or 'common'")
        if "hash" in content and content["hash"] != made.hash():
            raise DataError(
                f"partition file {path}: its hash does not match its contents; the file was changed or damaged"
            )
        return made


def partition(
    dataset: Dataset,
    clients: int | None = None,
    *,
    scheme: str = "dirichlet",
    alpha: float = 0.1,
    classes_per_client: int = 2,
    balance: bool = False,
    by: str | None = None,
    bins: int = 10,
    column: str | None = None,
    min_examples: int = 10,
    repair: bool = False,
    class_floor: int = 0,
    merge: bool = True,
    test_fraction: float | None = None,
    valid: float = 0.0,
    path: str | Path | None = None,
    seed: int = 0,
) -> Partition:
    """Divide the examples of a data set among clients. The same settings and `seed` give the same partition on every machine.

    With `merge` (the protocol of PFLlib and FedRIR), the official training and test examples are pooled before they are
    divided. Each client's examples are then split at random: the fraction `test_fraction` (default 0.25) becomes its test
    split. The common test set is the union of these test splits.

    Without `merge`, only the training examples are divided. The common test set is the official test set, if there is one. In this case,
    `test_fraction` is 0 by default, so clients have no own test examples.

    Args:
        dataset: the data set to divide.
        clients: number of clients. With "natural" and "own", the clients with the most (training) examples are kept; by default, all are.
        scheme: one of `SCHEMES`: "iid"; "dirichlet" (uses `alpha`); "pathological" (uses `classes_per_client`, `balance`); "extended"
            (uses `classes_per_client`, `alpha`); "quantity" (uses `alpha`); "natural" (one client per value of `column`); "own" (the data
            set's own split, in which `column` contains the client of each training and test example); "file" (uses `path`).
        alpha: concentration parameter of the Dirichlet distribution.
        classes_per_client: number of classes that each client has.
        balance: see `schemes.pathological`.
        by: the column whose values are used instead of classes in "dirichlet", "pathological" and "extended". By default, examples are
            grouped by target: by class, by the rarest label of each example, or by quantile bins of numbers.
        bins: number of quantile bins.
        column: by default, the column of a known data set, such as the domain in Office-Caltech10, or otherwise "client" with "own". With
            "natural", every example that is divided needs a value other than "". `merge=False` excludes the test examples.
        min_examples: minimum number of examples of each client, before its test split is taken.
        repair: use the first draw, and move examples from the largest clients to those below `min_examples`. Otherwise, draw again until
            all clients have enough examples.
        merge: pool the official training and test examples (see above).
        test_fraction: fraction of each client's examples in its test split.
        class_floor: minimum number of training examples of every class (or value of `by`) that each client has after the split. Missing
            examples are moved from the clients with the most training examples of the class ("dirichlet", "pathological", "extended").
        valid: fraction of each client's training examples in its validation split.
        path: the partition file.
        seed: seed of all draws.

    Raises:
        DataError: a setting is invalid, or the data set cannot be divided in this way.
    """
    _check_settings(
        clients, scheme, alpha=alpha, classes_per_client=classes_per_client, min_examples=min_examples, valid=valid
    )
    if scheme == "file":
        return _from_file(dataset, clients, path, valid)
    if scheme == "own":
        return _own(dataset, clients, column or _natural_column(dataset) or "client", valid, seed)
    fraction = _fraction(dataset, test_fraction, merge)
    _refuse_leaks(dataset, scheme, merge=merge, fraction=fraction, valid=valid)
    n_dealt = dataset.n_rows if merge else dataset.n_train
    stream = Stream(seed, "partition", scheme)
    settings: dict[str, Any]
    if scheme == "natural":
        column = column or _natural_column(dataset)
        settings = {"column": column}
        names, dealt = schemes.natural(_owners(dataset, column, n_dealt), clients, min_examples)
    else:
        names = ()
        dealer, keys = _DEALERS[scheme]
        choices = {"alpha": alpha, "classes_per_client": classes_per_client, "balance": balance}
        settings = {name: choices[name] for name in keys}
        labels = _present(_groups(dataset, scheme, by, bins)[:n_dealt], clients, min_examples, settings)
        wanted = schemes.Wanted(min_examples, repair and scheme != "iid")
        dealt = dealer(labels, clients, wanted, stream, **settings)
        settings |= ({"by": by} if by else {}) | ({"repair": True} if repair else {})
    made = {"name": scheme, **_pool(dataset), "clients": len(dealt), "min_examples": min_examples, **settings}
    made |= {"merge": merge, "test_fraction": fraction, "valid": valid, "seed": seed}
    if not class_floor:
        return _split(dataset, dealt, made, stream, names)
    split = _split(dataset, dealt, made | {"class_floor": class_floor}, stream, names)
    train = schemes.with_floor(split.train, _groups(dataset, scheme, by, bins), class_floor, stream.child("floor"))
    return replace(split, train=train)


def default_scheme(dataset: Dataset, merge: bool = True) -> str:
    """Return the name of the scheme that fits the data.

    It is "own" if a column names the owners, and examples overlap or texts are split in time. It is "natural" if a column names the owner
    of every example, and owners have at least two examples on average. Otherwise, it is "dirichlet" if targets form groups, or else "iid".
    """
    column = _natural_column(dataset)
    if column in dataset.columns and (dataset.overlaps or _is_split_in_time(dataset, column)):
        return "own"
    dealt = dataset.n_rows if merge else dataset.n_train
    if column in dataset.columns:
        owners = dataset.columns[column][:dealt]
        if not (owners == "").any() and 2 * len(np.unique(owners)) <= dealt:  # otherwise, it numbers the examples
            return "natural"
    strata = dataset.objective.strata(dataset.targets, dataset.n_train)
    return "iid" if strata is None or len(strata.names) < 2 else "dirichlet"


def given_partition(
    given: Any,
    dataset: Dataset,
    *,
    test_fraction: float | None = None,
    merge: bool = True,
    valid: float = 0.0,
    min_examples: int = 2,
    seed: int = 0,
) -> Partition:
    """Return the partition for a value that is passed in Python.

    Args:
        given: a `Partition`, the numbers of each client's examples, or the owner of each example.
        dataset: the data set to divide.
        test_fraction, merge, valid, seed: see `partition`; they apply unless `given` is a `Partition`.
        min_examples: owners with fewer examples are omitted.

    Raises:
        DataError: numbers are out of range or repeated, or the number of owners differs from the number of examples.
    """
    if isinstance(given, Partition):
        _check_disjoint(given, dataset.n_rows, "partition")
        return given
    n_dealt = dataset.n_rows if merge else dataset.n_train
    stream, names = Stream(seed, "partition", "given"), tuple[str, ...]()
    values = list(given)
    if values and np.ndim(values[0]) == 0:
        if len(values) != n_dealt:
            raise DataError(f"partition: {len(values)} owners for {n_dealt} examples; give one owner per example")
        names, dealt = schemes.natural(np.asarray(values), None, min_examples)
    else:
        dealt = [np.asarray(rows, np.int64) for rows in values]
        _check_given(dealt, n_dealt)
    fraction = _fraction(dataset, test_fraction, merge)
    _refuse_leaks(dataset, "given", merge=merge, fraction=fraction, valid=valid)
    made = {"name": "given", **_pool(dataset), "clients": len(dealt), "merge": merge, "test_fraction": fraction}
    return _split(dataset, dealt, made | {"valid": valid, "seed": seed}, stream, names)


def _check_given(dealt: Sequence[Rows], n_rows: int) -> None:
    """Raise DataError unless every client has an example, and all numbers are in range and distinct."""
    every = np.concatenate([np.empty(0, np.int64), *dealt])
    if not len(dealt) or not all(map(len, dealt)):
        raise DataError("partition: every client needs at least one example")
    if every.min() < 0 or every.max() >= n_rows:
        raise DataError(
            f"partition: example numbers run from {every.min()} to {every.max()}; they must be from 0 to {n_rows - 1}"
        )
    if len(np.unique(every)) < len(every):
        raise DataError("partition: an example belongs to two clients, or twice to one")


def _groups(dataset: Dataset, scheme: str, by: str | None, bins: int) -> Rows:
    """Return the group of each example for a scheme that divides groups: a value of a column, or a group by target."""
    if by is not None:
        return np.unique(_column(dataset, by, "by"), return_inverse=True)[1].astype(np.int64)
    if scheme in ("iid", "quantity"):
        return np.zeros(dataset.n_rows, np.int64)
    found = dataset.objective.strata(dataset.targets, dataset.n_train, bins)
    if found is None:
        raise DataError(
            f"partition={scheme}: {dataset.objective.skew}; use partition=natural, iid or quantity, or partition.by=COLUMN"
        )
    if len(found.names) < 2:
        raise DataError(f"partition={scheme}: all targets fall into one group; use partition=iid or quantity")
    return found.of


_DEALERS: Final[dict[str, tuple[Callable[..., list[Rows]], tuple[str, ...]]]] = {
    "iid": (schemes.iid, ()),
    "dirichlet": (schemes.dirichlet, ("alpha",)),
    "pathological": (schemes.pathological, ("classes_per_client", "balance")),
    "extended": (schemes.extended, ("classes_per_client", "alpha")),
    "quantity": (schemes.quantity, ("alpha",)),
}


def _fraction(dataset: Dataset, test_fraction: float | None, merge: bool) -> float:
    must_split = merge or dataset.n_train == dataset.n_rows
    fraction = (0.25 if merge else 0.0) if test_fraction is None else test_fraction
    if not 0 <= fraction < 1 or (fraction == 0 and must_split):
        allowed = "above 0 (there is no other test set) and below 1" if must_split else "at least 0 and below 1"
        raise DataError(f"partition.test_fraction={fraction} with partition.merge={merge}: must be {allowed}")
    return fraction


def _present(labels: Rows, clients: int | None, min_examples: int, settings: dict[str, Any]) -> Rows:
    """Return labels renumbered over the classes that have examples, because empty classes would change the quotas of some schemes."""
    if clients is None:
        raise DataError("clients: must be given for this partition")
    if clients * min_examples > len(labels):
        raise DataError(
            f"clients={clients}: {len(labels)} examples are too few to give each client partition.min_examples={min_examples}; "
            "lower one of the two"
        )
    found, present = np.unique(labels, return_inverse=True)
    if (per_client := settings.get("classes_per_client", 1)) > len(found):
        raise DataError(
            f"partition.classes_per_client={per_client}: must be from 1 to {len(found)}, the number of classes with examples"
        )
    return present.astype(np.int64)


def _split(
    dataset: Dataset, dealt: Sequence[Rows], scheme: dict[str, Any], stream: Stream, owners: tuple[str, ...]
) -> Partition:
    """Hold out each client's test and validation examples according to the settings in `scheme`."""
    train, held_out, test = [], [], []
    for i, rows in enumerate(dealt):
        kept, tested = hold_out(rows, scheme["test_fraction"], stream.child("test", i))
        kept, validated = hold_out(kept, scheme["valid"], stream.child("valid", i))
        train.append(kept)
        held_out.append(validated)
        test.append(tested)
    has_official = not scheme["merge"] and dataset.n_train < dataset.n_rows
    common = np.arange(dataset.n_train, dataset.n_rows) if has_official else _union(test)
    return Partition(
        train=tuple(train), valid=tuple(held_out), test=tuple(test), common=common, scheme=scheme, owners=owners
    )


def hold_out(rows: Rows, fraction: float, stream: Stream) -> tuple[Rows, Rows]:
    """Hold out a random fraction of the examples, rounded up, but keep at least one.

    Return the kept and the held-out examples, each sorted.
    """
    if fraction == 0:
        return np.sort(rows), np.empty(0, np.int64)
    n_apart = min(math.ceil(len(rows) * fraction - 1e-9), len(rows) - 1)
    shuffled = stream.numpy.permutation(np.sort(rows))
    return np.sort(shuffled[n_apart:]), np.sort(shuffled[:n_apart])


def _is_split_in_time(dataset: Dataset, column: str) -> bool:
    """Return whether blocks of text (task=language) include test blocks of the same owners."""
    owners, n = dataset.columns[column], dataset.n_train
    return dataset.objective.task == "language" and n < dataset.n_rows and set(owners[n:]) <= set(owners[:n])


def _refuse_leaks(dataset: Dataset, scheme: str, *, merge: bool, fraction: float, valid: float) -> None:
    """Raise DataError if examples overlap, so that a random split would put parts of test examples into training examples."""
    key = (
        "partition.merge=true"
        if merge
        else f"partition.test_fraction={fraction:g}"
        if fraction
        else f"eval.valid={valid:g}"
    )
    if dataset.overlaps and (merge or fraction or valid):
        other = "leave it at 0" if scheme == "own" else "use partition=own, the split in time of each owner"
        raise DataError(
            f"{key} with partition={scheme}: in data={dataset.name}, {dataset.overlaps}, so a random split would leak test examples into "
            f"training; {other}"
        )


def _largest(owners: Rows, n_train: int, n: int) -> Rows:
    """Return the numbers of the n owners with the most training examples, in order. Of equally large owners, the first ones are chosen."""
    return np.sort(np.argsort(-np.bincount(owners[:n_train], minlength=int(owners.max()) + 1), kind="stable")[:n])


def _own(dataset: Dataset, clients: int | None, column: str, valid: float, seed: int) -> Partition:
    _refuse_leaks(dataset, "own", merge=False, fraction=0, valid=valid)
    values, owners = np.unique(_column(dataset, column), return_inverse=True)
    if clients is not None and clients > len(values):
        raise DataError(
            f"clients={clients}: data={dataset.name} has its own split for {len(values)} clients; leave out `clients`, or give fewer"
        )
    kept = _largest(owners, dataset.n_train, clients or len(values))
    by_owner = np.split(np.argsort(owners, kind="stable"), np.cumsum(np.bincount(owners))[:-1])
    mine = [np.split(by_owner[i], [np.searchsorted(by_owner[i], dataset.n_train)]) for i in kept]
    values, is_train = values[kept], np.arange(dataset.n_rows) < dataset.n_train
    for value, (rows, _) in zip(values, mine, strict=True):
        if len(rows) == 0:
            raise DataError(f"partition=own: client '{value}' of column '{column}' has no training examples")
    if is_train.all():
        raise DataError(
            f"partition=own: data={dataset.name} has no test examples; use another partition, such as partition=natural"
        )
    stream = Stream(seed, "partition", "own")
    parts = [hold_out(rows, valid, stream.child("valid", i)) for i, (rows, _) in enumerate(mine)]
    return Partition(
        train=tuple(rows for rows, _ in parts),
        valid=tuple(rows for _, rows in parts),
        test=tuple(rows for _, rows in mine),
        common=np.sort(np.concatenate([rows for _, rows in mine])),
        scheme={
            "name": "own",
            **_pool(dataset),
            "clients": len(values),
            "column": column,
            "valid": valid,
            "seed": seed,
        },
        owners=tuple(map(str, values)),
    )


def _from_file(dataset: Dataset, clients: int | None, path: str | Path | None, valid: float) -> Partition:
    if path is None:
        raise DataError("partition=file needs partition.path=FILE")
    made = Partition.load(path, dataset.n_rows, dataset.n_train)
    if clients not in (None, made.n_clients):
        raise DataError(
            f"clients={clients}: the partition file {path} is for {made.n_clients} clients; leave out `clients`"
        )
    if valid and not any(map(len, made.valid)):
        raise DataError(
            f"eval.valid={valid}: the partition file {path} has no validation examples; add them as 'valid'"
        )
    for key, value in _pool(dataset).items():
        if (dealt := made.scheme.get(key, value)) != value:
            raise DataError(
                f"partition file {path}: it was made for a data set with {key}={dealt}, but this one has {key}={value}"
            )
    return made


def _pool(dataset: Dataset) -> dict[str, Any]:
    """Return facts that identify the data set. Without them, example numbers would be valid for any sufficiently large data set."""
    return {"data": dataset.name, "n_train": dataset.n_train, "n_rows": dataset.n_rows}


def _natural_column(dataset: Dataset) -> str | None:
    """Return the column by which a data set is divided: `client` if it has a client factor, or the natural column of a known data set.

    For an unknown data set, return `client` if it exists, else its only column, else None.
    """
    if dataset.factor:
        return "client"
    if dataset.name in SOURCES:
        return SOURCES[dataset.name].natural
    if "client" in dataset.columns:
        return "client"
    return next(iter(dataset.columns)) if len(dataset.columns) == 1 else None


def _column(dataset: Dataset, column: str | None, key: str = "column") -> npt.NDArray[Any]:
    if column is None or column not in dataset.columns:
        if not dataset.columns:
            given = "" if column is None else f"={column}"
            other = "partition=iid" if key == "column" else "remove it"
            raise DataError(f"partition.{key}{given}: data={dataset.name} has no columns; {other}")
        known = ", ".join(dataset.columns)
        told = f"partition.{key}: must be given" if column is None else f"partition.{key}={column}: no such column"
        raise DataError(f"{told}; data={dataset.name} has the columns: {known}")
    return dataset.columns[column]


def _owners(dataset: Dataset, column: str | None, n_dealt: int) -> npt.NDArray[Any]:
    """Return the owner of each of the first `n_dealt` examples. Raise DataError if an example has no owner ("")."""
    owners = _column(dataset, column)[:n_dealt]
    if (owners == "").any():
        n_missing = int((owners == "").sum())
        hint = "set partition.merge=false, and partition.test_fraction=0.25 to give each client its own test examples"
        raise DataError(
            f"partition.column={column}: {n_missing} examples of data={dataset.name} have no value in this column; {hint}"
        )
    return owners


def _check_settings(
    clients: int | None, scheme: str, alpha: float, classes_per_client: int, min_examples: int, valid: float
) -> None:
    if scheme not in SCHEMES:
        raise DataError(f"partition={scheme}: unknown{suggest(scheme, SCHEMES)}")
    if clients is not None and clients < 1:
        raise DataError(f"clients={clients}: must be at least 1")
    if not 0 < alpha < math.inf:
        raise DataError(f"partition.alpha={alpha}: must be a finite number above 0")
    if classes_per_client < 1:
        raise DataError(f"partition.classes_per_client={classes_per_client}: must be from 1 to the number of classes")
    if min_examples < 2:
        raise DataError(
            f"partition.min_examples={min_examples}: must be at least 2 (one training and one test example)"
        )
    if not 0 <= valid < 1:
        raise DataError(f"partition.valid={valid}: must be at least 0 and below 1")


def _union(parts: Sequence[Rows]) -> Rows:
    return np.unique(np.concatenate([np.empty(0, np.int64), *parts]))


def _read_owners(path: str | Path, content: dict[str, Any]) -> tuple[str, ...]:
    names = content.get("clients") or []
    if (
        not isinstance(names, list)
        or not all(isinstance(n, str) for n in names)
        or len(names) not in (0, len(content["train"]))
    ):
        raise DataError(f"partition file {path}: 'clients' must be a list with the name of each client")
    return tuple(names)


def _read_split(path: str | Path, content: dict[str, Any], split: str, n_rows: int) -> tuple[Rows, ...]:
    lists = content.get(split)
    n_clients = len(content["train"])
    if lists is None:
        return tuple(np.empty(0, np.int64) for _ in range(n_clients))
    if not isinstance(lists, list) or len(lists) != n_clients:
        raise DataError(f"partition file {path}: '{split}' must have one list for each of the {n_clients} clients")
    return tuple(_read_rows(path, rows, f"{split}[{i}]", n_rows) for i, rows in enumerate(lists))


def _read_rows(path: str | Path, rows: object, where: str, n_rows: int) -> Rows:
    if not isinstance(rows, list) or not all(type(row) is int for row in rows):
        raise DataError(f"partition file {path}: {where} must be a list of integers")
    if rows and not (min(rows) >= 0 and max(rows) < n_rows):
        bad = next(row for row in rows if not 0 <= row < n_rows)
        raise DataError(
            f"partition file {path}: {where} has example number {bad}; numbers must be from 0 to {n_rows - 1}"
        )
    array = np.sort(np.asarray(rows, np.int64))
    if len(repeated := array[1:][array[1:] == array[:-1]]):
        raise DataError(f"partition file {path}: {where} has example number {repeated[0]} twice")
    return array


def _check_disjoint(made: Partition, n_rows: int, what: str) -> None:
    n_holders = np.zeros(n_rows, np.int64)
    for rows in (*made.train, *made.valid):
        n_holders[rows] += 1
    if n_holders.max(initial=0) > 1:
        raise DataError(f"{what}: example {n_holders.argmax()} is in two training or validation splits")
    if len(both := np.flatnonzero(n_holders[_union([*made.test, made.common])])):
        row = _union([*made.test, made.common])[both[0]]
        raise DataError(f"{what}: example {row} is in both a training and a test split")
