"""FedASAM: clients search for flat minima by adaptive sharpness-aware minimisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedloom.method import Batch, Paper
from fedloom.methods.fedsam import FedSAM, Params, steepest
from fedloom.nets import Nets
from fedloom.ranges import NonNegative


@dataclass(frozen=True)
class FedASAM(FedSAM):
    """FedASAM (Caldarola et al., ECCV 2022, section 4.1; ASAM: Kwon et al., ICML 2021, algorithm 1).

    Every local step first moves to the nearby weights with the highest loss (to first order), w + e with e = rho T^2 g / ||T g|| and T =
    |w| + eta. The step then computes the gradient there and applies it to w. With rho = 0, the method is FedAvg.

    Sent: The whole model is sent in both directions. Kept: Clients keep nothing between rounds.

    As in the released code, T is 1 for tensors whose own name does not contain `weight` (`in_proj_weight` and `weight_ih_l0` contain it).
    Unlike in the released code, running statistics come from the second pass only. The paper's averaging of models over rounds (SWA) is
    not included.
    """

    rho: NonNegative = 0.5
    """The length of the ascent step, in units of T."""
    eta: NonNegative = 0.2
    """Constant added to |w| in T, so that small weights also move."""

    paper: ClassVar[Paper] = Paper(
        "Improving generalization in federated learning by seeking flat minima",
        "Caldarola, Caputo, Ciccone",
        "ECCV 2022",
        "https://arxiv.org/abs/2203.11834",
    )

    def ascent(self, nets: Nets, batch: Batch) -> Params:
        """Return e for every parameter of the model."""
        return steepest(nets, batch, self.rho, self.scale)

    def scale(self, name: str, p: Tensor) -> Tensor:
        """Return T for a parameter."""
        return p.abs() + self.eta if is_weight(name) else torch.ones_like(p)


def is_weight(name: str) -> bool:
    """Return whether a tensor's own name contains `weight`, as in `weight`, `weight_ih_l0` and `in_proj_weight`."""
    return "weight" in name.rpartition(".")[2]
