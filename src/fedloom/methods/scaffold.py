"""SCAFFOLD: control variates correct the drift of local steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedloom import tree
from fedloom.method import Batch, Client, ClientData, Combines, Downlink, Method, Paper, Round, Task, Turn
from fedloom.nets import Nets
from fedloom.ranges import Positive
from fedloom.tree import Tree, Weights


@dataclass(frozen=True)
class Scaffold(Method):
    """SCAFFOLD (Karimireddy et al., ICML 2020, algorithm 1, option II).

    Sent: The model and a control variate of the same size are sent in both directions (twice FedAvg's bytes). Kept: Each client keeps its
    control variate c_i, an estimate of its own *gradient* (with the same sign).

    The server's c is the mean of all c_i, unless an uplink was rejected or a round was skipped: the affected clients are not notified and
    keep their new c_i. Means over the cohort have equal weights, as in the paper. Local steps must be plain SGD (option II divides by lr).
    """

    server_lr: Positive = 1.0
    """The server's step size (the paper's global eta)."""

    also_travels: ClassVar[tuple[str, ...]] = ("control",)
    combines: ClassVar[Combines] = "mean"
    paper: ClassVar[Paper] = Paper(
        "SCAFFOLD: stochastic controlled averaging for federated learning",
        "Karimireddy, Kale, Mohri, Reddi, Stich, Suresh",
        "ICML 2020",
        "https://arxiv.org/abs/1910.06378",
    )

    def __post_init__(self) -> None:
        """Raise ValueError unless local steps are plain SGD, because option II derives the mean gradient from the change of the weights."""
        super().__post_init__()
        if self.optimizer != "sgd" or self.momentum or self.weight_decay:
            name = type(self).__name__.lower()
            raise ValueError(f"{name} needs plain SGD; use optimizer=sgd, momentum=0, weight_decay=0")

    def init_memory(self, weights: Weights, task: Task, data: ClientData) -> Tree:
        """Return c_i = 0."""
        return {"control": tree.zeros_like(self.travelling(weights)["params"])}

    def init_server(self, weights: Weights, task: Task, round: Round) -> Tree:
        """Return the model and c = 0."""
        control = tree.zeros_like(self.travelling(weights)["params"])
        return super().init_server(weights, task, round) | {"control": control}

    def downlink(self, server: Tree, cohort: Sequence[int], round: Round) -> Downlink:
        """Return x and c."""
        return Downlink({"weights": server["weights"], "control": server["control"]})

    def loss(self, nets: Nets, batch: Batch, down: Tree, memory: Tree) -> Tensor:
        """Return a loss whose gradient is g_i(y) - c_i + c (line 10)."""
        correction = tree.sub(down["control"], memory["control"])
        own = {name: nets.params[name] for name in correction}
        return nets.loss(nets.model(batch.x), batch.y) + tree.dot(correction, own)

    def uplink(self, client: Client, received: Weights, down: Tree, turn: Turn) -> tuple[Tree, Tree]:
        """Return y_i, and the change of c_i with c_i+ = c_i - c + (x - y_i) / (steps lr) (line 12, option II)."""
        travelled = turn.steps["train"] * self.lr * turn.lr_scale
        sent = self.travelling(client.weights)
        moved = tree.sub(down["weights"]["params"], sent["params"])
        change = tree.add(tree.map_tree(lambda m: m / travelled, moved), down["control"], -1.0)
        memory = {"control": tree.add(client.memory["control"], change)}
        return {"weights": sent, "control": change}, memory

    def aggregate(self, server: Tree, uplinks: Sequence[Tree], round: Round) -> Tree:
        """Return x <- x + server_lr mean(y_i - x) and c <- c + |S| / K mean(change of c_i) (lines 16 and 17), with K clients in total."""
        mean = tree.mean(uplinks)
        step = tree.sub(mean["weights"]["params"], server["weights"]["params"])
        params = tree.add(server["weights"]["params"], step, self.server_lr)
        control = tree.add(server["control"], mean["control"], len(uplinks) / round.n_clients)
        return {"weights": {"params": params, "buffers": mean["weights"]["buffers"]}, "control": control}
