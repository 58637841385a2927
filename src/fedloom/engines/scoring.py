"""Score clients in as few passes as possible: consecutive clients with the same model are scored together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from fedloom import tree
from fedloom.data import Federation
from fedloom.engines.base import Engine, ScoreRequest
from fedloom.engines.shared_head import feature_sums
from fedloom.inputs import Inputs, map_inputs
from fedloom.method import Client, Downlink
from fedloom.objectives import Score, sum_scores

ROWS_AT_ONCE = 8192  # approximate number of own examples of consecutive clients to gather for one pass

Predict = Callable[[int, Client, Inputs], Tensor]  # (client number, client, inputs) -> outputs


class Scorer:
    """Computes the result of one `ScoreRequest` for a sequence of clients."""

    def __init__(self, ask: ScoreRequest, data: Federation, predict: Predict, part: tuple[int, int]) -> None:
        """Prepare the scores. With `part=(k, n)`, only the k-th of n pieces of the common test examples is used."""
        changed = data.changed if ask.rows == "changed" else None
        self._ask, self._data, self._predict, self._part = ask, changed or data, predict, part
        self._last: Client | None = None
        self._score: Score | None = None  # score of the latest model on the common test examples
        self._n_rows = 0  # number of own examples of the waiting clients
        self._waiting: list[int] = []  # clients with the latest model whose own examples have not been scored yet
        self._scores: dict[int, Score] = {}

    def add(self, i: int, client: Client) -> None:
        """Add the next client."""
        if self._last is None or not _same_tensors(self._last, client):
            self._finish()
            self._last, self._score = client, None
        if self._ask.rows == "common":
            self._scores[i] = self._score = self._score or self._common(i, client)
            return
        self._waiting.append(i)
        self._n_rows += len(self._rows(i))
        if self._n_rows > ROWS_AT_ONCE or self._ask.head == "sums":  # sums depend on the last bits of the features
            self._finish()

    def scores(self) -> dict[int, Score]:
        """Return the scores of all clients that were added."""
        self._finish()
        return self._scores

    def _rows(self, i: int) -> np.ndarray[Any, Any]:
        split = "test" if self._ask.rows == "changed" else self._ask.rows
        rows: tuple[np.ndarray[Any, Any], ...] = getattr(self._data.partition, split)
        return rows[i]

    def _common(self, i: int, client: Client) -> Score:
        x, y = common_part(self._data, self._part)
        objective = self._data.objective
        return objective.scores(self._predict(i, client, x), y, [len(y)])[0] if len(y) else objective.none()

    def _finish(self) -> None:
        """Score all waiting clients on their own examples, in one pass."""
        waiting, self._waiting, self._n_rows = self._waiting, [], 0
        objective, sizes = self._data.objective, [len(self._rows(i)) for i in waiting]
        self._scores |= {i: objective.none() for i in waiting}
        if not sum(sizes) or self._last is None:
            return
        x, y = self._data.rows(np.concatenate([self._rows(i) for i in waiting]))
        outputs = self._predict(waiting[0], self._last, x)
        if self._ask.head == "sums":
            self._scores[waiting[0]] = feature_sums(outputs, y, objective.n_classes, self._data.n_clients)
        else:
            self._scores |= zip(waiting, objective.scores(outputs, y, sizes), strict=True)


def score_clients(
    engine: Engine, number: int, down: Downlink, clients: Sequence[int], asks: Sequence[ScoreRequest]
) -> list[dict[str, Score]]:
    """Score clients as described in `Engine.score`.

    If `down.each` is set, it is indexed by client, and there is one request per client, with the client's own message.
    """
    if down.each is None:
        return engine.score(number, down, clients, asks)
    return [engine.score(number, Downlink(down.to(i)), [i], asks)[0] for i in clients]


class Share(NamedTuple):
    """A share of the scoring: some clients, some requests, and one piece (the k-th of n) of the common test examples."""

    clients: Sequence[int]
    asks: Sequence[ScoreRequest]
    part: tuple[int, int]


def shares(asks: Sequence[ScoreRequest], groups: Sequence[Sequence[int]], by_rows: bool) -> list[Share]:
    """Split the scoring into about as many shares as there are groups of clients.

    Own examples are split by group. With `by_rows`, common examples are split into pieces, so that a model that many clients share is
    scored once instead of once per group.
    """
    of_pieces = [ask for ask in asks if by_rows and ask.rows == "common"]
    of_clients = [ask for ask in asks if ask not in of_pieces]
    every, n = [i for group in groups for i in group], len(groups)
    found = [Share(group, of_clients, (0, 1)) for group in groups if group and of_clients]
    return found + [Share(every, of_pieces, (k, n)) for k in range(n) if of_pieces]


def merged(
    work: Sequence[Share],
    done: Iterable[Sequence[Mapping[str, Score]]],
    clients: Sequence[int],
    asks: Sequence[ScoreRequest],
) -> list[dict[str, Score]]:
    """Merge the results of the shares into one dictionary per client, in the order of `clients` and `asks`."""
    found: dict[int, dict[str, Score]] = {i: {} for i in clients}
    for share, scores in zip(work, done, strict=True):
        for i, mine in zip(share.clients, scores, strict=True):
            for name, score in mine.items():
                found[i][name] = sum_scores([found[i][name], score]) if name in found[i] else score
    return [{ask.name: found[i][ask.name] for ask in asks} for i in clients]


def common_part(data: Federation, part: tuple[int, int]) -> tuple[Inputs, Tensor]:
    """Return the k-th of n pieces of the common test examples."""
    x, y = data.common()
    k, n = part
    return map_inputs(lambda values: values.tensor_split(n)[k], x), y.tensor_split(n)[k]


def _same_tensors(a: Client, b: Client) -> bool:
    if a is b:
        return True
    mine, other = ({"weights": c.weights, "memory": c.memory} for c in (a, b))
    pairs = list(zip(tree.flatten(mine), tree.flatten(other), strict=False))
    return len(tree.leaves(mine)) == len(tree.leaves(other)) and all(p == q and x is y for (p, x), (q, y) in pairs)
