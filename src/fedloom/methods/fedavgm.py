"""FedAvgM: the server adds momentum to the clients' mean change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedloom import tree
from fedloom.method import Combines, Method, Paper, Round, Task
from fedloom.ranges import Fraction, Positive
from fedloom.tree import Tree, Weights


@dataclass(frozen=True, kw_only=True)
class FedAvgM(Method):
    """FedAvgM (Hsu, Qi, Brown; 2019): v <- beta v - D, x <- x - server_lr v, where D is the mean change of the clients.

    Sent: The whole model is sent in both directions. Kept: Clients keep nothing between rounds.

    This is heavy-ball momentum without damping: in the long run, steps are 1 / (1 - beta) times as long as FedAvg's. With beta = 0 and
    server_lr = 1, the method is FedAvg. Running statistics are averaged, without momentum.
    """

    beta: Fraction = 0.9
    """The server's momentum."""
    server_lr: Positive = 1.0
    """The server's learning rate."""

    accepts_late: ClassVar[bool] = True
    combines: ClassVar[Combines] = "mean"
    paper: ClassVar[Paper] = Paper(
        "Measuring the effects of non-identical data distribution for federated visual classification",
        "Hsu, Qi, Brown",
        "arXiv 2019",
        "https://arxiv.org/abs/1909.06335",
    )

    def init_server(self, weights: Weights, task: Task, round: Round) -> Tree:
        """Return the model and v = 0."""
        server = super().init_server(weights, task, round)
        return server | {"velocity": tree.zeros_like(server["weights"]["params"])}

    def aggregate(self, server: Tree, uplinks: Sequence[Tree], round: Round) -> Tree:
        """Return the new v, and x after its update with the new v."""
        mean, x = super().aggregate(server, uplinks, round)["weights"], server["weights"]["params"]
        velocity = tree.add(tree.sub(x, mean["params"]), server["velocity"], self.beta)
        return {"weights": {**mean, "params": tree.add(x, velocity, -self.server_lr)}, "velocity": velocity}
