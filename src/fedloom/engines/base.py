"""The interface between an experiment and the engine that runs its clients.

An engine owns the clients. Their weights, memory and optimiser states leave it only through `client` (for checkpoints and exports). An
experiment passes downlinks to the engine and receives replies; it does not depend on where or in which order the engine runs local
updates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fedloom import tree
from fedloom.accelerator import HOST
from fedloom.data import Federation
from fedloom.errors import MethodError
from fedloom.method import (
    Architecture,
    Arrival,
    Client,
    ClientData,
    Downlink,
    Method,
    Round,
    Sweep,
    Task,
    init_opts,
    predict_model,
)
from fedloom.nets import read_weights, select
from fedloom.objectives import Classification, Objective, Score
from fedloom.rng import Stream
from fedloom.training.batches import Plan
from fedloom.training.turn import Modules, fresh_modules, own_randomness
from fedloom.tree import Tree, Weights
from fedloom.wire.codec import PLAIN, Codec


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The result of one client's local update."""

    client: int
    slot: int  # the client's position in the cohort
    uplink: Tree
    examples: int
    steps: Mapping[str, int]
    logs: Mapping[str, float]
    seconds: float
    phase_seconds: Mapping[str, float] = field(default_factory=dict)
    diverged: str = ""  # the first non-finite tensor that is sent or kept; if there is one, the update is undone
    is_finite: bool = False  # whether this process (not a device) has checked that all numbers are finite


class ScoreRequest(NamedTuple):
    """A client's model to score, and the examples on which it is scored."""

    name: str  # the key of the result
    rows: str  # "train" | "test" | "valid" | "common" | "changed": own test examples with another client factor
    fitted: bool = False  # score the model from the client's latest local update, not the downlink
    head: Literal["own", "sums", "shared"] = "own"
    """`own` is the personal predictor. The other two use the features that clients share, before `adapt`: `sums` returns
    `shared_head.feature_sums` instead of a score, and `shared` predicts with the classifier in the downlink."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Everything that an engine needs. A problem is read-only and the same in every worker."""

    method: Method
    task: Task
    archs: tuple[Architecture, ...]
    arch_of: tuple[int, ...]  # each client's index in `archs`
    data: Federation
    plan: Plan
    seed: int
    same_init: bool = True  # whether all clients of one architecture start from the same weights
    bf16: bool = False  # whether matrix products and convolutions run in bfloat16
    codec: Codec = PLAIN  # the encoding of messages
    keep_fitted: bool = False  # whether clients keep their trained copy of the shared weights for scoring
    slowdowns: tuple[
        float, ...
    ] = ()  # a client with factor s takes 1 / s of its steps; if empty, all clients take all steps

    def modules(self, arch: int) -> Modules:
        """Return fresh modules of one architecture, with its initial weights."""
        return self._modules(arch, Stream(self.seed, "init"))

    def _modules(self, arch: int, rng: Stream) -> dict[str, nn.Module]:
        return fresh_modules(lambda: self.method.nets(self.archs[arch], self.task), rng)

    def initial(self, client: int, shared: Weights) -> Client:
        """Return a client that has never participated.

        `shared` contains the initial weights of its architecture. They are not used if each client has its own initial weights.
        """
        weights = shared
        if not self.same_init:
            weights = read_weights(self._modules(self.arch_of[client], Stream(self.seed, "init", client)))
        method = self.method
        opts = init_opts((*method.phases(), *method.adapt()), weights)
        unsent = self.codec.unsent(method.travelling(weights))
        return Client(weights, self.memory(client, weights), opts, unsent)

    def memory(self, client: int, weights: Weights) -> Tree:
        """Return the initial memory of a client with these initial weights."""
        method = self.method
        if type(method).init_memory is Method.init_memory:
            return {}
        known = client_data(self.data.train_targets(client), self.task.objective)
        memory = method.init_memory(weights, self.task, known)
        if wrong := tree.not_tensor(memory):
            name = type(method).__name__
            raise MethodError(f"{name}.init_memory: {wrong}; use a tensor of fixed shape, such as torch.zeros(...)")
        return memory

    def init_server(self, weights: Weights) -> Tree:
        """Return the server's state before the first round. torch's generator is seeded for methods that draw random numbers from it."""
        weights = tree.merge(weights, read_weights(self.server_modules()))
        with own_randomness(Stream(self.seed, "init_server"), HOST):
            return self.method.init_server(weights, self.task, self.round("init_server", 0))

    def server_modules(self) -> dict[str, nn.Module]:
        """Return fresh modules of the nets that only the server has, with their initial weights."""
        return fresh_modules(
            lambda: self.method.server_nets(self.archs[0], self.task), Stream(self.seed, "server nets")
        )

    def round(self, purpose: str, number: int, arrivals: tuple[Arrival, ...] = ()) -> Round:
        """Return the server's information about a round for the hook `purpose`."""
        n, rng = self.task.n_clients, Stream(self.seed, purpose, number)
        return Round(number, n, arrivals, rng, examples=self.examples)

    @cached_property
    def uses_valid(self) -> bool:
        """Whether a phase visits the clients' validation examples."""
        phases = (*self.method.phases(), *self.method.adapt())
        return any(isinstance(phase, Sweep) and phase.rows == "valid" for phase in phases)

    @property
    def n_exchanges(self) -> int:
        """The number of exchanges of a run: one per round, and the final exchange if the method overrides `finish`."""
        return self.task.rounds + (type(self.method).finish is not Method.finish)

    @cached_property
    def examples(self) -> tuple[int, ...]:
        """The number of training examples of every client that trains, or 0 if the server does not know the number."""
        return tuple(self.data.n_train(i) for i in range(self.task.n_clients))

    def stream(self, number: int, client: int, purpose: str) -> Stream:
        """Return a client's stream for one purpose in one round."""
        return Stream(self.seed, purpose, number, client)

    def plan_of(self, client: int) -> Plan:
        """Return the plan that splits a client's examples into batches for a local update."""
        return self.plan._replace(slowdown=self.slowdowns[client]) if self.slowdowns else self.plan

    @property
    def keeps_all(self) -> bool:
        """Whether clients keep their trained copy of the shared weights."""
        return self.method.keeps_shared or self.keep_fitted or not self.method.shared

    @cached_property
    def one_model(self) -> bool:
        """Whether every client predicts with the server's model after a downlink.

        This is the case if all weights are sent and clients add no private weights.
        """
        method, weights = self.method, read_weights(self.modules(0))
        predictors, whole = method.predictors(), tree.structure(weights).keys()
        return (
            len(self.archs) == 1
            and not self.codec.downlink  # a lossy downlink changes the weights
            and predictors["personal"] is predictors.get("server") is predict_model
            and type(method).receive is Method.receive
            and not method.adapt()
            and bool(method.shared)
            and tree.structure(method.travelling(weights)).keys() == whole
        )

    @cached_property
    def has_server_model(self) -> bool:
        """Whether the server can predict. It cannot if running statistics stay with clients, because it has only their initial values."""
        if "server" not in self.method.predictors():
            return False
        travelling = (
            select(read_weights(self.modules(0)), self.method.shared) if self.method.shared else {"buffers": {}}
        )
        return self.method.buffers == "shared" or not travelling["buffers"]

    def kept(self, weights: Weights) -> Weights:
        """Return the weights that a client keeps between rounds."""
        if self.keeps_all:
            return weights
        return select(weights, self.method.shared, buffers=self.method.buffers == "shared", rest=True)


