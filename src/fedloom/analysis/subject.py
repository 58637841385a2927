"""A run to analyse: the nets and examples of its clients, and the model of its server."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

from fedloom.data.schemes import Rows
from fedloom.experiment.loop import Experiment
from fedloom.method import Downlink
from fedloom.nets import Nets, read_weights
from fedloom.objectives import Classification
from fedloom.rng import Stream
from fedloom.tree import Tree

MOST_CLIENTS = 20  # maximum number of clients to analyse; they are evenly spaced


class Owner(NamedTuple):
    """The objects that a client needs for predictions: its nets in evaluation mode, the downlink, and its memory."""

    nets: Nets
    down: Tree
    memory: Tree


class Subject:
    """A reopened run. All random numbers of an analysis depend on the run's seed."""

    def __init__(self, experiment: Experiment) -> None:
        self.method, self.data, self.problem = experiment.method, experiment.data, experiment.problem
        self.task, self.round = experiment.problem.task, experiment.done
        self._engine, self._seed = experiment.engine, experiment.settings.seed
        self.down: Downlink = experiment.hooks.deploy(experiment.server, experiment.done)

    @property
    def clients(self) -> list[int]:
        """The clients to analyse, including those that joined after training."""
        n = self.data.n_clients
        return sorted({int(i) for i in np.linspace(0, n - 1, min(n, MOST_CLIENTS)).round()})

    def owner(self, i: int) -> Owner:
        """Return client `i` after `receive` and `adapt`."""
        modules, client, message = self._engine.personal(self.round, Downlink(self.down.to(i)), i)
        nets = Nets(modules, **client.weights, objective=self.task.objective)
        return Owner(nets, message, client.memory)

    def server(self) -> Owner | None:
        """Return the server's model as received by a client that never trained, or None if the method has no server model."""
        if not self.problem.has_server_model:
            return None
        modules = self.problem.modules(self.problem.arch_of[0])
        blank = self.problem.initial(0, read_weights(modules))
        weights = self.method.receive(blank.weights, self.down.common, blank.memory)
        return Owner(Nets(modules, **weights, objective=self.task.objective), self.down.common, blank.memory)

    def rng(self, *purpose: str | int) -> Stream:
        """Return a stream for one purpose."""
        return Stream(self._seed, "analysis", *purpose)

    def some(self, rows: Rows, n: int, *purpose: str | int) -> Rows:
        """Return at most `n` of the given example numbers, in order. They are drawn at random for the given purpose."""
        if len(rows) <= n:
            return rows
        chosen = self.rng("rows", *purpose).permutation(len(rows))[:n].sort().values
        return np.asarray(rows[chosen.numpy()])

    def training_rows(self, n: int, *purpose: str | int) -> tuple[Tensor, Tensor]:
        """Return the inputs and labels of at most `n` training examples of all clients."""
        return self.rows(self.some(np.concatenate(self.data.partition.train), n, *purpose))

    def rows(self, index: Rows) -> tuple[Tensor, Tensor]:
        """Return the inputs and targets of examples."""
        x, y = self.data.rows(index)
        assert isinstance(x, Tensor)  # see `unsuitable`
        return x, y

    def unsuitable(self, *, classes: bool) -> str:
        """Return the reason why the data cannot be analysed, or "". `classes` states whether the analysis needs classes."""
        spec, task = self.data.spec, self.task.objective.task
        if not spec.is_single or spec.fields[0].is_integer:
            return f"needs images or numbers, but data={self.data.name} has {spec}"
        if classes and not isinstance(self.task.objective, Classification):
            return f"needs classes, but data={self.data.name} is {task}"
        return ""
