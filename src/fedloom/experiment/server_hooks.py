"""Calls a method's server hooks with seeded generators, and checks that they leave their inputs unchanged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

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
    """Calls the server hooks of one problem. Raises MethodError if a hook changes its inputs in place."""

    def __init__(self, problem: Problem) -> None:
        self._problem, self._method = problem, problem.method

    def init(self, weights: Weights) -> Tree:
        """Return the server's state before the first round; `weights` are a client's initial weights."""
        server = self._call("init_server", 0, {"weights": weights}, lambda: self._problem.init_server(weights))
        self._check_tensors(server, "init_server")
        return server

    def cohort(self, server: Tree, number: int, size: int) -> list[int]:
        """Return the cohort of round `number`."""
        task, rng = self._problem.task, Stream(self._problem.seed, "cohort", number)
        drawn = self._call("cohort", number, {"server": server}, lambda: self._method.cohort(server, task, size, rng))
        members = [int(i) for i in drawn]
        if len(set(members)) != len(members) or not all(0 <= i < task.n_clients for i in members):
            raise MethodError(
                f"round {number}: a cohort must consist of distinct clients from 0 to {task.n_clients - 1}, but is {members}"
            )
        return members

    def downlink(self, server: Tree, number: int, cohort: Sequence[int]) -> Downlink:
        """Return the message to the cohort of round `number`."""
        return self._call("downlink", number, {"server": server}, lambda: self._method.downlink(server, cohort))

    def exchange(self, uplinks: Sequence[Tree], number: int, rng: Stream) -> list[Tree]:
        """Return what the server sees of the uplinks after clients have exchanged parts of them."""
        inputs = _named(uplinks)
        return list(self._call("exchange", number, inputs, lambda: self._method.exchange(uplinks, rng)))

    def aggregate(self, server: Tree, uplinks: Sequence[Tree], round: Round) -> Tree:
        """Return the server's next state."""
        inputs = {"server": server, **_named(uplinks)}
        new = self._call("aggregate", round.number, inputs, lambda: self._method.aggregate(server, uplinks, round))
        self._check_tensors(new, "aggregate")
        before, after = tree.structure(server), tree.structure(new)
        for path in [*before, *after]:
            if before.get(path) != after.get(path):
                raise MethodError(
                    f"round {round.number}: {self._name}.aggregate changes the server's structure: '{path}' is {_form(after.get(path))}, "
                    f"but was {_form(before.get(path))}; return every tensor of init_server, with its shape and type"
                )
        return new

    def logs(self, server: Tree, uplinks: Sequence[Tree], round: Round) -> Mapping[str, float]:
        """Return the server's logs for an evaluated round."""
        inputs = {"server": server, **_named(uplinks)}
        return self._call("server_logs", round.number, inputs, lambda: self._method.server_logs(server, uplinks, round))

    def deploy(self, server: Tree, number: int) -> Downlink:
        """Return the message that any client would receive in order to predict after `number` rounds.

        Raises:
            MethodError: `deploy` returned one message per client; scoring cannot use these messages, because the experiment chooses which
                clients to score.
        """
        task = self._problem.task
        down = self._call("deploy", number, {"server": server}, lambda: self._method.deploy(server, task))
        if down.each is not None:
            name = type(self._method).__name__
            raise MethodError(
                f"{name}.deploy returns `each`, one tree per client; it must return one `common` tree for all"
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


def _form(value: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return "missing" if value is None else f"{value[0]} {str(value[1]).removeprefix('torch.')}"


def _named(uplinks: Sequence[Tree]) -> Tree:
    return {f"uplink {place}": uplink for place, uplink in enumerate(uplinks)}
