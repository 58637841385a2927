"""The server's hooks of a method, called as the contract has them: on inputs that stay as they are, with seeded randomness."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from fedloom import tree
from fedloom.accelerator import HOST
from fedloom.engines import Problem
from fedloom.errors import MethodError
from fedloom.method import Downlink, Round
from fedloom.rng import Stream
from fedloom.training.turn import own_randomness
from fedloom.tree import Tree, Weights

T = TypeVar("T")


class ServerSide:
    """Calls one problem's server hooks. Raises MethodError where a hook changes its inputs in place."""

    def __init__(self, problem: Problem) -> None:
        self._problem, self._method = problem, problem.method

    def init(self, weights: Weights) -> Tree:
        """The server's state before the first round; `weights` are a client's initial ones."""
        return self._call("init_server", 0, {"weights": weights}, lambda: self._problem.init_server(weights))

    def cohort(self, server: Tree, number: int, size: int) -> list[int]:
        """Who takes part in round `number`."""
        task, rng = self._problem.task, Stream(self._problem.seed, "cohort", number)
        drawn = self._call("cohort", number, {"server": server}, lambda: self._method.cohort(server, task, size, rng))
        members = [int(i) for i in drawn]
        if len(set(members)) != len(members) or not all(0 <= i < task.n_clients for i in members):
            raise MethodError(
                f"round {number}: a cohort must be distinct clients from 0 to {task.n_clients - 1}, not {members}"
            )
        return members

    def downlink(self, server: Tree, number: int, cohort: Sequence[int]) -> Downlink:
        """What the cohort of round `number` is sent."""
        return self._call("downlink", number, {"server": server}, lambda: self._method.downlink(server, cohort))

    def exchange(self, uplinks: Sequence[Tree], number: int, rng: Stream) -> list[Tree]:
        """What the server gets to see of the uplinks."""
        inputs = _named(uplinks)
        return list(self._call("exchange", number, inputs, lambda: self._method.exchange(uplinks, rng)))

    def aggregate(self, server: Tree, uplinks: Sequence[Tree], round: Round) -> Tree:
        """The server's next state."""
        inputs = {"server": server, **_named(uplinks)}
        return self._call("aggregate", round.number, inputs, lambda: self._method.aggregate(server, uplinks, round))

    def logs(self, server: Tree, uplinks: Sequence[Tree], round: Round) -> Mapping[str, float]:
        """The server's own numbers for an evaluated round."""
        inputs = {"server": server, **_named(uplinks)}
        return self._call("server_logs", round.number, inputs, lambda: self._method.server_logs(server, uplinks, round))

    def deploy(self, server: Tree, number: int) -> Downlink:
        """What any client would be sent to predict with after `number` rounds.

        Raises:
            MethodError: a message for each client, which scoring could not use: which clients are scored is not the method's business.
        """
        task = self._problem.task
        down = self._call("deploy", number, {"server": server}, lambda: self._method.deploy(server, task))
        if down.each is not None:
            name = type(self._method).__name__
            raise MethodError(
                f"{name}.deploy gives `each`, one tree per client; it must give one `common` tree for all"
            )
        return down

    def _call(self, hook: str, number: int, inputs: Tree, call: Callable[[], T]) -> T:
        before = tree.versions(inputs)
        with own_randomness(Stream(self._problem.seed, "server hook", hook, number), HOST):
            result = call()
        changed = tree.changed_since(before, inputs)
        if changed:
            name = f"{type(self._method).__name__}.{hook}"
            raise MethodError(f"round {number}: {name} changes '{changed}' in place; inputs of hooks are read-only")
        return result


def _named(uplinks: Sequence[Tree]) -> Tree:
    return {f"uplink {place}": uplink for place, uplink in enumerate(uplinks)}
