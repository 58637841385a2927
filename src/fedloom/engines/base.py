"""The seam between an experiment and whatever runs its clients.

An engine owns the clients: their weights, memory and optimiser states never leave it except through `client` (checkpoints, exports). An
experiment hands it downlinks and gets replies; it never sees where or in which order the work was done.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
from torch import Tensor, nn

from fedloom import tree
from fedloom.accelerator import HOST
from fedloom.data import Federation
from fedloom.method import Architecture, Client, Downlink, Method, Task, init_opts, predict_model
from fedloom.nets import read_weights, select
from fedloom.rng import Stream
from fedloom.training.batches import Plan
from fedloom.training.turn import Modules, fresh_modules, own_randomness
from fedloom.tree import Tree, Weights
from fedloom.wire.codec import PLAIN, Codec


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What came back from one client's turn."""

    client: int
    slot: int  # its place in the cohort
    uplink: Tree
    examples: int
    steps: Mapping[str, int]
    logs: Mapping[str, float]
    seconds: float
    phase_seconds: Mapping[str, float] = field(default_factory=dict)
    diverged: str = ""  # the first tensor, sent or kept, with numbers that are not finite: then the turn is undone
    is_finite: bool = False  # whether this program itself has looked at all numbers: what a device says does not count


class Score(NamedTuple):
    """How one predictor did on one set of rows: rows predicted rightly, and rows, per class (Y,)."""

    right: np.ndarray
    rows: np.ndarray

    @property
    def accuracy(self) -> float:
        """Right over all; NaN where there are no rows."""
        return float(self.right.sum() / self.rows.sum()) if self.rows.sum() else float("nan")


class ScoreRequest(NamedTuple):
    """Which model of a client to score on which rows."""

    name: str  # the key in the reply
    rows: str  # "test" | "valid" | "common"
    fitted: bool = False  # the model as the client's last turn left it, not as the downlink makes it


@dataclass(frozen=True, kw_only=True)
class Problem:
    """All that an engine needs to know. Read-only, and the same in every worker."""

    method: Method
    task: Task
    archs: tuple[Architecture, ...]
    arch_of: tuple[int, ...]  # for each client, its place in `archs`
    data: Federation
    plan: Plan
    seed: int
    same_init: bool = True  # whether all clients of one architecture start from the same weights
    bf16: bool = False  # whether matrix products and convolutions run in bfloat16
    codec: Codec = PLAIN  # what becomes of messages on the wire
    keep_fitted: bool = False  # whether clients keep their trained copy of what travels, for scoring it
    slowdowns: tuple[float, ...] = ()  # a client does only one in so many of its steps; empty: all do all of them

    def modules(self, arch: int) -> Modules:
        """Fresh modules of one architecture, holding its initial weights."""
        return self._modules(arch, Stream(self.seed, "init"))

    def _modules(self, arch: int, rng: Stream) -> dict[str, nn.Module]:
        return fresh_modules(lambda: self.method.nets(self.archs[arch], self.task), rng)

    def initial(self, client: int, shared: Weights) -> Client:
        """A client that has never taken part. `shared` are its architecture's initial weights, used unless clients differ."""
        weights = shared
        if not self.same_init:
            weights = read_weights(self._modules(self.arch_of[client], Stream(self.seed, "init", client)))
        method = self.method
        opts = init_opts((*method.phases(), *method.adapt()), weights)
        unsent = self.codec.unsent(method.travelling(weights))
        return Client(weights, method.init_memory(weights, self.task), opts, unsent)

    def init_server(self, weights: Weights) -> Tree:
        """The server's state before the first round; torch's generator is seeded for methods that draw from it."""
        with own_randomness(Stream(self.seed, "init_server"), HOST):
            return self.method.init_server(weights, self.task)

    def stream(self, number: int, client: int, purpose: str) -> Stream:
        """A client's stream for one purpose in one round."""
        return Stream(self.seed, purpose, number, client)

    def plan_of(self, client: int) -> Plan:
        """How a client's rows are cut into batches in a turn."""
        return self.plan._replace(slowdown=self.slowdowns[client]) if self.slowdowns else self.plan

    @property
    def keeps_all(self) -> bool:
        """Whether clients keep their trained copy of what travels."""
        return self.method.keeps_shared or self.keep_fitted or not self.method.shared

    @cached_property
    def one_model(self) -> bool:
        """Whether after a downlink every client predicts with the server's model: all of it travels and nothing of its own is mixed in."""
        method, weights = self.method, read_weights(self.modules(0))
        predictors, whole = method.predictors(), tree.structure(weights).keys()
        return (
            len(self.archs) == 1
            and not self.codec.downlink  # what arrives is coarser
            and predictors["personal"] is predictors.get("server") is predict_model
            and type(method).receive is Method.receive
            and not method.adapt()
            and bool(method.shared)
            and tree.structure(method.travelling(weights)).keys() == whole
        )

    @cached_property
    def has_server_model(self) -> bool:
        """Whether the server can predict: not where running statistics stay with clients, which leaves it the initial ones."""
        if "server" not in self.method.predictors():
            return False
        travelling = (
            select(read_weights(self.modules(0)), self.method.shared) if self.method.shared else {"buffers": {}}
        )
        return self.method.buffers == "shared" or not travelling["buffers"]

    def kept(self, weights: Weights) -> Weights:
        """The part of the weights that a client keeps between rounds."""
        if self.keeps_all:
            return weights
        return select(weights, self.method.shared, buffers=self.method.buffers == "shared", rest=True)


