"""FedCP: a conditional policy divides each example's features between a common and a personal head."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedloom import losses, tree
from fedloom.method import (
    Architecture,
    Batch,
    Client,
    ClientData,
    Logs,
    Method,
    Need,
    Paper,
    Phase,
    Predictor,
    Task,
    Train,
    Turn,
)
from fedloom.nets import Nets
from fedloom.ranges import NonNegative
from fedloom.tree import Tree, Weights

WIDTHS = (10.0, 15.0, 20.0, 50.0)  # of the kernels: squared distances are divided by twice these numbers


class Policy(nn.Module):
    """A net that splits features: for each of an example's D features, it returns two numbers r and s with r + s = 1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, 2 * width), nn.LayerNorm(2 * width), nn.ReLU())

    def forward(self, z: Tensor) -> Tensor:
        """Return r and s, stacked to (2, B, D)."""
        scores: Tensor = self.layers(z).unflatten(1, (2, -1)).softmax(1)
        return scores.movedim(1, 0)


@dataclass(frozen=True)
class FedCP(Method):
    """FedCP (Zhang et al., KDD 2023): separating feature information with conditional policies.

    The nets are `model` (body and personal head h), `common` (the common head g, which is fixed in a local update) and `policy`.

    Sent: The server sends the body, g and the policy. Clients send the body, the policy and (h + g) / 2, whose mean is the next g. Kept:
    Each client keeps h, and a context: the normalised sum of the rows of h at the start of the local update.

    The policy splits the features z of an example: (r, s) = policy(z * context). The logits are h(r z) + g(s z). The loss adds the squared
    maximum mean discrepancy (MMD) between z and the features of the received body.

    Differences from the released code: the policy is a plain softmax, as in the paper's equation, without Gumbel noise, so predictions are
    not random. The received body is in evaluation mode.
    """

    mmd_weight: NonNegative = 5.0
    """Weight lambda of the MMD (the released setting for the 4-layer CNN)."""

    shared: ClassVar[tuple[str, ...]] = ("model:body", "common", "policy")
    needs: ClassVar[tuple[Need, ...]] = ("vector", "head")
    paper: ClassVar[Paper] = Paper(
        "FedCP: Separating feature information for personalized federated learning via conditional policy",
        "Zhang, Hua, Wang, Song, Xue, Ma, Guan",
        "KDD 2023",
        "https://arxiv.org/abs/2307.01217",
    )

    def nets(self, arch: Architecture, task: Task) -> dict[str, nn.Module]:
        """Return the model, a common head that equals the personal head, and the policy."""
        model = arch.model()
        return {"model": model, "common": deepcopy(model.get_submodule("head")), "policy": Policy(arch.features)}

    def init_memory(self, weights: Weights, task: Task, data: ClientData) -> Tree:
        """Return the context (D,) of the initial head."""
        return {"context": context(weights)}

    def phases(self) -> tuple[Phase, ...]:
        """Return one phase for the model and the policy; the common head is fixed."""
        return (Train("train", self.loss, ("model", "policy"), self.local_optimizer(), epochs=self.local_epochs),)

    def loss(self, nets: Nets, batch: Batch, down: Tree, memory: Tree) -> tuple[Tensor, Logs]:
        """Return the cross-entropy of the split features plus the MMD."""
        z = nets.model.body(batch.x)
        apart = discrepancy(losses.wide(z), losses.wide(nets.at(down["weights"]).model.body(batch.x).detach()))
        error = nets.loss(self.outputs(nets, z, memory), batch.y)
        return error + self.mmd_weight * apart, {"cross_entropy": error, "discrepancy": apart}

    def outputs(self, nets: Nets, z: Tensor, memory: Tree) -> Tensor:
        """Return h(r z) + g(s z) for features z (B, D)."""
        r, s = nets.policy(z * memory["context"])
        logits: Tensor = nets.model.head(r * z) + nets.common(s * z)
        return logits

    def uplink(self, client: Client, received: Weights, down: Tree, turn: Turn) -> tuple[Tree, Tree]:
        """Return the body, the policy and the mean of both heads; store the context of the trained head in the memory."""
        sent, params = self.travelling(client.weights), client.weights["params"]
        heads = {
            n: (p + params["model.head" + n.removeprefix("common")]) / 2
            for n, p in params.items()
            if n.startswith("common.")
        }
        return {"weights": tree.merge(sent, {"params": heads})}, {"context": context(client.weights)}

    def predictors(self) -> dict[str, Predictor]:
        """Return the client's predictor. There is no server model, because the common head alone cannot predict."""
        return {"personal": self.predict}

    def predict(self, nets: Nets, x: Any, down: Tree, memory: Tree) -> Tensor:
        """Return logits (B, Y)."""
        return self.outputs(nets, nets.model.body(x), memory)


def context(weights: Weights) -> Tensor:
    """Return the normalised sum (D,) of the rows of the personal head."""
    return F.normalize(weights["params"]["model.head.weight"].sum(0), dim=0)


def discrepancy(a: Tensor, b: Tensor) -> Tensor:
    """Return the squared MMD of a and b (B, D) with a sum of Gaussian kernels: mean_ij k(a_i, a_j) + k(b_i, b_j) - 2 k(a_i, b_j)."""

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        squared = (x[:, None] - y).square().sum(2)
        return torch.stack([(-squared / (2 * width)).exp() for width in WIDTHS]).sum(0)

    return (kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)).mean()
