"""Code that the contract tests share: results of runs and their comparison, and methods that each use one kind of phase."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor

from fedloom import (
    Batch,
    Client,
    ClientData,
    Downlink,
    FedAvg,
    FedMR,
    Interleave,
    Nets,
    Set,
    Stream,
    Sweep,
    Task,
    Train,
    Turn,
    tree,
)
from fedloom.experiment.loop import Experiment
from fedloom.losses import cross_entropy
from fedloom.method import Phase, Predictor
from fedloom.tree import Tree, Weights


class Left(NamedTuple):
    """The results of a run, without times."""

    server: Tree
    clients: list[Tree]
    rows: list[dict[str, Any]]
    turns: list[dict[str, Any]]
    summary: dict[str, Any]


def left_by(experiment: Experiment) -> Left:
    """Run an experiment to its end and return its results."""
    summary = experiment.run()
    clients = [tree.clone(experiment.engine.client(i)._asdict()) for i in range(experiment.problem.task.n_clients)]
    rows, turns = ([untimed(row) for row in rows] for rows in (experiment.rows, experiment.client_rows))
    return Left(tree.clone(experiment.server), clients, rows, turns, untimed(summary))


def untimed(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row without the values that differ between runs."""
    return {key: value for key, value in row.items() if "seconds" not in key}


def assert_same(one: Left, other: Left) -> None:
    """Assert that two results are equal bit for bit."""
    assert one.rows == other.rows
    assert one.turns == other.turns
    assert one.summary == other.summary
    assert tree.equal(one.server, other.server)
    for i, (a, b) in enumerate(zip(one.clients, other.clients, strict=True)):
        assert tree.equal(a, b), f"client {i}"


def assert_close(one: Left, other: Left) -> None:
    """Assert that two results are equal up to the rounding of batched matrix products."""
    for a, b in [*zip(one.rows, other.rows, strict=True), *zip(one.turns, other.turns, strict=True)]:
        assert a.keys() == b.keys()
        for key, value in a.items():
            whole = value is None or (isinstance(value, list) and None in value)  # approx does not support None
            assert value == (b[key] if whole else pytest.approx(b[key], rel=1e-8, abs=1e-10)), key
    trees = [(one.server, other.server), *zip(one.clients, other.clients, strict=True)]
    for x, y in trees:
        assert tree.structure(x) == tree.structure(y)
        tree.map_tree(lambda p, q: torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10) or p, x, y)
    for way in ("uplink_bytes", "downlink_bytes", "bytes_by_kind", "partition"):
        assert one.summary[way] == other.summary[way]


@dataclass(frozen=True)
class ClassMeans(FedAvg):
    """FedAvg with a sweep for the counts and mean inputs of the classes. The server keeps the mean over all examples."""

    def init_memory(self, weights: Weights, task: Task, data: ClientData) -> Tree:
        return {"sweep": self.blank(task)}

    def blank(self, task: Task) -> Tree:
        return {
            "count": torch.zeros(task.n_classes),
            "sum": torch.zeros(task.n_classes, int(torch.tensor(task.input_shape).prod())),
        }

    def init_server(self, weights: Weights, task: Task, round: Any) -> Tree:
        return super().init_server(weights, task, round) | {"statistics": self.blank(task)}

    def phases(self) -> tuple[Phase, ...]:
        return (*super().phases(), Sweep("sweep", self.count))

    def count(self, nets: Nets, batch: Batch, total: Tree, down: Tree, memory: Tree) -> Tree:
        n_classes = total["count"].shape[0]
        right = (batch.y[:, None] == torch.arange(n_classes, device=batch.y.device)).to(batch.x.dtype)
        return {"count": total["count"] + right.sum(0), "sum": total["sum"] + right.T @ batch.x.flatten(1)}

    def uplink(self, client: Client, received: Weights, down: Tree, turn: Turn) -> tuple[Tree, Tree]:
        message, memory = super().uplink(client, received, down, turn)
        return message | {"statistics": client.memory["sweep"]}, memory

    def aggregate(self, server: Tree, uplinks: Sequence[Tree], round: Any) -> Tree:
        statistics = uplinks[0]["statistics"]
        for uplink in uplinks[1:]:
            statistics = tree.add(statistics, uplink["statistics"])
        return super().aggregate(server, uplinks, round) | {"statistics": statistics}


@dataclass(frozen=True)
class Counting(FedAvg):
    """FedAvg with a `Set` phase with a known result: every parameter becomes the client's number of examples."""

    def init_memory(self, weights: Weights, task: Task, data: ClientData) -> Tree:
        return {"n": data.class_counts.sum()}

    def phases(self) -> tuple[Phase, ...]:
        return (Set("count", self.count),)

    def count(self, weights: Weights, down: Tree, memory: Tree) -> Weights:
        return {**weights, "params": {name: p * 0 + memory["n"] for name, p in weights["params"].items()}}


