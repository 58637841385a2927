"""FedLC: logits are calibrated with the client's class counts, so that rare classes get larger margins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedloom import losses
from fedloom.method import Batch, ClientData, Method, Need, Paper, Task
from fedloom.nets import Nets
from fedloom.ranges import NonNegative
from fedloom.tree import Tree, Weights


@dataclass(frozen=True)
class FedLC(Method):
    """FedLC (Zhang et al., ICML 2022): calibrated logits against label skew.

    Sent: The whole model is sent in both directions. Kept: Clients keep nothing between rounds.

    Let n_c be the client's number of examples of class c. The loss is the cross-entropy of the logits f_c - tau n_c^(-1/4). A class
    without examples on the client has probability 0, so its part of the head is not trained. Predictions use f_c. With tau = 0, the
    method is FedAvg.

    In the paper, the denominator of the softmax does not contain the true class (`denominator=others`). This loss has no lower bound, and
    training with it collapsed in independent implementations. The default includes the true class, as these implementations do. There is
    no public code of the authors.
    """

    tau: NonNegative = 1.0
    """Factor of the margins. With 0, there are no margins, and no class is left out."""
    denominator: Literal["all", "others"] = "all"
    """The classes in the denominator of the softmax: all of the client's classes, or (as in the paper) all but the true class."""

    accepts_late: ClassVar[bool] = True
    needs: ClassVar[tuple[Need, ...]] = ("classes",)
    paper: ClassVar[Paper] = Paper(
        "Federated learning with label distribution skew via logits calibration",
        "Zhang, Li, Li, Xu, Wu, Ding, Wu",
        "ICML 2022",
        "https://arxiv.org/abs/2209.00189",
    )

    def init_memory(self, weights: Weights, task: Task, data: ClientData) -> Tree:
        """Return the margins (Y,), which are added to the logits.

        A margin is -tau n_c^(-1/4), or `losses.ABSENT` for a class without examples. With tau = 0, all margins are 0.
        """
        held = data.class_counts > 0
        margins = -self.tau * data.class_counts.clamp(min=1) ** -0.25
        return {"margins": torch.where(held, margins, losses.ABSENT) if self.tau else torch.zeros_like(margins)}

    def loss(self, nets: Nets, batch: Batch, down: Tree, memory: Tree) -> Tensor:
        """Return the loss of the calibrated logits."""
        logits = losses.wide(nets.model(batch.x)) + memory["margins"]
        return losses.cross_entropy(logits, batch.y) if self.denominator == "all" else unbounded(logits, batch.y)


def unbounded(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean of -log(e^s_y / sum_{c != y} e^s_c) for logits s (B, Y). With only one class, it is 0."""
    others = losses.without_true(logits, labels).logsumexp(1)
    margin = others - logits.gather(1, labels[:, None])[:, 0]
    return torch.where(others > losses.ABSENT / 2, margin, 0).mean()
