"""FedSpeed: FedDyn's corrections, with the gradients of sharpness-aware minimisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedloom.method import Batch, Downlink, Paper, Round, Task
from fedloom.methods.feddyn import FedDyn
from fedloom.methods.fedsam import moved_by, steepest
from fedloom.nets import Nets
from fedloom.ranges import NonNegative, Positive
from fedloom.tree import Tree


@dataclass(frozen=True)
class FedSpeed(FedDyn):
    """FedSpeed (Sun et al., ICLR 2023): a proximal term, its correction, and gradients after an ascent step.

    Sent: The whole model is sent in both directions. Kept: Each client keeps FedDyn's g_k.

    FedSpeed shares FedDyn's equations: its proximal term is FedDyn's quadratic term, and its prox-correction is FedDyn's linear term and h.
    The gradient of f_k is computed at w + e, with FedSAM's e = rho g / ||g||; both corrections are computed at w. With rho = 0, the
    method is FedDyn, except that the model in use is x, as in the released code.

    As in the released code (FL-Simulator), the gradient of f_k is that at w + e; in the paper, it is mixed with the gradient at w. The
    clipping of gradients in the released code is not implemented. The other differences are those of FedDyn.
    """

    alpha: Positive = 0.1
    """Weight of the proximal term (1 / lambda in the paper)."""
    rho: NonNegative = 0.1
    """The length of the ascent step."""

    paper: ClassVar[Paper] = Paper(
        "FedSpeed: Larger local interval, less communication round, and higher generalization accuracy",
        "Sun, Shen, Huang, Ding, Tao",
        "ICLR 2023",
        "https://arxiv.org/abs/2302.10429",
    )

    def error(self, nets: Nets, batch: Batch) -> Tensor:
        """Return f_k at w + e. No gradient flows through e."""
        return super().error(moved_by(nets, steepest(nets, batch, self.rho)), batch)

    def deploy(self, server: Tree, task: Task, round: Round) -> Downlink:
        """Return x."""
        return Downlink({"weights": server["weights"]})