@dataclass(frozen=True)
class Closing(FedAvg):
    """FedAvg after whose last round all clients send their mean inputs, and each predicts with the model plus its own shift."""

    def init_memory(self, weights: Weights, task: Task, data: ClientData) -> Tree:
        return {"mean": {"sum": torch.zeros(()), "n": torch.zeros(())}}

    def init_server(self, weights: Weights, task: Task, round: Any) -> Tree:
        return super().init_server(weights, task, round) | {"means": torch.zeros(task.n_clients)}

    def phases(self) -> tuple[Phase, ...]:
        return (*super().phases(), Sweep("mean", self.visit, when=self.is_closing))

    def is_closing(self, turn: Turn) -> bool:
        return turn.closing

    def visit(self, nets: Nets, batch: Batch, total: Tree, down: Tree, memory: Tree) -> Tree:
        return {"sum": total["sum"] + nets.model.body(batch.x).sum(), "n": total["n"] + len(batch.y)}

    def uplink(self, client: Client, received: Weights, down: Tree, turn: Turn) -> tuple[Tree, Tree]:
        if not turn.closing:
            return super().uplink(client, received, down, turn)
        return {"mean": client.memory["mean"]["sum"] / client.memory["mean"]["n"].clamp(min=1)}, client.memory

    def aggregate(self, server: Tree, uplinks: Sequence[Tree], round: Any) -> Tree:
        return {**server, **super().aggregate(server, uplinks, round)}

    def finish(self, server: Tree, uplinks: Sequence[Tree], round: Any) -> Tree:
        means = server["means"].clone()
        for arrival, uplink in zip(round.arrivals, uplinks, strict=True):
            means[arrival.client] = uplink["mean"]
        return {**server, "means": means}

    def deploy(self, server: Tree, task: Task, round: Any) -> Downlink:
        params = server["weights"]["params"]
        each = [{"weights": {"params": {n: p + m for n, p in params.items()}}} for m in server["means"]]
        return Downlink({"weights": server["weights"]}, each)


@dataclass(frozen=True)
class Meta(FedAvg):
    """FedAvg with two alternating members, one of which keeps its state, a phase with a number of steps, and a phase
    for the last round.
    """

    def phases(self) -> tuple[Phase, ...]:
        noisy = Train("noisy", self.noisy_loss, ("model",), self.local_optimizer(), draw=self.draw)
        kept = Train("kept", self.loss, ("model:head",), self.local_optimizer(), keep_state=True)
        last = Train("last", self.loss, ("model",), self.local_optimizer(), steps=2, when=self.is_last)
        return (Interleave("both", (noisy, kept), epochs=1), last)

    def is_last(self, turn: Turn) -> bool:
        return turn.number == turn.last

    def draw(self, batch: Batch, task: Task, rng: Stream) -> dict[str, Tensor]:
        return {"noise": rng.normal(batch.x.shape)}

    def noisy_loss(self, nets: Nets, batch: Batch, down: Tree, memory: Tree) -> Tensor:
        return cross_entropy(nets.model(batch.x + 0.1 * batch.draws["noise"]), batch.y)


@dataclass(frozen=True)
class Sharing(FedAvg):
    """FedAvg in which a probe learns from the features of the model, and the model is trained against the probe."""

    shares: bool = True
    """Whether features are computed once for both (the same numbers, in less time)."""
    shared: ClassVar[tuple[str, ...]] = ("body", "head")

    def nets(self, arch: Any, task: Task) -> dict[str, Any]:
        return {"body": arch.body(), "head": arch.head(), "probe": arch.head()}

    def phases(self) -> tuple[Phase, ...]:
        probe = Train("probe", self.probe_loss, ("probe",), self.local_optimizer(), train_mode=("body", "probe"))
        fit = Train("fit", self.loss, ("body", "head"), self.local_optimizer(), keep_state=True)
        return (Interleave("both", (probe, fit), self.local_epochs, precompute=self.look if self.shares else None),)

    def look(self, nets: Nets, batch: Batch, down: Tree, memory: Tree) -> Tree:
        return {"features": nets.body(batch.x), "labels": batch.y}

    def probe_loss(self, nets: Nets, batch: Batch, down: Tree, memory: Tree) -> Tensor:
        seen = batch.precomputed or self.look(nets, batch, down, memory)
        return cross_entropy(nets.probe(seen["features"].detach()), seen["labels"])

    def loss(self, nets: Nets, batch: Batch, down: Tree, memory: Tree) -> Tensor:
        seen = batch.precomputed or self.look(nets, batch, down, memory)
        probed = cross_entropy(nets.frozen.probe(seen["features"]), seen["labels"])
        size = sum(p.square().sum() for name, p in nets.params.items() if name.startswith("body."))
        return cross_entropy(nets.head(seen["features"]), seen["labels"]) - 0.1 * probed + 0.01 * size

    def predictors(self) -> dict[str, Predictor]:
        return {"personal": self.predict}

    def predict(self, nets: Nets, x: Tensor, down: Tree, memory: Tree) -> Tensor:
        logits: Tensor = nets.head(nets.body(x))
        return logits


