"""FedNTD: local models stay near the global model's predictions for the classes other than the true class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedloom import losses
from fedloom.method import Batch, Logs, Method, Need, Paper
from fedloom.nets import Nets
from fedloom.ranges import NonNegative, Positive
from fedloom.tree import Tree


@dataclass(frozen=True)
class FedNTD(Method):
    """FedNTD (Lee et al., NeurIPS 2022): not-true distillation.

    Sent: The whole model is sent in both directions. Kept: Clients keep nothing between rounds.

    Let q be the softmax of an example's logits / T over the Y - 1 classes other than its true class. The loss adds to the cross-entropy
    beta T^2 KL(q of the received model || q of the model in training), as a mean over the batch. The received model is constant and in
    evaluation mode. With beta = 0, or with two classes, the method is FedAvg.

    The released code does not set the mode of the received model. With `buffers=private`, the received model is evaluated with the
    client's own running statistics.
    """

    beta: NonNegative = 1.0
    """Weight of the distillation."""
    temperature: Positive = 1.0
    """Temperature T of the softmax."""

    accepts_late: ClassVar[bool] = True
    needs: ClassVar[tuple[Need, ...]] = ("classes",)
    paper: ClassVar[Paper] = Paper(
        "Preservation of the global knowledge by not-true distillation in federated learning",
        "Lee, Jeong, Shin, Bae, Yun",
        "NeurIPS 2022",
        "https://arxiv.org/abs/2106.03097",
    )

    def loss(self, nets: Nets, batch: Batch, down: Tree, memory: Tree) -> tuple[Tensor, Logs]:
        """Return the cross-entropy plus beta times the distillation."""
        logits = nets.model(batch.x)
        received = nets.at(down["weights"]).model(batch.x).detach()
        forgotten = self.distillation(logits, received, batch.y)
        return nets.loss(logits, batch.y) + self.beta * forgotten, {"forgotten": forgotten}

    def distillation(self, logits: Tensor, received: Tensor, labels: Tensor) -> Tensor:
        """Return the mean of T^2 KL(q of the received model || q) in nats, for logits (B, Y) of both models and labels (B,)."""
        own, teacher = (
            losses.without_true(losses.wide(values) / self.temperature, labels) for values in (logits, received)
        )
        return self.temperature**2 * losses.kl_divergence(own, teacher).mean()
