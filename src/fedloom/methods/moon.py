"""MOON: local features stay near those of the global model, and away from those of the client's previous model."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedloom import losses
from fedloom.method import Architecture, Batch, Client, ClientData, Logs, Method, Need, Paper, Task, Turn
from fedloom.models.layers import InputChain, Split
from fedloom.nets import Nets, select
from fedloom.ranges import NonNegative, Positive, Whole
from fedloom.tree import Tree, Weights


@dataclass(frozen=True, kw_only=True)
class Moon(Method):
    """MOON (Li, He, Song; CVPR 2021, eq. 3 and 4): model-contrastive federated learning.

    Sent: The whole model is sent in both directions. Kept: Each client keeps its model after its last local update.

    Let z be the features of an example under the model in training, z_g those under the received model, and z_p those under the previous
    model. The loss adds to the cross-entropy mu * mean -log(e^{cos(z, z_g) / T} / (e^{cos(z, z_g) / T} + e^{cos(z, z_p) / T})). Both
    reference models are in evaluation mode, and no gradient flows through them. With mu = 0, or before a client has trained, the method is
    FedAvg.

    The features are those of the body. The released code adds a projection (two linear layers, 256 outputs) in front of the classifier;
    set `projection=256` to add it. In a comparison, FedAvg should then have the same model. With `buffers=private`, the received model is
    evaluated with the client's own running statistics.
    """

    mu: NonNegative = 1.0
    """Weight of the contrastive term (in the paper, 5 on CIFAR-10, and 1 on CIFAR-100 and Tiny-ImageNet)."""
    temperature: Positive = 0.5
    """Temperature T of the cosines."""
    projection: Whole = 0
    """Number of outputs of a projection between body and classifier, on which features are compared. With 0, there is no projection."""

    accepts_late: ClassVar[bool] = True
    needs: ClassVar[tuple[Need, ...]] = ("vector", "head")
    paper: ClassVar[Paper] = Paper(
        "Model-contrastive federated learning", "Li, He, Song", "CVPR 2021", "https://arxiv.org/abs/2103.16257"
    )

    def nets(self, arch: Architecture, task: Task) -> dict[str, nn.Module]:
        """Return the model. Its body ends with the projection, if there is one."""
        if not self.projection:
            return super().nets(arch, task)
        d = arch.features
        projection = nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, self.projection))
        body = InputChain(OrderedDict(backbone=arch.body(), projection=projection))
        return {"model": Split(body, nn.Linear(self.projection, arch.head().out_features))}

    def init_memory(self, weights: Weights, task: Task, data: ClientData) -> Tree:
        """Return a memory without a previous model: `known` is 0 until the first local update."""
        return {"previous": select(weights, ("model",)), "known": torch.zeros(())}

    def loss(self, nets: Nets, batch: Batch, down: Tree, memory: Tree) -> tuple[Tensor, Logs]:
        """Return the cross-entropy plus mu times the contrastive term."""
        z = nets.model.body(batch.x)
        there = nets.at(down["weights"]).model.body(batch.x).detach()
        before = nets.at(memory["previous"]).model.body(batch.x).detach()
        contrast = memory["known"] * self.contrast(z, there, before)
        return nets.loss(nets.model.head(z), batch.y) + self.mu * contrast, {"contrast": contrast}

    def contrast(self, z: Tensor, there: Tensor, before: Tensor) -> Tensor:
        """Return the mean contrastive term of features (B, D). An example whose features are all 0 contributes ln 2, without a gradient."""
        z, there, before = losses.wide(z), losses.wide(there), losses.wide(before)
        cosines = torch.stack([F.cosine_similarity(z, there), F.cosine_similarity(z, before)], 1)
        cosines = torch.where(z.square().sum(1, keepdim=True) > 0, cosines, 0)
        return -(cosines / self.temperature).log_softmax(1)[:, 0].mean()

    def uplink(self, client: Client, received: Weights, down: Tree, turn: Turn) -> tuple[Tree, Tree]:
        """Return the model, and store it as the previous model."""
        memory = {"previous": select(client.weights, ("model",)), "known": torch.ones_like(client.memory["known"])}
        return {"weights": self.travelling(client.weights)}, memory
