"""FedMut: the server sends each client a mutant of the global model, which is shifted along the global model's last change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedloom import tree
from fedloom.method import Combines, Downlink, Method, Paper, Round, Task
from fedloom.nets import units
from fedloom.ranges import Count, Fraction, NonNegative, Positive
from fedloom.rng import Stream
from fedloom.tree import Tree, Weights


@dataclass(frozen=True, kw_only=True)
class FedMut(Method):
    """FedMut (Hu et al., AAAI 2024): clients train mutants of the global model, to find flat regions of the loss.

    Sent: A whole model is sent in both directions: a different one for each member of the cohort, but as many bytes as with FedAvg. Kept:
    Clients keep nothing between rounds.

    Let w be the mean of the returned models, and g its last change. Member i receives w + alpha v_iu g for every unit u (a layer). Half of
    the signs v are +1 and the other half are -1. They are shuffled over the members independently for every unit, so the mean of the
    mutants is w. If the size of the cohort is odd, the last member receives w. The model in use is w. Means have equal weights, as in the
    paper.

    As in the released code, mutants first lean forward: the negative sign is -(1 - c) with c = forward max(0, 1 - round / forward_rounds).
    Differences from the released code: a unit is a layer, as in the paper, and only parameters are mutated, never running statistics. If a
    client is lost, the mean of the received mutants may differ from w.
    """

    lr: Positive = 0.01
    momentum: Fraction = 0.9
    local_epochs: Count = 5
    alpha: NonNegative = 4.0
    """Length of a mutation, in units of the last change of w (the code's radius: 4 or 5)."""
    forward: Fraction = 0.3
    """Relative reduction c of the negative mutations in round 0. With 0, the mean of the mutants is always w."""
    forward_rounds: Positive = 50
    """The round from which negative mutations are as strong as positive ones."""

    combines: ClassVar[Combines] = "individual"
    paper: ClassVar[Paper] = Paper(
        "FedMut: Generalized federated learning via stochastic mutation",
        "Hu, Cao, Li, Li, Liu, Li, Chen, Liu",
        "AAAI 2024",
        "https://ojs.aaai.org/index.php/AAAI/article/view/29146",
    )

    def init_server(self, weights: Weights, task: Task, round: Round) -> Tree:
        """Return w, and g = 0."""
        server = super().init_server(weights, task, round)
        return server | {"change": tree.zeros_like(server["weights"]["params"])}

    def downlink(self, server: Tree, cohort: Sequence[int], round: Round) -> Downlink:
        """Return one mutant for each member."""
        weights, change = server["weights"], server["change"]
        pieces = units({"params": weights["params"], "buffers": {}}, "layer")
        signs = self.signs(len(cohort), len(pieces), round.number, round.rng)
        of_tensor = {name: u for u, piece in enumerate(pieces) for _, name in piece}
        mutants = (
            {name: p + self.alpha * mine[of_tensor[name]] * change[name] for name, p in weights["params"].items()}
            for mine in signs
        )
        return Downlink(each=[{"weights": {**weights, "params": params}} for params in mutants])

    def signs(self, members: int, n_units: int, number: int, rng: Stream) -> Tensor:
        """Return the signs (members, units). Each column has as many positive as negative signs, in random order."""
        lean = self.forward * max(0.0, 1 - number / self.forward_rounds)
        half = members // 2
        column = torch.tensor([1.0] * half + [-(1 - lean)] * half)
        shuffled = [column[rng.permutation(2 * half)] for _ in range(n_units)]
        return torch.cat([torch.stack(shuffled, 1), torch.zeros(members - 2 * half, n_units)])

    def aggregate(self, server: Tree, uplinks: Sequence[Tree], round: Round) -> Tree:
        """Return the equal-weight mean of the returned models, and the change of this mean."""
        mean = tree.mean([uplink["weights"] for uplink in uplinks])
        return {"weights": mean, "change": tree.sub(mean["params"], server["weights"]["params"])}

    def deploy(self, server: Tree, task: Task, round: Round) -> Downlink:
        """Return w."""
        return Downlink({"weights": server["weights"]})
