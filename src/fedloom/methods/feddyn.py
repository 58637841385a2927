"""FedDyn: clients regularise their losses dynamically, so that their minima agree with that of the federation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedloom import losses, tree
from fedloom.method import Batch, Client, ClientData, Combines, Downlink, Method, Paper, Round, Task, Turn
from fedloom.nets import Nets
from fedloom.ranges import Positive
from fedloom.tree import Tree, Weights


@dataclass(frozen=True)
class FedDyn(Method):
    """FedDyn (Acar et al., ICLR 2021, algorithm 1): dynamic regularisation.

    Sent: The whole model is sent in both directions. Kept: Each client keeps g_k, an estimate of its own gradient (the size of the
    parameters, 0 at first).

    A client minimises f_k(y) - <g_k, y> + alpha / 2 ||y - x||^2, and then sets g_k <- g_k - alpha (y_k - x). The server keeps h, the mean
    of all K clients' g_k. It sets h <- h - alpha / K sum_k (y_k - x), and then x <- mean_k y_k - h / alpha. Means have equal weights, as
    in the paper. The model in use is mean_k y_k; clients start from x. A small alpha does not give FedAvg: the first step of x is twice
    FedAvg's for every alpha.

    Differences from the released code: alpha is the same for all clients (the code divides it by a client's relative number of examples),
    and gradients are not clipped. The code scores mean_k y_k, and also the mean of all clients' last models, which is not implemented. If
    an uplink is lost after its client has trained, h is no longer the mean of all g_k. Running statistics are averaged.
    """

    alpha: Positive = 0.01
    """Weight of the regularisation (0.1, 0.01 or 0.001 in the paper)."""

    combines: ClassVar[Combines] = "mean"
    paper: ClassVar[Paper] = Paper(
        "Federated learning based on dynamic regularization",
        "Acar, Zhao, Matas Navarro, Mattina, Whatmough, Saligrama",
        "ICLR 2021",
        "https://arxiv.org/abs/2111.04263",
    )

    def init_memory(self, weights: Weights, task: Task, data: ClientData) -> Tree:
        """Return g_k = 0."""
        return {"gradient": tree.zeros_like(self.travelling(weights)["params"])}

    def init_server(self, weights: Weights, task: Task, round: Round) -> Tree:
        """Return the model and h = 0."""
        server = super().init_server(weights, task, round)
        return server | {"h": tree.zeros_like(server["weights"]["params"])}

    def loss(self, nets: Nets, batch: Batch, down: Tree, memory: Tree) -> Tensor:
        """Return f_k(y) - <g_k, y> + alpha / 2 ||y - x||^2."""
        own = {name: nets.params[name] for name in memory["gradient"]}
        drift = losses.squared_distance(own, down["weights"]["params"])
        return self.error(nets, batch) - tree.dot(memory["gradient"], own) + self.alpha / 2 * drift

    def error(self, nets: Nets, batch: Batch) -> Tensor:
        """Return f_k on a batch."""
        return nets.loss(nets.model(batch.x), batch.y)

    def uplink(self, client: Client, received: Weights, down: Tree, turn: Turn) -> tuple[Tree, Tree]:
        """Return y_k as the uplink, and keep g_k - alpha (y_k - x)."""
        sent = self.travelling(client.weights)
        moved = tree.sub(sent["params"], down["weights"]["params"])
        return {"weights": sent}, {"gradient": tree.add(client.memory["gradient"], moved, -self.alpha)}

    def aggregate(self, server: Tree, uplinks: Sequence[Tree], round: Round) -> Tree:
        """Return h, and x = mean_k y_k - h / alpha."""
        mean = tree.mean([uplink["weights"] for uplink in uplinks])
        moved = tree.sub(mean["params"], server["weights"]["params"])
        h = tree.add(server["h"], moved, -self.alpha * len(uplinks) / round.n_clients)
        return {"weights": {**mean, "params": tree.add(mean["params"], h, -1 / self.alpha)}, "h": h}

    def deploy(self, server: Tree, task: Task, round: Round) -> Downlink:
        """Return the mean of the last cohort's models, x + h / alpha."""
        params = tree.add(server["weights"]["params"], server["h"], 1 / self.alpha)
        return Downlink({"weights": {**server["weights"], "params": params}})
