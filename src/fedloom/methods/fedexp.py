"""FedExP: the server takes a longer step when the clients' changes point in different directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedloom import tree
from fedloom.method import Combines, Downlink, Method, Paper, Round, Task
from fedloom.ranges import NonNegative
from fedloom.tree import Tree, Weights


@dataclass(frozen=True, kw_only=True)
class FedExP(Method):
    """FedExP (Jhunjhunwala et al., ICLR 2023): the server extrapolates along the mean change of the clients.

    Sent: The whole model is sent in both directions. Kept: Clients keep nothing between rounds.

    The step is never shorter than FedAvg's. The less similar the clients' changes are, the longer the step is. The model in use is the
    mean of the last two server models; training continues from the last one.

    As in the released code, clients are weighted by their numbers of examples. Unlike in the released code, `epsilon` is constant, as in
    the paper's formula (the code multiplies it by the size of the cohort and lets it decay). Running statistics are averaged, never
    extrapolated.
    """

    epsilon: NonNegative = 1e-3
    """Constant added to the squared length of the mean change; a larger value makes steps shorter."""

    accepts_late: ClassVar[bool] = True
    combines: ClassVar[Combines] = "individual"
    paper: ClassVar[Paper] = Paper(
        "FedExP: Speeding up federated averaging via extrapolation",
        "Jhunjhunwala, Wang, Joshi",
        "ICLR 2023",
        "https://arxiv.org/abs/2301.09604",
    )

    def init_server(self, weights: Weights, task: Task, round: Round) -> Tree:
        """Return the model, and the same model as that of the previous round."""
        server = super().init_server(weights, task, round)
        return server | {"before": server["weights"]}

    def aggregate(self, server: Tree, uplinks: Sequence[Tree], round: Round) -> Tree:
        """Return x + eta mean(D_k), and x as the previous model. The first round has no previous model, so the new one takes its place."""
        mean = tree.mean([uplink["weights"] for uplink in uplinks], round.shares)
        x = server["weights"]["params"]
        step = tree.sub(mean["params"], x)
        weights = {**mean, "params": tree.add(x, step, self.step_size(server, uplinks, round))}
        return {"weights": weights, "before": server["weights"] if round.number else weights}

    def step_size(self, server: Tree, uplinks: Sequence[Tree], round: Round) -> float:
        """Return eta = max(1, sum_k p_k ||D_k||^2 / (2 (||sum_k p_k D_k||^2 + epsilon))), with D_k = y_k - x."""
        changes = [tree.sub(uplink["weights"]["params"], server["weights"]["params"]) for uplink in uplinks]
        mean = tree.mean(changes, round.shares)
        lengths = sum(p * float(tree.dot(d, d)) for p, d in zip(round.shares, changes, strict=True))
        below = 2 * (float(tree.dot(mean, mean)) + self.epsilon)
        return max(1.0, lengths / below) if below else 1.0

    def server_logs(self, server: Tree, uplinks: Sequence[Tree], round: Round) -> Mapping[str, float]:
        """Return the server's step size eta."""
        return {"step_size": self.step_size(server, uplinks, round)}

    def deploy(self, server: Tree, task: Task, round: Round) -> Downlink:
        """Return the mean of the last two models."""
        return Downlink({"weights": tree.mean([server["weights"], server["before"]])})
