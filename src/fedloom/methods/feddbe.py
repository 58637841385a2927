"""FedDBE: each client removes its own bias from the features, whose mean is kept near a common mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedloom import tree
from fedloom.method import (
    Architecture,
    Batch,
    Client,
    Combines,
    Downlink,
    Logs,
    Method,
    Need,
    Paper,
    Phase,
    Predictor,
    Round,
    Task,
    Train,
    Turn,
    predict_model,
)
from fedloom.nets import Nets
from fedloom.ranges import NonNegative, Share
from fedloom.tree import Tree, Weights


class Domain(nn.Module):
    """A client's own shift of the features (D,), and the running mean of the features before the shift."""

    def __init__(self, width: int, momentum: float) -> None:
        super().__init__()
        self.shift, self.momentum = nn.Parameter(torch.zeros(width)), momentum
        self.register_buffer("mean", torch.zeros(width))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the shifted features (B, D), and the running mean with this batch; in training mode, store the mean."""
        before = self.get_buffer("mean")
        mean = (1 - self.momentum) * before + self.momentum * z.mean(0)
        if self.training:
            before.copy_(mean.detach())
        return z + self.shift, mean


@dataclass(frozen=True)
class FedDBE(Method):
    """FedDBE (Zhang et al., NeurIPS 2023): FedAvg with a domain bias eliminator.

    Sent: The model is sent in both directions. Clients also send a mean of their features, and the server also sends the consensus mean G.
    Kept: Each client keeps a vector b (D,), which is added to the features.

    The first round only computes G: *all* clients train without b, the running means m of their features are averaged to G, and the
    trained weights are discarded. Afterwards, the loss is CE(head(z + b), y) + kappa / 2 * mean_d (m_d - G_d)^2. The running mean m starts
    at 0 in every local update, and a gradient flows only through the current batch's contribution to m. `personal_accuracy` uses b;
    `server_accuracy` scores the model alone.

    The paper computes G before the first round; here, G takes up the first round. The defaults are the released settings for the 4-layer
    CNN.
    """

    kappa: NonNegative = 50.0
    """Weight of the distance between the features' mean and G. With weight 0 and without b, the method is FedAvg."""
    mean_momentum: Share = 1.0
    """Weight of the current batch in the running mean."""

    also_travels: ClassVar[tuple[str, ...]] = ("mean",)
    needs: ClassVar[tuple[Need, ...]] = ("vector", "head")
    combines: ClassVar[Combines] = "mean"
    paper: ClassVar[Paper] = Paper(
        "Eliminating domain bias for federated learning in representation space",
        "Zhang, Hua, Cao, Wang, Song, Xue, Ma, Guan",
        "NeurIPS 2023",
        "https://arxiv.org/abs/2311.14975",
    )

    def nets(self, arch: Architecture, task: Task) -> dict[str, nn.Module]:
        """Return the model, and the client's shift and running mean."""
        return {"model": arch.model(), "domain": Domain(arch.features, self.mean_momentum)}

    def init_server(self, weights: Weights, task: Task, round: Round) -> Tree:
        """Return the model, and a G of zeros."""
        return super().init_server(weights, task, round) | {"mean": torch.zeros_like(weights["params"]["domain.shift"])}

    def cohort(self, server: Tree, task: Task, size: int, round: Round) -> Sequence[int]:
        """Return all clients in the first round, and a cohort of the usual size afterwards."""
        return range(task.n_clients) if round.number == 0 else super().cohort(server, task, size, round)

    def downlink(self, server: Tree, cohort: Sequence[int], round: Round) -> Downlink:
        """Return the model and G."""
        return Downlink(dict(server))

    def receive(self, weights: Weights, down: Tree, memory: Tree) -> Weights:
        """Return the received model, with a running mean of 0."""
        received = super().receive(weights, down, memory)
        mean = torch.zeros_like(weights["buffers"]["domain.mean"])
        return tree.merge(received, {"buffers": {"domain.mean": mean}})

    def phases(self) -> tuple[Phase, ...]:
        """Return a phase without the shift for the first round, and a phase with the shift for all other rounds."""
        optimizer, modes = self.local_optimizer(), ("model", "domain")
        first = Train(
            "first",
            self.plain_loss,
            ("model",),
            optimizer,
            epochs=self.local_epochs,
            train_mode=modes,
            when=self.is_first,
        )
        later = Train("train", self.loss, modes, optimizer, epochs=self.local_epochs, when=self.is_later)
        return first, later

    def is_first(self, turn: Turn) -> bool:
        """Return whether this is the first round, which only computes G."""
        return turn.number == 0

    def is_later(self, turn: Turn) -> bool:
        """Return whether G is known."""
        return turn.number > 0

    def plain_loss(self, nets: Nets, batch: Batch, down: Tree, memory: Tree) -> Tensor:
        """Return the loss of the model, and update the running mean."""
        z = nets.model.body(batch.x)
        nets.domain(z)
        return nets.loss(nets.model.head(z), batch.y)

    def loss(self, nets: Nets, batch: Batch, down: Tree, memory: Tree) -> tuple[Tensor, Logs]:
        """Return the loss for the shifted features plus the distance between their mean and G."""
        shifted, mean = nets.domain(nets.model.body(batch.x))
        error, away = nets.loss(nets.model.head(shifted), batch.y), (mean - down["mean"]).square().mean() / 2
        return error + self.kappa * away, {"cross_entropy": error, "mean_distance": away}

    def uplink(self, client: Client, received: Weights, down: Tree, turn: Turn) -> tuple[Tree, Tree]:
        """Return the model and the running mean."""
        return {
            "weights": self.travelling(client.weights),
            "mean": client.weights["buffers"]["domain.mean"],
        }, client.memory

    def aggregate(self, server: Tree, uplinks: Sequence[Tree], round: Round) -> Tree:
        """Return G and the unchanged model after the first round, and the mean model with the unchanged G afterwards."""
        after = tree.mean(uplinks, round.shares)
        return {**server, "mean": after["mean"]} if round.number == 0 else {**server, "weights": after["weights"]}

    def predictors(self) -> dict[str, Predictor]:
        """Return the model with the client's shift as the client's predictor, and the model alone as the server's predictor."""
        return {"personal": self.predict, "server": predict_model}

    def predict(self, nets: Nets, x: Any, down: Tree, memory: Tree) -> Tensor:
        """Return the logits (B, Y) of the shifted features."""
        shifted, _ = nets.domain(nets.model.body(x))
        logits: Tensor = nets.model.head(shifted)
        return logits