def client_data(targets: Tensor, objective: Objective) -> ClientData:
    """Return a client's facts about its training examples. `targets` are the targets of these examples."""
    counts = torch.zeros(0)
    if isinstance(objective, Classification):
        counts = torch.bincount(targets.cpu(), minlength=objective.n_classes).to(torch.get_default_dtype())
    return ClientData(len(targets), counts)


class Engine(ABC):
    """Runs the clients of one problem."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    @abstractmethod
    def train(self, number: int, cohort: Sequence[int], down: Downlink) -> list[Reply]:
        """Run the cohort's local updates. Return the replies in cohort order, without those of lost clients.

        Uplinks stay valid until the next call of `train`. Messages are encoded: `down` has passed through `Codec.send`, and uplinks must
        be decoded with `Codec.opened`. Replies of clients that were `busy` belong to an earlier round, and come last.
        """

    def busy(self) -> frozenset[int]:
        """Return the clients that are still running a local update of an earlier round. A later `train` may return their replies."""
        return frozenset()

    def asked(self, cohort: Sequence[int]) -> Sequence[int]:
        """Return the members of the latest cohort that received the downlink: all except clients of absent devices."""
        return cohort

    @abstractmethod
    def score(
        self, number: int, down: Downlink, clients: Sequence[int], asks: Sequence[ScoreRequest]
    ) -> list[dict[str, Score]]:
        """Score the clients' personal predictors. Return one dictionary per client, by the names of the requests."""

    @abstractmethod
    def score_server(self, down: Downlink) -> Score:
        """Score the method's server predictor on the common test examples."""

    @abstractmethod
    def client(self, i: int) -> Client:
        """Return everything that client `i` keeps."""

    @abstractmethod
    def changed(self) -> Iterable[int]:
        """Return the clients that differ from their initial state."""

    @abstractmethod
    def restore(self, i: int, client: Client) -> None:
        """Restore the state that `client(i)` returned earlier (when a run is resumed)."""

    def personal(self, number: int, down: Downlink, i: int, adapt: bool = True) -> tuple[Modules, Client, Tree]:
        """Return client `i`'s personal predictor as modules, weights with memory, and its downlink.

        It is the predictor after `receive` and, with `adapt`, after the method's `adapt` phases.
        """
        raise NotImplementedError

    def server(self, down: Downlink) -> tuple[Modules, Client, Tree]:
        """Return the server's predictor, in the form of `personal`."""
        raise NotImplementedError

    def modules(self) -> Sequence[Modules]:
        """Return the modules that this process uses, by architecture; empty if other processes run the local updates."""
        return ()

    def close(self) -> None:  # noqa: B027 (most engines hold nothing to release)
        """Release workers and files."""


__all__ = ["Engine", "Problem", "Reply", "Score", "ScoreRequest", "client_data"]
