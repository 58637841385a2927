"""FedNova: the server averages the clients' changes per step, so that clients with more steps do not have more influence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedloom import tree
from fedloom.method import Client, Combines, Method, Paper, Round, Turn
from fedloom.tree import Tree, Weights


@dataclass(frozen=True)
class FedNova(Method):
    """FedNova (Wang et al., NeurIPS 2020, eq. 5 to 8): normalised averaging.

    Sent: The whole model is sent in both directions, and clients also send one number. Kept: Clients keep nothing between rounds.

    A client's change D_k is -lr times a weighted sum of its gradients. The sum of the weights is its effective number of steps a_k.
    Without momentum, a_k is the number of steps; with momentum, it is larger. The server divides every change by its a_k, and multiplies
    the mean by the mean of a_k: x <- x + (sum_k p_k a_k) sum_k p_k D_k / a_k, with p_k the fraction of the cohort's examples. If all a_k
    are equal, the method is FedAvg. With `devices.stragglers=partial`, a_k counts the steps that a slow client has taken.

    As in the released code, momentum starts at 0 in every round, and weight decay is a part of the gradient. The proximal local solver
    and the server's momentum are not implemented. Running statistics are averaged by numbers of examples.
    """

    accepts_late: ClassVar[bool] = True
    also_travels: ClassVar[tuple[str, ...]] = ("effective_steps",)
    combines: ClassVar[Combines] = "individual"
    paper: ClassVar[Paper] = Paper(
        "Tackling the objective inconsistency problem in heterogeneous federated optimization",
        "Wang, Liu, Liang, Joshi, Poor",
        "NeurIPS 2020",
        "https://arxiv.org/abs/2007.07481",
    )

    def __post_init__(self) -> None:
        """Raise ValueError if the local optimiser is not SGD, because the number of effective steps is then not defined."""
        super().__post_init__()
        if self.optimizer != "sgd":
            raise ValueError(f"optimizer={self.optimizer}: fednova needs SGD; use optimizer=sgd")

    def effective_steps(self, steps: int) -> float:
        """Return a_k = (tau - rho (1 - rho^tau) / (1 - rho)) / (1 - rho), with tau the number of steps and rho the momentum."""
        rho = self.momentum
        return (steps - rho * (1 - rho**steps) / (1 - rho)) / (1 - rho)

    def uplink(self, client: Client, received: Weights, down: Tree, turn: Turn) -> tuple[Tree, Tree]:
        """Return the model and a_k."""
        sent, memory = super().uplink(client, received, down, turn)
        return sent | {"effective_steps": torch.tensor(self.effective_steps(turn.steps["train"]))}, memory

    def uplink_fault(self, uplink: Tree, class_counts: Tensor | None) -> str:
        """Return a message if a_k is below 1, because a client takes at least one step, and an empty string otherwise."""
        return "" if uplink["effective_steps"] >= 1 else "'effective_steps' is below 1"

    def aggregate(self, server: Tree, uplinks: Sequence[Tree], round: Round) -> Tree:
        """Return the sum of x and the normalised mean of the changes."""
        x, shares = server["weights"]["params"], round.shares
        steps = [float(uplink["effective_steps"]) for uplink in uplinks]
        total = sum(p * a for p, a in zip(shares, steps, strict=True))
        changes = [tree.sub(uplink["weights"]["params"], x) for uplink in uplinks]
        step = tree.mean(changes, [total * p / a for p, a in zip(shares, steps, strict=True)])
        buffers = tree.mean([uplink["weights"]["buffers"] for uplink in uplinks], shares)
        return {"weights": {"params": tree.add(x, step), "buffers": buffers}}
