"""FedAdam: the server applies Adam to the clients' mean change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from fedloom import tree
from fedloom.method import Combines, Method, Paper, Round, Task
from fedloom.ranges import Fraction, Positive
from fedloom.tree import Tree, Weights


@dataclass(frozen=True, kw_only=True)
class FedAdam(Method):
    """FedAdam (Reddi et al., ICLR 2021, algorithm 2): adaptive federated optimisation.

    Sent: The whole model is sent in both directions. Kept: Clients keep nothing between rounds.

    D is the mean change of the clients. The server computes m <- beta1 m + (1 - beta1) D, v <- beta2 v + (1 - beta2) D^2, and x <- x +
    server_lr m / (sqrt(v) + tau), without bias correction. The initial v is tau^2 in the paper and 0 in the released code (`initial`).
    Running statistics are averaged.

    Tune `server_lr` and `tau` together: if tau is large, the method is momentum SGD with step size server_lr / tau.
    """

    server_lr: Positive = 0.01
    """The server's learning rate (the paper's eta)."""
    beta1: Fraction = 0.9
    """Decay rate of the mean m."""
    beta2: Fraction = 0.99
    """Decay rate of the mean square v."""
    tau: Positive = 1e-3
    """Constant added to the square root of v."""
    initial: Literal["tau2", "zero"] = "tau2"
    """The initial value of v: tau^2 (paper) or 0 (released code)."""

    accepts_late: ClassVar[bool] = True
    combines: ClassVar[Combines] = "mean"
    paper: ClassVar[Paper] = Paper(
        "Adaptive federated optimization",
        "Reddi, Charles, Zaheer, Garrett, Rush, Konečný, Kumar, McMahan",
        "ICLR 2021",
        "https://arxiv.org/abs/2003.00295",
    )

    def init_server(self, weights: Weights, task: Task, round: Round) -> Tree:
        """Return the model, m = 0 and the initial v."""
        server = super().init_server(weights, task, round)
        zero, start = tree.zeros_like(server["weights"]["params"]), self.tau**2 if self.initial == "tau2" else 0.0
        return server | {"mean": zero, "square": tree.map_tree(lambda z: z + start, zero)}

    def aggregate(self, server: Tree, uplinks: Sequence[Tree], round: Round) -> Tree:
        """Return the new m and v, and x after its update with them."""
        after, x = super().aggregate(server, uplinks, round)["weights"], server["weights"]["params"]
        change = tree.sub(after["params"], x)
        mean = tree.map_tree(lambda m, d: self.beta1 * m + (1 - self.beta1) * d, server["mean"], change)
        square = tree.map_tree(self.second, server["square"], change)
        params = tree.map_tree(lambda p, m, v: p + self.server_lr * m / (v.sqrt() + self.tau), x, mean, square)
        return {"weights": {**after, "params": params}, "mean": mean, "square": square}

    def second(self, v: Tensor, d: Tensor) -> Tensor:
        """Return the next v."""
        return self.beta2 * v + (1 - self.beta2) * d.square()
