"""FedTGP: the server trains prototypes, so that classes keep an adaptive margin from each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fedloom import losses, optim
from fedloom.method import Architecture, Combines, Downlink, Paper, Round, Task
from fedloom.methods.fedproto import FedProto
from fedloom.nets import select
from fedloom.ranges import Count, NonNegative, Positive
from fedloom.tree import Tree, Weights


class PrototypeNet(nn.Module):
    """One trainable prototype per class: an embedding (Y, p), and two linear layers."""

    def __init__(self, n_classes: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(n_classes, width))
        self.layers = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, chosen: Tensor) -> Tensor:
        """Return the prototypes (C, p) of the classes `chosen` (C,)."""
        prototypes: Tensor = self.layers(self.embedding[chosen])
        return prototypes


@dataclass(frozen=True, kw_only=True)
class FedTGP(FedProto):
    """FedTGP (Zhang, Liu, Hua, Cao; AAAI 2024): trainable global prototypes with adaptive-margin-enhanced contrastive learning.

    Sent: Prototypes and counts are sent in both directions. Kept: Each client keeps all its weights.

    Clients do the same as in FedProto. The server has a net that generates one prototype per class. Each round, the server trains the net
    to classify the clients' prototypes by their distance d to the global ones, with the cross-entropy of the logits -(d + delta [own
    class]). The margin delta is the largest gap between the classes of this round, but at most `margin`. The gap of a class is the
    distance between its mean prototype and the nearest other mean prototype.

    Difference from the released code: clients do not use the prototype of a class that no client has sent yet.
    """

    prototype_weight: NonNegative = 10.0
    """Weight lambda of the mean squared distance between an example's features and its class's global prototype."""
    prototype_mean: Literal["weighted", "uniform"] = "uniform"
    """Weight of a client in a class's mean prototype, from which the margin is computed."""
    server_epochs: Count = 100
    """Number of passes over the uploaded prototypes in a round."""
    server_lr: Positive = 0.01
    """Learning rate of the server's net (SGD)."""
    server_batch: Count = 10
    """Number of prototypes per step on the server."""
    margin: Positive = 100.0
    """The largest margin (the paper's tau)."""

    combines: ClassVar[Combines] = "individual"
    paper: ClassVar[Paper] = Paper(
        "FedTGP: Trainable global prototypes with adaptive-margin-enhanced contrastive learning for data and model heterogeneity "
        "in federated learning",
        "Zhang, Liu, Hua, Cao",
        "AAAI 2024",
        "https://arxiv.org/abs/2401.03230",
    )

    def server_nets(self, arch: Architecture, task: Task) -> dict[str, nn.Module]:
        """Return the net that generates the prototypes."""
        return {"maker": PrototypeNet(task.n_classes, task.width)}

    def init_server(self, weights: Weights, task: Task, round: Round) -> Tree:
        """Return FedProto's state and the net's parameters."""
        return super().init_server(weights, task, round) | {"maker": select(weights, ("maker",))["params"]}

    def downlink(self, server: Tree, cohort: Sequence[int], round: Round) -> Downlink:
        """Return all prototypes and counts, without the net."""
        return Downlink({name: server[name] for name in ("prototypes", "counts")})

    def aggregate(self, server: Tree, uplinks: Sequence[Tree], round: Round) -> Tree:
        """Train the net on the uploaded prototypes, and return the prototypes that it generates."""
        after = super().aggregate(server, uplinks, round)
        held = torch.stack([uplink["counts"] > 0 for uplink in uplinks])
        rows = torch.cat([uplink["prototypes"] for uplink in uplinks])
        labels = torch.cat([mine.nonzero()[:, 0] for mine in held])
        margin = self.gap(after["prototypes"][held.any(0)]).clamp(max=self.margin)
        nets = round.nets({"params": server["maker"], "buffers": {}})
        classes = torch.arange(held.shape[1])

        def loss(maker: dict[str, Tensor], z: Tensor, y: Tensor) -> Tensor:
            return self.contrast(nets.with_params(maker).maker(classes), z, y, margin)

        batches = optim.minibatches((rows, labels), self.server_batch, self.server_epochs, round.rng)
        maker, _ = optim.fit(loss, server["maker"], optim.sgd(self.server_lr), batches)
        with torch.no_grad():
            prototypes = nets.with_params(maker).maker(classes)
        return after | {"prototypes": prototypes, "maker": maker}

    def gap(self, means: Tensor) -> Tensor:
        """Return the largest distance between a class mean (C, p) and the nearest other mean, or `margin` if there is only one class."""
        if len(means) < 2:
            return means.new_tensor(self.margin)
        return torch.cdist(means, means).fill_diagonal_(float("inf")).min(1).values.max()

    def contrast(self, prototypes: Tensor, z: Tensor, labels: Tensor, margin: Tensor) -> Tensor:
        """Return the cross-entropy of minus the distances between z (B, p) and the prototypes (Y, p).

        `margin` is added to an example's distance to the prototype of its own class.
        """
        distance = (z[:, None] - prototypes).square().sum(2).clamp(min=1e-12).sqrt()
        return losses.cross_entropy(-(distance + margin * losses.one_hot(labels, len(prototypes))), labels)
