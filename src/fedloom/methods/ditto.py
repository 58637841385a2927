"""Ditto: beside the common model everybody trains one of its own, held near the common one."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from fedloom import losses
from fedloom.method import Architecture, Batch, Method, Paper, Phase, Predictor, Task, Train, predict_model
from fedloom.nets import Nets
from fedloom.ranges import Count, NonNegative
from fedloom.tree import Tree


@dataclass(frozen=True)
class Ditto(Method):
    """Ditto (Li et al., ICML 2021): w solves FedAvg's problem, each v_k its client's own, with a pull towards w.

    Travels: the common model `model` (w), both ways. Stays: the personal model `personal` (v_k), of the same architecture and with the
    same initial weights. `personal_accuracy` and `general_accuracy` are those of v_k, `server_accuracy` that of w.
    With mu = 0 the v_k are trained as in `local`, with mu growing they follow w.
    """

    mu: NonNegative = 0.1
    """Weight of the pull (mu / 2) ||v - w_received||^2 (the paper's lambda)."""
    personal_epochs: Count = 1
    """Passes over the client's training rows that update the personal model, after those that update the common one."""

    accepts_late: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        "Ditto: Fair and robust federated learning through personalization",
        "Li, Hu, Beirami, Smith",
        "ICML 2021",
        "https://arxiv.org/abs/2012.04221",
    )

    def nets(self, arch: Architecture, task: Task) -> dict[str, nn.Module]:
        """w and v_k, alike at first."""
        model = arch.model()
        return {"model": model, "personal": deepcopy(model)}

    def phases(self) -> tuple[Phase, ...]:
        """FedAvg's training of w, then that of v_k; v_k is pulled to the w that came, so their order does not matter."""
        personal = Train("personal", self.personal_loss, ("personal",), self.local_optimizer(), self.personal_epochs)
        return (*super().phases(), personal)

    def personal_loss(self, nets: Nets, batch: Batch, down: Tree, memory: Tree) -> Tensor:
        """Cross-entropy of v_k plus the pull; only parameters are held, not running statistics."""
        received = {f"personal{name.removeprefix('model')}": p for name, p in down["weights"]["params"].items()}
        error = losses.cross_entropy(nets.personal(batch.x), batch.y)
        return error + self.mu / 2 * losses.squared_distance(nets.params, received)

    def predictors(self) -> dict[str, Predictor]:
        """v_k for its client, w for the server."""
        return {"personal": self.predict_personal, "server": predict_model}

    def predict_personal(self, nets: Nets, x: Tensor, down: Tree, memory: Tree) -> Tensor:
        """Logits (B, Y) of v_k."""
        logits: Tensor = nets.personal(x)
        return logits
