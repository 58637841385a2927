"""FedProx: a proximal term keeps local models near the received model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedloom import losses
from fedloom.method import Batch, Method, Paper
from fedloom.nets import Nets
from fedloom.ranges import NonNegative
from fedloom.tree import Tree


@dataclass(frozen=True)
class FedProx(Method):
    """FedProx (Li et al., MLSys 2020, eq. 2 and algorithm 2), with a number of epochs instead of the inexactness gamma.

    Sent: The whole model is sent in both directions. Kept: Clients keep nothing between rounds. With mu = 0, the method is FedAvg.
    """

    mu: NonNegative = 0.01
    """Weight of the proximal term (mu / 2) ||w - w_received||^2."""

    accepts_late: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        "Federated optimization in heterogeneous networks",
        "Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith",
        "MLSys 2020",
        "https://arxiv.org/abs/1812.06127",
    )

    def loss(self, nets: Nets, batch: Batch, down: Tree, memory: Tree) -> Tensor:
        """Return the cross-entropy plus the proximal term (eq. 2), which covers parameters but not running statistics."""
        error = nets.loss(nets.model(batch.x), batch.y)
        return error + self.mu / 2 * losses.squared_distance(nets.params, down["weights"]["params"])
