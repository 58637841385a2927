"""FedSAM: clients search for flat minima by sharpness-aware minimisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedloom.method import Batch, Method, Paper
from fedloom.nets import Nets
from fedloom.ranges import NonNegative
from fedloom.tree import Tree

Params = dict[str, Tensor]


@dataclass(frozen=True)
class FedSAM(Method):
    """FedSAM (Qu et al., ICML 2022; Caldarola et al., ECCV 2022; SAM: Foret et al., ICLR 2021).

    Every local step first moves to the nearby weights with the highest loss (to first order), w + e with e = rho g / ||g||, where the
    norm covers all parameters. The step then computes the gradient there and applies it to w. With rho = 0, the method is FedAvg.

    Sent: The whole model is sent in both directions. Kept: Clients keep nothing between rounds.

    Running statistics come from the second pass only; in released code, they come from both. Weight decay is applied at w, as in released
    code.
    """

    rho: NonNegative = 0.1
    """The length of the ascent step."""

    accepts_late: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        "Generalized federated learning via sharpness aware minimization",
        "Qu, Li, Duan, Liu, Tang, Lu",
        "ICML 2022",
        "https://arxiv.org/abs/2206.02618",
    )

    def loss(self, nets: Nets, batch: Batch, down: Tree, memory: Tree) -> Tensor:
        """Return the loss at w + e. No gradient flows through e."""
        worst = moved_by(nets, self.ascent(nets, batch))
        return nets.loss(worst.model(batch.x), batch.y)

    def ascent(self, nets: Nets, batch: Batch) -> Params:
        """Return e for every parameter of the model."""
        return steepest(nets, batch, self.rho)


def unscaled(name: str, p: Tensor) -> Tensor:
    """Return ones, which are the scale T of FedSAM."""
    return torch.ones_like(p)


def steepest(nets: Nets, batch: Batch, rho: float, scale: Callable[[str, Tensor], Tensor] = unscaled) -> Params:
    """Return e = rho T^2 g / ||T g|| for every parameter of `model`, with g the gradient of its loss and T = scale(name, w)."""
    slopes = nets.frozen.gradient(lambda here: here.loss(here.model(batch.x), batch.y), ("model",))
    scales = {name: scale(name, nets.params[name].detach()) for name in slopes}
    scaled = {name: scales[name] * slope for name, slope in slopes.items()}
    length = torch.stack([s.square().sum() for s in scaled.values()]).sum().sqrt()
    return {name: rho * scales[name] * s / (length + 1e-16) for name, s in scaled.items()}


def moved_by(nets: Nets, e: Params) -> Nets:
    """Return the nets with parameters w + e."""
    return nets.with_params({name: nets.params[name] + e[name] for name in e})
