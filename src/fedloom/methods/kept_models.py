"""The common part of methods whose server keeps the latest model of every client (FedAMP, FedFomo)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedloom import tree
from fedloom.method import Client, Combines, Method, Predictor, Round, Task, Turn, predict_model
from fedloom.nets import select
from fedloom.tree import Tree, Weights


@dataclass(frozen=True, kw_only=True)
class KeptModels(Method):
    """A method whose clients train separate models. The server keeps the latest model of every client.

    Sent: The uplink contains the client's model. The server keeps `model`, the stacked models (K, ...) of all clients, and `sent` (K,),
    which is 1 for clients that have sent their model. The entries of the other clients are 0, and their models are the initial model.
    """

    shared: ClassVar[tuple[str, ...]] = ()
    also_travels: ClassVar[tuple[str, ...]] = ("model",)
    combines: ClassVar[Combines] = "individual"

    def sendable(self, weights: Weights) -> Weights:
        """Return the weights of the model that are sent."""
        return select(weights, ("model",), buffers=self.buffers == "shared")

    def init_server(self, weights: Weights, task: Task, round: Round) -> Tree:
        """Return the initial model for every client."""
        models = tree.map_tree(lambda p: p.expand(task.n_clients, *p.shape).clone(), self.sendable(weights))
        return {"model": models, "sent": torch.zeros(task.n_clients)}

    def uplink(self, client: Client, received: Weights, down: Tree, turn: Turn) -> tuple[Tree, Tree]:
        """Return the client's model."""
        return {"model": self.sendable(client.weights)}, client.memory

    def aggregate(self, server: Tree, uplinks: Sequence[Tree], round: Round) -> Tree:
        """Return the server with the cohort's new models."""
        place = torch.tensor([arrival.client for arrival in round.arrivals])

        def stored(models: Tensor, *new: Tensor) -> Tensor:
            return models.index_copy(0, place, torch.stack(new))

        models = tree.map_tree(stored, server["model"], *(uplink["model"] for uplink in uplinks))
        return {**server, "model": models, "sent": server["sent"].index_fill(0, place, 1)}

    def predictors(self) -> dict[str, Predictor]:
        """Return the client's predictor; the server has no model."""
        return {"personal": predict_model}


def combination(models: Tree, shares: Tensor) -> Tree:
    """Return the sum of stacked models (K, ...), weighted by `shares` (K,). Integer leaves (counters) are rounded."""

    def combined(stacked: Tensor) -> Tensor:
        exact = stacked if stacked.is_floating_point() else stacked.double()
        total: Tensor = torch.tensordot(shares.to(exact.dtype), exact, 1)
        return total if stacked.is_floating_point() else total.round().to(stacked.dtype)

    return tree.map_tree(combined, models)
