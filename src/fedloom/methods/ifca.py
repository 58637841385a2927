"""IFCA: the server trains one model per cluster, and every client trains the model that fits its examples best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedloom import losses, tree
from fedloom.method import (
    Architecture,
    Batch,
    Client,
    ClientData,
    Combines,
    Downlink,
    Method,
    Paper,
    Phase,
    Predictor,
    Round,
    Set,
    Sweep,
    Task,
    Turn,
    predict_model,
)
from fedloom.nets import Nets
from fedloom.ranges import Count
from fedloom.tree import Tree, Weights


@dataclass(frozen=True)
class IFCA(Method):
    """IFCA (Ghosh et al., NeurIPS 2020, algorithm 1, with averaged models): iterative federated clustering.

    Sent: The server sends the models of all clusters. A client sends one model and the number of its cluster (one-hot). Kept: Each client
    keeps the losses of the models.

    The models start from different random weights. In each local update, a client computes the loss of every model on its training
    examples, selects the model with the smallest loss, and trains it. The server averages each model over the clients that selected it,
    weighted by numbers of examples. A model that no client selected stays unchanged. With one cluster, the method is FedAvg.

    Before a client predicts, it selects a model by its training examples, as in the released FEMNIST code (the MNIST code uses the labels
    of test examples). A client that joins later does the same. There is no model for all clients, so there is no server accuracy. Groups of
    clients may select the same model; the paper then restarts with another seed. A body that all clusters share is not implemented.
    """

    clusters: Count = 4
    """Number of models (the paper: 4 on rotated MNIST, 2 or 3 on FEMNIST)."""

    also_travels: ClassVar[tuple[str, ...]] = ("models", "cluster")
    combines: ClassVar[Combines] = "individual"
    paper: ClassVar[Paper] = Paper(
        "An efficient framework for clustered federated learning",
        "Ghosh, Chung, Yin, Ramchandran",
        "NeurIPS 2020",
        "https://arxiv.org/abs/2006.04088",
    )

    def server_nets(self, arch: Architecture, task: Task) -> dict[str, nn.Module]:
        """Return the models of all clusters except the first, which starts from a client's initial weights."""
        return {f"cluster{j}": arch.model() for j in range(1, self.clusters)}

    def init_memory(self, weights: Weights, task: Task, data: ClientData) -> Tree:
        """Return zero sums (clusters,) of the losses of all models on the training examples."""
        return {"losses": {"sum": torch.zeros(self.clusters)}}

    def init_server(self, weights: Weights, task: Task, round: Round) -> Tree:
        """Return the stacked models, in which every leaf has the shape (clusters, ...)."""
        first = self.travelling(weights)
        others = [
            {
                kind: {name: weights[kind][name.replace("model", f"cluster{j}", 1)] for name in part}
                for kind, part in first.items()
            }
            for j in range(1, self.clusters)
        ]
        return {"models": tree.stack([first, *others])}

    def downlink(self, server: Tree, cohort: Sequence[int], round: Round) -> Downlink:
        """Return all models."""
        return Downlink({"models": server["models"]})

    def receive(self, weights: Weights, down: Tree, memory: Tree) -> Weights:
        """Return the weights with the model that the client selected last."""
        return self.chosen(weights, down, memory)

    def phases(self) -> tuple[Phase, ...]:
        """Return the phases that select a model, and those that train it."""
        return *self.adapt(), *super().phases()

    def adapt(self) -> tuple[Phase, ...]:
        """Return the phases that select a model."""
        return Sweep("losses", self.compare), Set("choose", self.chosen)

    def compare(self, nets: Nets, batch: Batch, total: Tree, down: Tree, memory: Tree) -> Tree:
        """Add the losses of all models on a batch."""
        found = [
            nets.loss(losses.wide(nets.at(model).model(batch.x)), batch.y) for model in tree.unstack(down["models"])
        ]
        return {"sum": total["sum"] + len(batch.y) * torch.stack(found).to(total["sum"].dtype)}

    def chosen(self, weights: Weights, down: Tree, memory: Tree) -> Weights:
        """Return the weights with the model that has the smallest loss. If several models have it, return the first one."""
        best = int(memory["losses"]["sum"].argmin())
        return tree.merge(weights, tree.unstack(down["models"])[best])

    def uplink(self, client: Client, received: Weights, down: Tree, turn: Turn) -> tuple[Tree, Tree]:
        """Return the trained model, and the number of its cluster as a one-hot vector (clusters,)."""
        sums = client.memory["losses"]["sum"]
        cluster = losses.one_hot(sums.argmin()[None], self.clusters)[0]
        return {"weights": self.travelling(client.weights), "cluster": cluster}, client.memory

    def uplink_fault(self, uplink: Tree, class_counts: Tensor | None) -> str:
        """Return a message unless the uplink names exactly one cluster, and an empty string otherwise."""
        found = uplink["cluster"].sort().values
        right = bool((found[:-1] == 0).all()) and float(found[-1]) == 1
        return "" if right else "'cluster' does not name one cluster"

    def aggregate(self, server: Tree, uplinks: Sequence[Tree], round: Round) -> Tree:
        """Return the models, each of which is the mean over the clients that selected it."""
        models = tree.unstack(server["models"])
        for j, members in enumerate(self.members(uplinks)):
            if members:
                shares = [round.shares[i] for i in members]
                mine = [uplinks[i]["weights"] for i in members]
                models[j] = tree.mean(mine, [share / sum(shares) for share in shares])
        return {"models": tree.stack(models)}

    def members(self, uplinks: Sequence[Tree]) -> list[list[int]]:
        """Return the positions of the uplinks of each cluster."""
        taken = [int(uplink["cluster"].argmax()) for uplink in uplinks]
        return [[i for i, j in enumerate(taken) if j == cluster] for cluster in range(self.clusters)]

    def server_logs(self, server: Tree, uplinks: Sequence[Tree], round: Round) -> Mapping[str, float]:
        """Return the number of clients that selected each model."""
        return {f"cluster{j}": float(len(members)) for j, members in enumerate(self.members(uplinks))}

    def predictors(self) -> dict[str, Predictor]:
        """Return the client's predictor, which uses the model of its cluster. The server has no model for all clients."""
        return {"personal": predict_model}
