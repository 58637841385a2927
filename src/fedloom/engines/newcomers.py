"""Clients that join after training."""

from __future__ import annotations

from fedloom import tree
from fedloom.engines.base import Score, ScoreRequest
from fedloom.engines.sequential import Sequential
from fedloom.engines.transfer import moved
from fedloom.method import Client, Downlink, Phase, Turn, init_opts, without
from fedloom.training.turn import lr_scale, run_phases
from fedloom.tree import Tree


class Newcomers(Sequential):
    """An engine that runs newcomers one after another, in this process.

    A newcomer receives the message that clients use for prediction, and runs local updates alone. They run the method's own phases, with
    all shared weights frozen at the received values. The newcomer sends nothing. Its local updates are numbered from 0, so its learning
    rate schedule starts at the beginning, as for every other client.
    """

    def score_received(self, i: int, down: Downlink, ask: ScoreRequest) -> Score:
        """Score newcomer `i` with the weights that it receives, before any local work (including `adapt`)."""
        message = moved(down.common, self.device)
        scorer = self.scorer(ask, message)
        scorer.add(i, self.received(i, message))
        return scorer.scores()[i]

    def join(self, i: int, down: Downlink, turns: int) -> Client:
        """Run newcomer `i`'s local updates. Store and return the client. Optimiser states that would be kept are reset."""
        method, blank = self.problem.method, self.load(i)
        phases = without(method.phases(), blank.weights, method.travelling(blank.weights))
        client, message = blank._replace(opts=init_opts(phases, blank.weights)), moved(down.common, self.device)
        for number in range(turns if phases else 0):
            client = client._replace(weights=method.receive(client.weights, message, client.memory))
            scale = lr_scale(method, self.problem.task, number)
            turn = Turn(number, turns - 1, self.problem.data.n_train(i), lr_scale=scale)
            try:
                trained = self._alone(i, client, message, phases, turn)
            except Exception as error:
                error.add_note(f"client {i}, joining, turn {number}")
                raise
            client = client if tree.not_finite(trained._asdict()) else trained  # undo a diverged local update
        self.store.put(i, client._replace(weights=self.problem.kept(client.weights), opts=blank.opts))
        return self.client(i)

    def _alone(self, i: int, client: Client, message: Tree, phases: tuple[Phase, ...], turn: Turn) -> Client:
        def work(channels_last: bool) -> Client:
            site = self.context(turn.number, i, "join", channels_last)
            return run_phases(phases, self.gradients_of(i), client, message, site, turn=turn)[0]

        return self.with_layout(i, work)
