"""FedPAC: features are aligned with common prototypes, and every client receives the combination of heads that suits its data best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fedloom import losses, tree
from fedloom.method import (
    Batch,
    Client,
    ClientData,
    Combines,
    Downlink,
    Paper,
    Phase,
    Predictor,
    Round,
    Sweep,
    Task,
    Train,
    Turn,
)
from fedloom.methods.fedproto import FedProto
from fedloom.nets import Nets, select
from fedloom.ranges import Count, Fraction, NonNegative, Positive
from fedloom.tree import Tree, Weights


@dataclass(frozen=True, kw_only=True)
class FedPAC(FedProto):
    """FedPAC (Xu, Tong, Huang; ICLR 2023): personalisation with feature alignment and classifier collaboration.

    Sent: Clients send the body, the trained head, FedProto's prototypes and counts, and two statistics of the received body's features: h
    (Y, p), whose row y is p_y mean_y, and a variance V. The server sends the mean body, the prototypes, and one head per client. Kept:
    Clients keep nothing between rounds.

    A local update collects h and V, trains the head alone, trains the body alone with FedProto's distance to the prototypes, and collects
    new prototypes. For every client i of the cohort, the server combines the heads of the cohort. The weights a >= 0 sum to 1 and minimise
    a' P a, where P = diag(V) + A A' and the rows of A are A_j = h_i - h_j. This is a trade-off between the bias and the variance of the
    combination.

    Differences from the released code: the quadratic program is solved exactly. Small weights are not cut off. A class without a prototype
    adds no distance. A class that is absent from the cohort keeps its prototype.
    """

    lr: Positive = 0.01
    momentum: Fraction = 0.5
    weight_decay: NonNegative = 5e-4
    local_epochs: Count = 5
    head_lr: Positive = 0.1
    """Learning rate of the head."""
    head_epochs: Count = 1
    """Number of passes that update the head, before the body's `local_epochs`."""
    predict_by: Literal["head"] = "head"
    """How clients predict: with their combined head."""

    shared: ClassVar[tuple[str, ...]] = ("body",)
    also_travels: ClassVar[tuple[str, ...]] = (*FedProto.also_travels, "head", "mixture", "variance")
    combines: ClassVar[Combines] = "individual"
    paper: ClassVar[Paper] = Paper(
        "Personalized federated learning with feature alignment and classifier collaboration",
        "Xu, Tong, Huang",
        "ICLR 2023",
        "https://arxiv.org/abs/2306.11867",
    )

    def init_memory(self, weights: Weights, task: Task, data: ClientData) -> Tree:
        """Return FedProto's statistics, and the sums by class (Y, p) and the sum of squares (0-d) of the received body's features."""
        zero = torch.zeros(task.n_classes, task.width, dtype=torch.float64)
        return super().init_memory(weights, task, data) | {"received": {"sums": zero, "squares": zero.new_zeros(())}}

    def init_server(self, weights: Weights, task: Task, round: Round) -> Tree:
        """Return prototypes, counts, the body, and one head per client, stacked to (K, ...)."""
        head = select(weights, ("head",))["params"]
        heads = tree.map_tree(lambda p: p.expand(task.n_clients, *p.shape).clone(), head)
        return super().init_server(weights, task, round) | {"weights": self.travelling(weights), "heads": heads}

    def downlink(self, server: Tree, cohort: Sequence[int], round: Round) -> Downlink:
        """Return the body, the prototypes and the mean head, and each member's own head."""
        common = {name: server[name] for name in ("weights", "prototypes", "counts")}
        mean = tree.map_tree(lambda heads: heads.mean(0), server["heads"])
        each = [{"head": tree.map_tree(lambda heads, i=i: heads[i], server["heads"])} for i in cohort]
        return Downlink({**common, "head": mean}, each)

    def deploy(self, server: Tree, task: Task, round: Round) -> Downlink:
        """Return every client's own head. Clients that join later predict with the mean head."""
        return self.downlink(server, range(task.n_clients), round)

    def receive(self, weights: Weights, down: Tree, memory: Tree) -> Weights:
        """Return the received body and head."""
        return tree.merge(super().receive(weights, down, memory), {"params": down["head"]})

    def phases(self) -> tuple[Phase, ...]:
        """Return a sweep over the received body's features, phases that train the head and the body, and a sweep for the prototypes."""
        optimizer = self.local_optimizer()
        head = Train("head", self.head_loss, ("head",), self.local_optimizer(self.head_lr), epochs=self.head_epochs)
        body = Train("body", self.loss, ("body",), optimizer, epochs=self.local_epochs)
        return Sweep("received", self.moments), head, body, Sweep("statistics", self.statistics)

    def moments(self, nets: Nets, batch: Batch, total: Tree, down: Tree, memory: Tree) -> Tree:
        """Add a batch to the sums of the received body's features."""
        z, member = nets.body(batch.x).double(), losses.one_hot(batch.y, len(total["sums"])).double()
        return {"sums": total["sums"] + member.T @ z, "squares": total["squares"] + z.square().sum()}

    def head_loss(self, nets: Nets, batch: Batch, down: Tree, memory: Tree) -> Tensor:
        """Return the cross-entropy."""
        return nets.loss(nets.head(nets.body(batch.x)), batch.y)

    def uplink(self, client: Client, received: Weights, down: Tree, turn: Turn) -> tuple[Tree, Tree]:
        """Return body, head, prototypes, counts, h (`mixture`) and V (`variance`), with V = (mean ||z||^2 - sum_y ||h_y||^2) / n."""
        sent, memory = super().uplink(client, received, down, turn)
        h, squares = (memory["received"][name] / turn.examples for name in ("sums", "squares"))
        dtype, head = sent["prototypes"].dtype, select(client.weights, ("head",))["params"]
        variance = (squares - h.square().sum()).clamp(min=0) / turn.examples
        own = {"weights": self.travelling(client.weights), "head": head}
        return sent | own | {"mixture": h.to(dtype), "variance": variance.to(dtype)}, memory

    def uplink_fault(self, uplink: Tree, class_counts: Tensor | None) -> str:
        """Return FedProto's faults, or a fault if the variance is negative."""
        return super().uplink_fault(uplink, class_counts) or (
            "'variance' is negative" if uplink["variance"] < 0 else ""
        )

    def aggregate(self, server: Tree, uplinks: Sequence[Tree], round: Round) -> Tree:
        """Return the mean prototypes and body, and a new head for every client whose uplink arrived."""
        after = super().aggregate(server, uplinks, round)
        heads, sent = tree.clone(server["heads"]), [uplink["head"] for uplink in uplinks]
        for place, arrival in enumerate(round.arrivals):
            combined = tree.mean(sent, self.head_shares(uplinks, place).tolist())
            for name, head in combined.items():
                heads[name][arrival.client] = head
        weights = tree.mean([uplink["weights"] for uplink in uplinks], round.shares)
        return after | {"weights": weights, "heads": heads}

    def head_shares(self, uplinks: Sequence[Tree], place: int) -> Tensor:
        """Return the weights (m,) with which the cohort's heads are combined for the client at `place`, in float64."""
        h = torch.stack([uplink["mixture"].flatten() for uplink in uplinks]).double()
        variances = torch.stack([uplink["variance"] for uplink in uplinks]).double()
        away = h[place] - h
        return least_on_simplex(variances.diag() + away @ away.T)

    def server_logs(self, server: Tree, uplinks: Sequence[Tree], round: Round) -> Mapping[str, float]:
        """Return FedProto's log, and the mean weight of a client's own head in its combination (`own_head`)."""
        own = [float(self.head_shares(uplinks, place)[place]) for place in range(len(uplinks))]
        return {**super().server_logs(server, uplinks, round), "own_head": sum(own) / len(own)}

    def shared_features(self) -> Predictor:
        """Return the body's features."""
        return self.features

    def features(self, nets: Nets, x: Any, down: Tree, memory: Tree) -> Tensor:
        """Return the body's features (B, p)."""
        features: Tensor = nets.body(x)
        return features


