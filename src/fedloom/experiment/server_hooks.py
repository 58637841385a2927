"""Call a method's server hooks with seeded generators, and check that they do not change their inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TypeVar

from torch import nn

from fedloom import tree
from fedloom.accelerator import HOST
from fedloom.engines import Problem
from fedloom.errors import MethodError
from fedloom.method import Arrival, Downlink, Round
from fedloom.nets import Nets
from fedloom.rng import Stream
from fedloom.training.turn import own_randomness
from fedloom.tree import Tree, Weights

T = TypeVar("T")


class ServerSide:
    """Calls the server hooks of one problem. Raises MethodError if a hook changes its inputs in place."""

    def __init__(self, problem: Problem) -> None:
        self._problem, self._method = problem, problem.method

    def round(self, purpose: str, number: int, arrivals: tuple[Arrival, ...] = ()) -> Round:
        """Return the server's information about a round for the hook `purpose`."""
        return replace(self._problem.round(purpose, number, arrivals), nets=self._bound)

    def _bound(self, weights: Weights) -> Nets:
        """Return the server's nets with these weights, in evaluation mode."""
        return Nets(self._modules, weights["params"], weights["buffers"], objective=self._problem.task.objective)

    @cached_property
    def _modules(self) -> dict[str, nn.Module]:
        return {**self._problem.modules(0), **self._problem.server_modules()}

    def init(self, weights: Weights) -> Tree:
        """Return the server's state before the first round. `weights` are the initial weights of a client."""
        server = self._call("init_server", 0, {"weights": weights}, lambda: self._problem.init_server(weights))
        self._check_tensors(server, "init_server")
        return server

    def cohort(self, server: Tree, number: int, size: int) -> list[int]:
        """Return the cohort of round `number`."""
        task, round = self._problem.task, self.round("cohort", number)
        drawn = self._call("cohort", number, {"server": server}, lambda: self._method.cohort(server, task, size, round))
        members = [int(i) for i in drawn]
        if len(set(members)) != len(members) or not all(0 <= i < task.n_clients for i in members):
            raise MethodError(
                f"round {number}: a cohort must consist of distinct clients from 0 to {task.n_clients - 1}, but is {members}"
            )
        return members

    def downlink(self, server: Tree, number: int, cohort: Sequence[int]) -> Downlink:
        """Return the message to the cohort of round `number`."""
        round = self.round("downlink", number)
        down = self._call("downlink", number, {"server": server}, lambda: self._method.downlink(server, cohort, round))
        if down.each is not None and len(down.each) != len(cohort):
            raise MethodError(
                f"round {number}: {self._name}.downlink returns `each` with {len(down.each)} trees for a cohort of {len(cohort)}"
            )
        return down

    def exchange(self, uplinks: Sequence[Tree], number: int, rng: Stream) -> list[Tree]:
        """Return what the server receives after clients have exchanged parts of their uplinks."""
        inputs = _named(uplinks)
        return list(self._call("exchange", number, inputs, lambda: self._method.exchange(uplinks, rng)))

    def aggregate(self, server: Tree, uplinks: Sequence[Tree], round: Round) -> Tree:
        """Return the server's next state."""
        inputs = {"server": server, **_named(uplinks)}
        new = self._call("aggregate", round.number, inputs, lambda: self._method.aggregate(server, uplinks, round))
        return self._checked(server, new, "aggregate", round.number)

    @property
    def finishes(self) -> bool:
        """Whether the method has a final exchange after the last round."""
        return self._problem.n_exchanges > self._problem.task.rounds

    def finish(self, server: Tree, uplinks: Sequence[Tree], round: Round) -> Tree:
        """Return the server's final state."""
        inputs = {"server": server, **_named(uplinks)}
        new = self._call("finish", round.number, inputs, lambda: self._method.finish(server, uplinks, round))
        return self._checked(server, new, "finish", round.number)

    def _checked(self, server: Tree, new: Tree, hook: str, number: int) -> Tree:
        """Return the server's new state. Raise MethodError unless it has the same structure as the previous state."""
        self._check_tensors(new, hook)
        if wrong := tree.mismatch(server, new):
            raise MethodError(
                f"round {number}: {self._name}.{hook} changes the server's structure: {wrong}; "
                "return every tensor of init_server, with its shape and type"
            )
        return new

    def logs(self, server: Tree, uplinks: Sequence[Tree], round: Round) -> Mapping[str, float]:
        """Return the server's logs for an evaluated round."""
        inputs = {"server": server, **_named(uplinks)}
        return self._call("server_logs", round.number, inputs, lambda: self._method.server_logs(server, uplinks, round))

    def deploy(self, server: Tree, number: int) -> Downlink:
        """Return the messages that clients would receive for predictions after `number` rounds. `each` is indexed by client.

        Raises:
            MethodError: `deploy` returned `each`, but with a number of trees that differs from the number of clients.
        """
        task, round = self._problem.task, self.round("deploy", number)
        down = self._call("deploy", number, {"server": server}, lambda: self._method.deploy(server, task, round))
        if down.each is not None and len(down.each) != task.n_clients:
            raise MethodError(
                f"{self._name}.deploy returns `each` with {len(down.each)} trees; it must have one for each of the {task.n_clients} clients"
            )
        return down

    @property
    def _name(self) -> str:
        return type(self._method).__name__

    def _check_tensors(self, value: Tree, hook: str) -> None:
        if wrong := tree.not_tensor(value):
            raise MethodError(f"{self._name}.{hook}: {wrong}; use a tensor, such as torch.tensor(...)")

    def _call(self, hook: str, number: int, inputs: Tree, call: Callable[[], T]) -> T:
        before = tree.versions(inputs)
        with own_randomness(Stream(self._problem.seed, "server hook", hook, number), HOST):
            result = call()
        changed = tree.changed_since(before, inputs)
        if changed:
            name = f"{type(self._method).__name__}.{hook}"
            raise MethodError(f"round {number}: {name} changes '{changed}' in place; a hook's inputs are read-only")
        return result


def _named(uplinks: Sequence[Tree]) -> Tree:
    return {f"uplink {place}": uplink for place, uplink in enumerate(uplinks)}
