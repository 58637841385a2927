"""FedGamma: SCAFFOLD with the gradients of sharpness-aware minimisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedloom.method import Batch, Paper
from fedloom.methods.fedsam import moved_by, steepest
from fedloom.methods.scaffold import Scaffold
from fedloom.nets import Nets
from fedloom.ranges import NonNegative
from fedloom.tree import Tree


@dataclass(frozen=True)
class FedGamma(Scaffold):
    """FedGamma (Dai et al., IEEE TNNLS 2023): sharpness-aware minimisation with control variates.

    Sent: The model and a control variate are sent in both directions. Kept: Each client keeps its control variate.

    Every local step applies grad f(w + e) - c_i + c to w, with FedSAM's e = rho g / ||g||. The control variate c_i estimates the client's
    gradient at w + e. With rho = 0, the method is SCAFFOLD.

    Differences from the released code (FL-Simulator): the control variate is divided by the client's own number of steps (in the code, by
    the first client's), gradients are not clipped, and weight decay is refused, as with SCAFFOLD.
    """

    rho: NonNegative = 0.1
    """The length of the ascent step."""

    paper: ClassVar[Paper] = Paper(
        "FedGAMMA: Federated learning with global sharpness-aware minimization",
        "Dai, Yang, Sun, Shen, Tian, Wang, Zhang",
        "IEEE TNNLS 2023",
        "https://doi.org/10.1109/TNNLS.2023.3304453",
    )

    def loss(self, nets: Nets, batch: Batch, down: Tree, memory: Tree) -> Tensor:
        """Return SCAFFOLD's loss at w + e, whose gradient is grad f(w + e) - c_i + c."""
        return super().loss(moved_by(nets, steepest(nets, batch, self.rho)), batch, down, memory)
