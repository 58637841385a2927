"""Ditto: in addition to the common model, every client trains a personal model that is pulled towards the common model."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from fedloom import losses
from fedloom.method import (
    Architecture,
    Batch,
    Method,
    Paper,
    Phase,
    Predictor,
    Task,
    Train,
    predict_model,
    predict_with,
)
from fedloom.nets import Nets
from fedloom.ranges import Count, NonNegative
from fedloom.tree import Tree


@dataclass(frozen=True)
class Ditto(Method):
    """Ditto (Li et al., ICML 2021): w solves FedAvg's problem; each v_k solves its client's own problem, with a proximal term towards w.

    Sent: The common model `model` (w) is sent in both directions. Kept: Each client keeps its personal model `personal` (v_k), which has
    the same architecture and initial weights as w.

    `personal_accuracy` and `general_accuracy` score v_k; `server_accuracy` scores w. With mu = 0, v_k is trained as in `local`. The larger
    mu is, the closer v_k stays to w.
    """

    mu: NonNegative = 0.1
    """Weight of the proximal term (mu / 2) ||v - w_received||^2 (the paper's lambda)."""
    personal_epochs: Count = 1
    """Number of passes over the client's training examples that update the personal model. They follow the passes for the common model."""

    accepts_late: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        "Ditto: Fair and robust federated learning through personalization",
        "Li, Hu, Beirami, Smith",
        "ICML 2021",
        "https://arxiv.org/abs/2012.04221",
    )

    def nets(self, arch: Architecture, task: Task) -> dict[str, nn.Module]:
        """Return w and v_k with equal initial weights."""
        model = arch.model()
        return {"model": model, "personal": deepcopy(model)}

    def phases(self) -> tuple[Phase, ...]:
        """Return FedAvg's training of w, then that of v_k. Their order has no effect, because v_k is pulled towards the received w."""
        personal = Train("personal", self.personal_loss, ("personal",), self.local_optimizer(), self.personal_epochs)
        return (*super().phases(), personal)

    def personal_loss(self, nets: Nets, batch: Batch, down: Tree, memory: Tree) -> Tensor:
        """Return the cross-entropy of v_k plus the proximal term, which covers parameters but not running statistics."""
        error, received = nets.loss(nets.personal(batch.x), batch.y), down["weights"]["params"]
        return error + self.mu / 2 * losses.squared_distance(nets.renamed("personal", "model"), received)

    def predictors(self) -> dict[str, Predictor]:
        """Return v_k as the client's predictor and w as the server's."""
        return {"personal": predict_with("personal"), "server": predict_model}
