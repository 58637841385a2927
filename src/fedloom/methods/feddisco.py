"""FedDisco: clients with more even class proportions have larger weights in the mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedloom import tree
from fedloom.method import Client, ClientData, Combines, Method, Need, Paper, Round, Task, Turn
from fedloom.methods.feature_statistics import counts_fault
from fedloom.ranges import NonNegative
from fedloom.tree import Tree, Weights


@dataclass(frozen=True)
class FedDisco(Method):
    """FedDisco (Ye et al., ICML 2023): aggregation weights by numbers of examples and label discrepancy.

    Sent: The whole model is sent in both directions, and clients also send their class counts. Kept: Clients keep nothing between rounds.

    The weight of client k is proportional to max(n_k / N - a d_k + b, 0). Here n_k / N is the client's fraction of the cohort's examples,
    and d_k is the distance of its class proportions from uniform proportions. As in the released code, KL divergences are divided by
    their sum over the cohort. With a = b = 0, the method is FedAvg. If no weight is positive, weights are proportional to numbers of
    examples (the released code ends with an error). The weight of a late client is divided by sqrt(1 + age).

    The released code can also compare with the class proportions of the test set, and can replace the weights of other methods (FedProx,
    MOON, FedDyn). Neither is included.
    """

    a: NonNegative = 0.5
    """Factor of a client's discrepancy, which reduces its weight."""
    b: float = 0.1
    """Constant that is added to every weight. Its scale is that of a d_k and n_k / N."""
    metric: Literal["kl", "l1", "l2", "cosine"] = "kl"
    """The distance between class proportions."""

    accepts_late: ClassVar[bool] = True
    also_travels: ClassVar[tuple[str, ...]] = ("counts",)
    combines: ClassVar[Combines] = "individual"
    needs: ClassVar[tuple[Need, ...]] = ("classes",)
    paper: ClassVar[Paper] = Paper(
        "FedDisco: Federated learning with discrepancy-aware collaboration",
        "Ye, Xu, Wang, Xu, Chen, Wang",
        "ICML 2023",
        "https://arxiv.org/abs/2305.19229",
    )

    def init_memory(self, weights: Weights, task: Task, data: ClientData) -> Tree:
        """Return the class counts (Y,)."""
        return {"counts": data.class_counts}

    def uplink(self, client: Client, received: Weights, down: Tree, turn: Turn) -> tuple[Tree, Tree]:
        """Return the model and the class counts."""
        sent, memory = super().uplink(client, received, down, turn)
        return sent | {"counts": memory["counts"]}, memory

    def uplink_fault(self, uplink: Tree, class_counts: Tensor | None) -> str:
        """Return a message if the counts are not those of the client, and an empty string otherwise."""
        return counts_fault(uplink["counts"], class_counts)

    def aggregate(self, server: Tree, uplinks: Sequence[Tree], round: Round) -> Tree:
        """Return the mean of the models with FedDisco's weights."""
        return {"weights": tree.mean([uplink["weights"] for uplink in uplinks], self.shares(uplinks, round))}

    def shares(self, uplinks: Sequence[Tree], round: Round) -> list[float]:
        """Return the weights of the arrivals, whose sum is 1."""
        late = torch.tensor([1 + arrival.age for arrival in round.arrivals], dtype=torch.float64).sqrt()
        sizes = torch.tensor(round.shares, dtype=torch.float64) * late
        d = self.discrepancies(torch.stack([uplink["counts"] for uplink in uplinks]).double())
        found = (sizes / sizes.sum() - self.a * d + self.b).clamp(min=0) / late
        shares: list[float] = (found / found.sum()).tolist() if found.sum() > 0 else round.shares
        return shares

    def discrepancies(self, counts: Tensor) -> Tensor:
        """Return d_k (m,) for class counts (m, Y)."""
        found = counts / counts.sum(1, keepdim=True)
        even = torch.full_like(found, 1 / found.shape[1])
        away = found - even
        if self.metric != "kl":
            distances: dict[str, Tensor] = {
                "cosine": 1 - torch.nn.functional.cosine_similarity(found, even, 1),
                "l1": away.abs().sum(1),
                "l2": away.square().sum(1).sqrt(),
            }
            return distances[self.metric]
        nats: Tensor = torch.special.xlogy(found, found / even).sum(1)
        return nats / nats.sum() if nats.sum() > 0 else nats

    def server_logs(self, server: Tree, uplinks: Sequence[Tree], round: Round) -> Mapping[str, float]:
        """Return the number of clients with weight 0, and the largest weight."""
        shares = self.shares(uplinks, round)
        return {"without_weight": float(shares.count(0.0)), "largest_weight": max(shares)}
