"""Scoring after a round, and the metrics computed from the scores."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from fedloom.config.settings import Settings
from fedloom.data import Partition
from fedloom.engines import Engine, Problem, ScoreRequest
from fedloom.engines.scoring import score_clients
from fedloom.experiment import metrics
from fedloom.experiment.shared_head import SharedHead
from fedloom.method import Downlink
from fedloom.objectives import Classification, Score, sum_scores
from fedloom.rng import Stream

log = logging.getLogger(__name__)

Scores = dict[str, list[Score]]
"""The scores for each request, by name, in the order of `Scoring.clients`."""


class Scoring:
    """The evaluations of one experiment."""

    def __init__(self, problem: Problem, settings: Settings, engine: Engine, partition: Partition) -> None:
        """Prepare the evaluations. `partition` is the original partition, even if the method pools the examples."""
        self._problem, self._settings, self._engine = problem, settings, engine
        self.head = SharedHead(problem, engine) if settings.eval.shared_head else None
        data = problem.data
        self._own_tests = any(data.n_test(i) for i in range(data.n_clients))
        tests, common = data.partition.test, data.partition.common
        self._tests_are_common = np.array_equal(np.sort(np.concatenate(tests)), np.sort(common))
        self._warned = False
        self.clients: Sequence[int] = _sample(problem.task.n_clients, settings)
        self._held = None
        if isinstance(problem.task.objective, Classification):
            counts = partition.counts(data.dataset.labels, problem.task.n_classes, "train")
            self._held = counts[list(self.clients)] > 0

    def asks(self, general: bool) -> list[ScoreRequest]:
        """Return the score requests for every client.

        If no client has test examples, personal predictors are scored on the common test set.
        """
        own = "test" if self._own_tests else "common"
        asks = [ScoreRequest("personal", own)]
        if (
            self._settings.eval.fitted and not self._problem.method.pooled
        ):  # a pooled method has no local updates of individual clients
            asks.append(ScoreRequest("fitted", own, fitted=True))
        if any(map(len, self._problem.data.partition.valid)):
            asks.append(ScoreRequest("valid", "valid"))
        if self._own_tests and self._problem.data.changed is not None:
            asks.append(ScoreRequest("changed", "changed"))
        if general and self._own_tests:
            asks.append(ScoreRequest("general", "common"))
        return asks

    def score(self, number: int, down: Downlink, general: bool) -> Scores:
        """Score all requests after `number` rounds. `down` is the current `deploy` message of the method."""
        message, asks = self._problem.codec.through(down), self.asks(general)
        if general and self.head:
            message = self.head.fit(number, message)
            asks += self.head.asks("common")
        scores = score_clients(self._engine, number, message, self.clients, asks)
        found = {name: [score[name] for score in scores] for name in scores[0]}
        if general and not self._own_tests:
            found["general"] = found["personal"]
        return found

    def row(self, found: Scores, down: Downlink, trained: Collection[int]) -> dict[str, Any]:
        """Return the accuracies and recalls for a row of metrics. `trained` contains the clients that have trained at least once."""
        known = [self._problem.method.pooled or i in trained for i in self.clients]
        objective = self._problem.task.objective
        row = metrics.spread(objective, found["personal"], "personal", known)
        if "fitted" in found:
            row |= metrics.spread(objective, found["fitted"], "personal", known, suffix=metrics.FITTED)
        if "changed" in found:
            row |= metrics.spread(objective, found["changed"], "changed")
        row |= self.validation(found)
        row |= {f"{view}_{objective.primary.name}": None for view in ("general", "server")}
        row |= metrics.by_name(objective, found["personal"], "personal")
        for view in ("general", "shared_head"):
            if view in found:
                row |= metrics.over_clients(objective, found[view], view)
                row |= metrics.by_held(objective, found[view], self._held, view) if self._held is not None else {}
                row |= metrics.by_name(objective, found[view], view)
        if self._problem.has_server_model:
            score = self._server(down, found)
            row |= metrics.alone(objective, score, "server") | metrics.by_name(objective, [score], "server")
        self._warn_undefined(found, row)
        return row

    def validation(self, found: Scores) -> dict[str, Any]:
        """Return the metrics on all validation examples, or an empty dictionary if there are none."""
        objective = self._problem.task.objective
        return metrics.alone(objective, sum_scores(found["valid"]), "valid") if "valid" in found else {}

    def _warn_undefined(self, found: Scores, row: dict[str, Any]) -> None:
        """Log one line, once, if the primary metric is undefined although examples were scored, because an output is not finite."""
        name = f"personal_{self._problem.task.objective.primary.name}"
        if not self._warned and row.get(name) is None and any(score.n_rows for score in found["personal"]):
            self._warned = True
            log.warning("%s is undefined, because outputs are NaN or infinite; lower method.lr", name)

    def _server(self, down: Downlink, found: Scores) -> Score:
        """Return the server's score. It is derived from the clients' scores if all clients predict with the server's model."""
        data = self._problem.data
        if self._problem.one_model and down.each is None:
            scored, n_common, known = found["personal"], len(data.partition.common), None
            if "general" in found or not self._own_tests:
                known = found.get("general", scored)[0]
            elif len(scored) == data.n_clients and self._tests_are_common:
                known = sum_scores(scored)
            if known and known.n_rows == n_common:
                return known
        return self._engine.score_server(down)


def _sample(n: int, settings: Settings) -> Sequence[int]:
    size = settings.eval.clients
    if size is None or size >= n:
        return range(n)
    chosen: list[int] = Stream(settings.seed, "scored").permutation(n)[:size].sort().values.tolist()
    return chosen