@dataclass(frozen=True)
class Remembering(FedAvg):
    """FedAvg in which each client stores its last two models. Storing a model moves the previous one."""

    def init_memory(self, weights: Weights, task: Task, data: ClientData) -> Tree:
        return {"newer": dict(weights["params"]), "older": dict(weights["params"])}

    def uplink(self, client: Client, received: Weights, down: Tree, turn: Turn) -> tuple[Tree, Tree]:
        message, memory = super().uplink(client, received, down, turn)
        return message, {"newer": client.weights["params"], "older": memory["newer"]}


@dataclass(frozen=True)
class Perfed(FedAvg):
    """FedPer: the body is sent; the head, its momentum and the running statistics are kept."""

    buffers: Any = "private"
    momentum: float = 0.9
    shared: ClassVar[tuple[str, ...]] = ("model:body",)

    def phases(self) -> tuple[Phase, ...]:
        optimizer = self.local_optimizer()
        return (Train("train", self.loss, ("model",), optimizer, epochs=self.local_epochs, keep_state=True),)

    def predictors(self) -> dict[str, Predictor]:
        return {"personal": super().predictors()["personal"]}


@dataclass(frozen=True)
class Differing(FedAvg):
    """FedAvg in which every member of the cohort receives a different model: the server's, with a head scaled by the member's position."""

    def downlink(self, server: Tree, cohort: Sequence[int], round: Any) -> Downlink:
        heads = [
            {n: p * (1 + 0.1 * slot) for n, p in server["weights"]["params"].items() if ".head." in n}
            for slot in range(len(cohort))
        ]
        return Downlink({"weights": server["weights"]}, [{"weights": {"params": head}} for head in heads])

    def deploy(self, server: Tree, task: Task, round: Any) -> Downlink:
        return Downlink({"weights": server["weights"]})


@dataclass(frozen=True)
class Late(FedAvg):
    """FedAvg whose downlink gains a branch after the first round, and whose loss gains a term that changes its form
    above a certain value.
    """

    def init_server(self, weights: Weights, task: Task, round: Any) -> Tree:
        return super().init_server(weights, task, round) | {"rounds": torch.zeros(())}

    def downlink(self, server: Tree, cohort: Sequence[int], round: Any) -> Downlink:
        late = {"pull": {"to": server["rounds"]}} if server["rounds"] > 0 else {}
        return Downlink({"weights": server["weights"], **late})

    def loss(self, nets: Nets, batch: Batch, down: Tree, memory: Tree) -> Tensor:
        error = cross_entropy(nets.model(batch.x), batch.y)
        if "pull" not in down:
            return error
        distance = sum((p - down["pull"]["to"]).square().sum() for p in nets.params.values())
        return error + (0.01 * distance if down["pull"]["to"] < 2 else 0.02 * distance)

    def aggregate(self, server: Tree, uplinks: Sequence[Tree], round: Any) -> Tree:
        return super().aggregate(server, uplinks, round) | {"rounds": server["rounds"] + 1}


@dataclass(frozen=True)
class Namesake(FedAvg):
    """FedAvg whose adaptation phase has the same name as the training phase, but another loss."""

    def adapt(self) -> tuple[Phase, ...]:
        return (Train("train", self.to_one, ("model:head",), self.local_optimizer()),)

    def to_one(self, nets: Nets, batch: Batch, down: Tree, memory: Tree) -> Tensor:
        return cross_entropy(-nets.model(batch.x), batch.y)


@dataclass(frozen=True)
class Secure(FedMR):
    """FedMR in which clients exchange layers before the upload, after a first stage that ends at a plateau."""

    secure: bool = True
    first_stage_rounds: int = 2
    first_stage_patience: int = 1


TOYS = {
    cls.__name__: cls
    for cls in (ClassMeans, Counting, Closing, Meta, Sharing, Remembering, Perfed, Differing, Late, Namesake, Secure)
}
