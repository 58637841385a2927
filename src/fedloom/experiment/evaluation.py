"""Scoring after a round, and the metrics computed from the scores."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from fedloom.config.settings import Settings
from fedloom.engines import Engine, Problem, Score, ScoreRequest, sum_scores
from fedloom.experiment import metrics
from fedloom.method import Downlink
from fedloom.rng import Stream

Scores = dict[str, list[Score]]
"""For each request, by name: the scores in the order of `Scoring.clients`."""


class Scoring:
    """The evaluations of one experiment."""

    def __init__(self, problem: Problem, settings: Settings, engine: Engine) -> None:
        self._problem, self._settings, self._engine = problem, settings, engine
        data = problem.data
        self._own_tests = any(data.n_test(i) for i in range(data.n_clients))
        tests, common = data.partition.test, data.partition.common
        self._tests_are_common = np.array_equal(np.sort(np.concatenate(tests)), np.sort(common))
        self.clients: Sequence[int] = _sample(problem.task.n_clients, settings)

    def asks(self, general: bool) -> list[ScoreRequest]:
        """Return the score requests for every client. If no client has test examples, personal predictors are scored on the common ones."""
        own = "test" if self._own_tests else "common"
        asks = [ScoreRequest("personal_accuracy", own)]
        if (
            self._settings.eval.fitted and not self._problem.method.pooled
        ):  # a pooled method has no local updates of single clients
            asks.append(ScoreRequest("fitted", own, fitted=True))
        if any(map(len, self._problem.data.partition.valid)):
            asks.append(ScoreRequest("valid", "valid"))
        if general and self._own_tests:
            asks.append(ScoreRequest("general_accuracy", "common"))
        return asks

    def score(self, number: int, down: Downlink, general: bool) -> Scores:
        """Score all requests after `number` rounds; `down` is the method's current `deploy` message."""
        scores = self._engine.score(number, self._problem.codec.through(down), self.clients, self.asks(general))
        found = {name: [score[name] for score in scores] for name in scores[0]}
        if general and not self._own_tests:
            found["general_accuracy"] = found["personal_accuracy"]
        return found

    def row(self, found: Scores, down: Downlink, trained: Collection[int]) -> dict[str, Any]:
        """Return the accuracies and recalls for a row of metrics; `trained`: clients that have trained at least once."""
        known = [self._problem.method.pooled or i in trained for i in self.clients]
        row = metrics.spread(found["personal_accuracy"], "personal_accuracy", known)
        if "fitted" in found:
            row |= metrics.spread(found["fitted"], "personal_accuracy_fitted", known)
        if "valid" in found:
            row["valid_accuracy"] = metrics.number(sum_scores(found["valid"]).accuracy)
        row |= {"general_accuracy": None, "server_accuracy": None}
        row["personal_recall"] = metrics.recall(found["personal_accuracy"])
        if "general_accuracy" in found:
            row |= metrics.over_clients(found["general_accuracy"], "general_accuracy")
            row["general_recall"] = metrics.recall(found["general_accuracy"])
        if self._problem.has_server_model:
            score = self._server(down, found)
            row |= {"server_accuracy": metrics.number(score.accuracy), "server_recall": metrics.recall([score])}
        return row

    def _server(self, down: Downlink, found: Scores) -> Score:
        """Return the server's score. It is derived from the clients' scores if all clients predict with the server's model."""
        data = self._problem.data
        if self._problem.one_model:
            scored, n_common, known = found["personal_accuracy"], len(data.partition.common), None
            if "general_accuracy" in found or not self._own_tests:
                known = found.get("general_accuracy", scored)[0]
            elif len(scored) == data.n_clients and self._tests_are_common:
                known = sum_scores(scored)
            if known and known.rows.sum() == n_common:
                return known
        return self._engine.score_server(down)


def _sample(n: int, settings: Settings) -> Sequence[int]:
    size = settings.eval.clients
    if size is None or size >= n:
        return range(n)
    chosen: list[int] = Stream(settings.seed, "scored").permutation(n)[:size].sort().values.tolist()
    return chosen