class Engine(ABC):
    """Runs the clients of one problem."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    @abstractmethod
    def train(self, number: int, cohort: Sequence[int], down: Downlink) -> list[Reply]:
        """Let the cohort take its turns; replies in cohort order, fewer where clients were lost. Uplinks last until the next `train`.

        Messages are as they travel: `down` went through `Codec.send`, and uplinks must go through `Codec.opened`. Replies of clients that
        were `busy` are answers to an earlier round, and come last.
        """

    def busy(self) -> frozenset[int]:
        """Clients that are still at work for an earlier round: their reply may come with a later `train`."""
        return frozenset()

    def asked(self, cohort: Sequence[int]) -> Sequence[int]:
        """Those of the cohort of the last `train` who were sent the downlink: not clients of devices that were not there."""
        return cohort

    @abstractmethod
    def score(
        self, number: int, down: Downlink, clients: Sequence[int], asks: Sequence[ScoreRequest]
    ) -> list[dict[str, Score]]:
        """Score the clients' personal predictors: one dictionary per client, by the names of the asks."""

    @abstractmethod
    def score_server(self, down: Downlink) -> Score:
        """Score the method's server predictor on the common rows."""

    @abstractmethod
    def client(self, i: int) -> Client:
        """All that client `i` keeps."""

    @abstractmethod
    def changed(self) -> Iterable[int]:
        """The clients that differ from their initial state."""

    @abstractmethod
    def restore(self, i: int, client: Client) -> None:
        """Put back what `client(i)` gave earlier (resuming a run)."""

    def personal(self, number: int, down: Downlink, i: int) -> tuple[Modules, Client, Tree]:
        """Client `i`'s personal predictor after `receive` and `adapt`: modules, weights and memory, and the downlink it was given."""
        raise NotImplementedError

    def modules(self) -> Sequence[Modules]:
        """The modules that this process computes with, by architecture; none where the work is done elsewhere."""
        return ()

    def close(self) -> None:  # noqa: B027 (most engines hold nothing to let go of)
        """Let go of workers and files."""


def sum_scores(scores: Iterable[Score]) -> Score:
    """Several scores as one."""
    every = list(scores)
    return Score(np.sum([s.right for s in every], axis=0), np.sum([s.rows for s in every], axis=0))


__all__ = ["Engine", "Problem", "Reply", "Score", "ScoreRequest", "Tensor", "sum_scores"]