def least_on_simplex(matrix: Tensor) -> Tensor:
    """Return the minimiser a (m,) of a' M a over a >= 0 with sum 1, for a positive semidefinite M (m, m) in float64.

    This is an active-set method. It minimises over the entries in use, stops at the first bound that it reaches, and adds the entry with
    the smallest slope.
    """
    matrix = (matrix + matrix.T) / 2
    matrix = matrix + 1e-12 * matrix.diagonal().max().clamp(min=1e-30) * torch.eye(len(matrix), dtype=matrix.dtype)
    a = torch.zeros_like(matrix[0])
    a[matrix.diagonal().argmin()] = 1
    for _ in range(10 * len(a) + 10):  # each support is visited at most once
        slopes = matrix @ a
        best = int(slopes.argmin())
        if a[best] > 0 or slopes[best] >= a @ slopes * (1 - 1e-9):
            return a
        used = a > 0
        used[best] = True
        while True:
            free = torch.linalg.solve(matrix[used][:, used], torch.ones(int(used.sum()), dtype=a.dtype))
            target = torch.zeros_like(a)
            target[used] = free / free.sum()
            if bool((target[used] > 0).all()):
                a = target
                break
            falling = used & (target <= 0)
            step = (a[falling] / (a[falling] - target[falling]).clamp(min=1e-300)).min()
            a = a + step * (target - a)
            a = torch.where(falling & (a <= 1e-15), 0, a).clamp(min=0)
            used = a > 0
    return a
