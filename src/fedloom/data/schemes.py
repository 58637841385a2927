"""Partition schemes: ways to split examples across clients.

Each scheme takes labels or a column, its settings and a stream, and returns the example numbers of each client. Most schemes first draw
counts (K, Y), the number of examples per client and class. Examples are assigned only after a draw has been accepted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from fedloom.errors import DataError
from fedloom.rng import Stream

log = logging.getLogger(__name__)

Rows = npt.NDArray[np.int64]
MAX_DRAWS: Final = 2000


class Wanted(NamedTuple):
    """Requirements for the number of examples of every client."""

    examples: int
    repair: bool = False  # move examples between clients instead of drawing again


def iid(labels: Rows, n_clients: int, wanted: Wanted, stream: Stream) -> list[Rows]:
    """Split examples at random into equal parts. Sizes differ by at most one, so no redraws are needed to reach `min_examples`."""
    parts = np.array_split(stream.numpy.permutation(len(labels)), n_clients)
    return [np.asarray(part, np.int64) for part in parts]


def dirichlet(labels: Rows, n_clients: int, wanted: Wanted, stream: Stream, *, alpha: float) -> list[Rows]:
    """Split by capped Dirichlet draws, the "practical" setting of PFLlib and FedRIR.

    For each class in turn, the clients' proportions are drawn from Dirichlet(alpha). The proportions of clients that already have N/K
    examples or more are set to 0, and the others are renormalised. The whole draw is repeated until every client has `min_examples`
    examples.
    """
    totals = np.bincount(labels)

    def draw() -> Rows | None:
        counts = np.zeros((n_clients, len(totals)), np.int64)
        for c, total in enumerate(totals):
            shares = stream.numpy.dirichlet(np.full(n_clients, alpha))
            shares[counts.sum(axis=1) * n_clients >= len(labels)] = 0
            cut = _cut(shares, total)
            if cut is None:
                return None
            counts[:, c] = cut
        return counts

    return _deal(labels, _accepted(draw, "dirichlet", n_clients, wanted, "a larger partition.alpha"), stream)


def pathological(
    labels: Rows, n_clients: int, wanted: Wanted, stream: Stream, *, classes_per_client: int, balance: bool
) -> list[Rows]:
    """Give each client a few classes, the "pathological" setting of PFLlib and FedRIR.

    For each class in turn, its examples are assigned to the first ceil(K/Y * classes_per_client) clients that have too few classes. With
    `balance`, these clients get equal numbers. Otherwise, each of them except the last gets a number drawn uniformly between a tenth of
    the equal number and the equal number, and the last one gets the rest.
    """
    totals = np.bincount(labels)
    holders = _holders_in_turn(n_clients, len(totals), classes_per_client)

    def draw() -> Rows:
        counts = np.zeros((n_clients, len(totals)), np.int64)
        for c, clients in enumerate(holders):
            equal = totals[c] / len(clients)
            sizes = np.full(len(clients) - 1, int(equal))
            if not balance:
                sizes = stream.numpy.integers(int(equal / 10), max(int(equal), int(equal / 10) + 1), len(sizes))
            counts[clients, c] = [*sizes, totals[c] - sizes.sum()]
        return counts

    draws = 1 if balance else MAX_DRAWS
    advice = "another partition.classes_per_client"
    return _deal(
        labels,
        _accepted(draw, "pathological", n_clients=n_clients, wanted=wanted, advice=advice, n_draws=draws),
        stream,
    )


def extended(
    labels: Rows, n_clients: int, wanted: Wanted, stream: Stream, *, classes_per_client: int, alpha: float
) -> list[Rows]:
    """Split by extended Dirichlet draws (Li & Lyu, NeurIPS 2023).

    Each client has a few classes, and the examples of each class are divided by Dirichlet(alpha) proportions. Each client in turn gets the
    classes that the fewest clients have so far. Ties are broken at random.
    """
    totals = np.bincount(labels)
    if n_clients * classes_per_client < len(totals):
        raise _uncovered(n_clients, len(totals), classes_per_client, n_clients * classes_per_client)

    def draw() -> Rows | None:
        has = np.zeros((n_clients, len(totals)), bool)
        for i in range(n_clients):
            order = np.lexsort((stream.numpy.random(len(totals)), has.sum(0)))
            has[i, order[:classes_per_client]] = True
        counts = np.zeros(has.shape, np.int64)
        for c, total in enumerate(totals):
            clients = np.flatnonzero(has[:, c])
            cut = _cut(stream.numpy.dirichlet(np.full(len(clients), alpha)), total)
            if cut is None:
                return None
            counts[clients, c] = cut
        return counts

    advice = "a larger partition.alpha or partition.classes_per_client"
    return _deal(labels, _accepted(draw, "extended", n_clients, wanted, advice), stream)


def quantity(labels: Rows, n_clients: int, wanted: Wanted, stream: Stream, *, alpha: float) -> list[Rows]:
    """Divide the examples into parts whose sizes come from one Dirichlet(alpha) draw, and assign examples at random.

    Clients therefore differ in size, but not in class distribution.
    """

    def draw() -> Rows | None:
        sizes = _cut(stream.numpy.dirichlet(np.full(n_clients, alpha)), len(labels))
        return None if sizes is None else sizes[:, None]

    counts = _accepted(draw, "quantity", n_clients, wanted, "a larger partition.alpha")
    return _deal(np.zeros_like(labels), counts, stream)


def natural(column: npt.NDArray[Any], n_clients: int | None, min_examples: int) -> tuple[tuple[str, ...], list[Rows]]:
    """Create one client per value of a column, in sorted order, or, with `n_clients`, only for the values with the most examples.

    Values with fewer than `min_examples` examples are omitted. Return the clients' values and examples. Raise DataError if there are too
    few values.
    """
    values, owners = np.unique(column, return_inverse=True)
    sizes = np.bincount(owners, minlength=len(values))
    large = np.argsort(-sizes, kind="stable")[: int((sizes >= min_examples).sum())]
    if n_clients is not None and n_clients > len(large):
        raise DataError(
            f"clients={n_clients}: only {len(large)} of the column's {len(values)} values have at least "
            f"partition.min_examples={min_examples} examples; "
            + (
                f"set clients to at most {len(large)}"
                if len(large)
                else "choose another column or partition, such as iid"
            )
        )
    if len(large) == 0:
        raise DataError(
            f"partition.min_examples={min_examples}: no value of the column has that many examples; choose a smaller number"
        )
    small = np.setdiff1d(np.arange(len(values)), large)
    if len(small):
        log.warning(
            "partition=natural: left out %d of %d owners, with %d examples, because each has fewer than partition.min_examples=%d",
            *(len(small), len(values), sizes[small].sum(), min_examples),
        )
    order = np.argsort(owners, kind="stable")
    groups = np.split(order, np.cumsum(sizes)[:-1])
    chosen = sorted(large[:n_clients])
    return tuple(str(values[v]) for v in chosen), [groups[v] for v in chosen]


def with_floor(train: tuple[Rows, ...], groups: Rows, floor: int, stream: Stream) -> tuple[Rows, ...]:
    """Move training examples between clients until each has at least `floor` of every group that occurs among them.

    An example is moved from the client that has the most examples of the group at that time. Raise DataError if a group is too small.

    Args:
        train: the numbers of each client's training examples.
        groups: the group (N,) of each example of the data set, such as its class.
    """
    clients = [list(rows) for rows in train]
    for value in np.unique(groups[np.concatenate(train)]):
        held = [[int(row) for row in rows if groups[row] == value] for rows in clients]
        if sum(map(len, held)) < floor * len(clients):
            raise DataError(
                f"partition.class_floor={floor}: {len(clients)} clients need {floor * len(clients)} training examples of each class, but "
                f"class {value} has only {sum(map(len, held))}; choose a smaller number"
            )
        rng = stream.child(int(value)).numpy
        for i in range(len(clients)):
            while len(held[i]) < floor:
                donor = max(range(len(clients)), key=lambda k: len(held[k]))
                row = held[donor].pop(int(rng.integers(len(held[donor]))))
                clients[donor].remove(row)
                clients[i].append(row)
                held[i].append(row)
    return tuple(np.sort(np.array(rows, np.int64)) for rows in clients)


def _cut(shares: npt.NDArray[np.float64], total: int) -> Rows | None:
    """Return integers that are roughly proportional to the shares and sum to `total`, or None if all shares are 0."""
    size = shares.sum()
    if not size > 0:
        return None
    ends = (np.cumsum(shares / size) * total).astype(np.int64)
    ends[np.flatnonzero(shares)[-1] :] = total
    return np.diff(ends, prepend=0)


def _accepted(
    draw: Callable[[], Rows | None],
    scheme: str,
    n_clients: int,
    wanted: Wanted,
    advice: str,
    n_draws: int = MAX_DRAWS,
) -> Rows:
    for _ in range(n_draws):
        counts = draw()
        if counts is not None and (wanted.repair or counts.sum(axis=1).min() >= wanted.examples):
            return _repaired(counts, wanted.examples, scheme)
    raise DataError(
        f"partition={scheme} clients={n_clients}: no draw gave each client partition.min_examples={wanted.examples} examples; "
        f"try {advice}, a smaller partition.min_examples, or partition.repair=true"
    )


def _repaired(counts: Rows, min_examples: int, scheme: str) -> Rows:
    """Return the counts (K, Y) after moving examples from the largest clients to those with fewer than `min_examples`.

    Each move takes examples from the largest group of the largest client. The number of moved examples is logged.
    """
    counts, n_moved = counts.copy(), 0
    for i in np.flatnonzero(counts.sum(1) < min_examples):
        while (lacking := min_examples - int(counts[i].sum())) > 0:
            donor = int(counts.sum(1).argmax())
            c = int(counts[donor].argmax())
            n = min(lacking, int(counts[donor, c]), int(counts[donor].sum()) - min_examples)
            counts[donor, c] -= n
            counts[i, c] += n
            n_moved += n
    if n_moved:
        log.warning(
            "partition=%s: moved %d examples so that every client has partition.min_examples=%d",
            scheme,
            n_moved,
            min_examples,
        )
    return counts


def _deal(labels: Rows, counts: Rows, stream: Stream) -> list[Rows]:
    """Shuffle each class and split it according to its column of the counts (K, Y)."""
    pieces = []
    for c in range(counts.shape[1]):
        rows = stream.numpy.permutation(np.flatnonzero(labels == c))
        pieces.append(np.split(rows, np.cumsum(counts[:-1, c])))
    return [np.concatenate(mine) for mine in zip(*pieces, strict=True)]


def _holders_in_turn(n_clients: int, n_classes: int, classes_per_client: int) -> list[Rows]:
    lacking = np.full(n_clients, classes_per_client)
    n_holders = -(-n_clients * classes_per_client // n_classes)
    holders = []
    for c in range(n_classes):
        clients = np.flatnonzero(lacking)[:n_holders]
        if len(clients) == 0:
            raise _uncovered(n_clients, n_classes, classes_per_client, c)
        lacking[clients] -= 1
        holders.append(clients)
    return holders


def _uncovered(n_clients: int, n_classes: int, classes_per_client: int, n_covered: int) -> DataError:
    return DataError(
        f"partition.classes_per_client={classes_per_client} with clients={n_clients} covers {n_covered} of {n_classes} "
        "classes; choose them so that clients times classes_per_client is a multiple of the number of classes"
    )
