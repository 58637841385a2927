"""The classifier on shared features of one experiment. It is fitted from the clients' sums, and scores clients and newcomers."""

from __future__ import annotations

import logging

from torch import Tensor

from fedloom.engines import Engine, Problem, Score, ScoreRequest
from fedloom.engines.scoring import score_clients
from fedloom.engines.shared_head import KEY, feature_sums_bytes, fitted_head, head_outputs, summed
from fedloom.errors import DivergedError
from fedloom.experiment.personal_model import PersonalModel
from fedloom.inputs import Inputs
from fedloom.method import Downlink
from fedloom.nets import Nets
from fedloom.tree import Tree

AT_ONCE = 32  # number of clients whose sums are in memory at the same time

log = logging.getLogger(__name__)


class SharedHead:
    """Fits the classifier after a round, and stores the latest one."""

    def __init__(self, problem: Problem, engine: Engine) -> None:
        self._problem, self._engine = problem, engine
        self._last: tuple[int, Tree | None] = -1, None
        self.uplink_bytes = 0
        """Number of bytes of the sums that all clients send for one fit."""

    def fit(self, number: int, down: Downlink) -> Downlink:
        """Return a message with the classifier of all training clients after `number` rounds.

        `down` is the message that clients use for predictions. If there is no usable classifier, because features are not finite, `down`
        is returned unchanged, and a warning is logged.
        """
        if self._last[0] != number:
            self._last = number, self._fitted(number, down)
        head = self._last[1]
        return down if head is None else Downlink({**down.common, KEY: head}, down.each)

    def asks(self, rows: str) -> list[ScoreRequest]:
        """Return the request to score the latest classifier, or an empty list if there is no classifier."""
        return [ScoreRequest(KEY, rows, head="shared")] if self._last[1] is not None else []

    def model(self, number: int, down: Downlink, i: int) -> PersonalModel:
        """Return the body that client `i` receives after `number` rounds, before `adapt`, with the classifier of all clients.

        Raises:
            DivergedError: there is no classifier, because features are too large or not finite.
        """
        method = self._problem.method
        message, features = self.fit(number, down).to(i), method.shared_features()
        if KEY not in message or features is None:
            raise DivergedError(f"after round {number}, features are too large or not finite; try a smaller method.lr")

        def predict(nets: Nets, x: Inputs, down: Tree, memory: Tree) -> Tensor:
            return head_outputs(features(nets, x, down, memory), down[KEY])

        return PersonalModel(method, *self._engine.personal(number, Downlink(message), i, adapt=False), predict)

    def _fitted(self, number: int, down: Downlink) -> Tree | None:
        total: list[Score] = []
        n, request = self._problem.task.n_clients, ScoreRequest("sums", "train", head="sums")
        self.uplink_bytes = 0
        for start in range(0, n, AT_ONCE):
            clients = range(start, min(start + AT_ONCE, n))
            scores = score_clients(self._engine, number, down, clients, [request])
            sums = [score["sums"] for score in scores if score["sums"].n_rows]  # none for a client without examples
            self.uplink_bytes += sum(map(feature_sums_bytes, sums))
            total = [summed([*total, *sums])] if total or sums else []
        head = fitted_head(total[0]) if total else None
        if head is None:
            log.warning(
                "the shared head is not fitted after round %d, because features are too large or not finite", number
            )
        return head
