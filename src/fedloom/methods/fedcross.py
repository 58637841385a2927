"""FedCross: the server trains several models, and mixes each model with a small share of another model after every round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from fedloom import tree
from fedloom.method import Combines, Downlink, Method, Paper, Round, Task
from fedloom.ranges import Count, Fraction, Positive, Share, Whole
from fedloom.tree import Tree, Weights


@dataclass(frozen=True, kw_only=True)
class FedCross(Method):
    """FedCross (Hu et al., ICDE 2024): multi-model cross-aggregation.

    Sent: A whole model is sent in both directions. Each member of the cohort receives a different model, with as many bytes as in FedAvg.
    Kept: Clients keep nothing between rounds.

    The server keeps one model (slot) per member of the cohort. In each round, it sends slot i to the i-th member. Let v_i be the returned
    models. Slot i becomes alpha v_i + (1 - alpha) v_j, where v_j is its collaborator. The model in use is the equal-weight mean of the
    v_i before cross-aggregation; it is never sent. In the first `first_stage_rounds` rounds, all slots become this mean instead.

    The similarity of two models is the cosine of their parameters, as in the paper. The public code adds the cosines of consecutive pairs
    of tensors, including running statistics. The paper's accelerations (propeller models, a growing alpha) are not included. If the
    client of a slot is lost, the slot takes part unchanged. Running statistics are mixed with the same weights as parameters.
    """

    lr: Positive = 0.01
    momentum: Fraction = 0.5
    local_epochs: Count = 5
    alpha: Share = 0.99
    """Weight of a model itself in cross-aggregation. With 1, models are never mixed."""
    collaborator: Literal["lowest", "highest", "in_order"] = "lowest"
    """The collaborator of a model: the least similar model, the most similar one, or each other model in turn."""
    first_stage_rounds: Whole = 0
    """Number of rounds of plain averaging before cross-aggregation begins."""

    combines: ClassVar[Combines] = "individual"
    paper: ClassVar[Paper] = Paper(
        "FedCross: Towards accurate federated learning via multi-model cross-aggregation",
        "Hu, Zhou, Yue, Ling, Huang, Li, Liu, Lian, Chen",
        "ICDE 2024",
        "https://arxiv.org/abs/2210.08285",
    )

    def init_server(self, weights: Weights, task: Task, round: Round) -> Tree:
        """Return the stacked slots, in which every leaf has the shape (slots, ...), and the model in use."""
        own = self.travelling(weights)
        return {"slots": tree.stack([own] * task.max_cohort), "weights": own}

    def downlink(self, server: Tree, cohort: Sequence[int], round: Round) -> Downlink:
        """Return slot i for the i-th member."""
        return Downlink(each=[{"weights": slot} for slot in tree.unstack(server["slots"])[: len(cohort)]])

    def aggregate(self, server: Tree, uplinks: Sequence[Tree], round: Round) -> Tree:
        """Return the slots after cross-aggregation, and the mean of the models before it."""
        models = tree.unstack(server["slots"])
        for arrival, uplink in zip(round.arrivals, uplinks, strict=True):
            models[arrival.slot] = uplink["weights"]
        mean = tree.mean(models)
        slots = [mean] * len(models) if round.number < self.first_stage_rounds else self.crossed(models, round.number)
        return {"slots": tree.stack(slots), "weights": mean}

    def crossed(self, models: Sequence[Weights], number: int) -> list[Weights]:
        """Return alpha v_i + (1 - alpha) v_j for every model i."""
        if len(models) == 1:
            return list(models)
        shares = [self.alpha, 1 - self.alpha]
        others = self.collaborators(tree.cosines([model["params"] for model in models]), number)
        return [tree.mean([model, models[j]], shares) for model, j in zip(models, others, strict=True)]

    def collaborators(self, cosines: Tensor, number: int) -> list[int]:
        """Return the collaborator of each model in round `number`. `cosines` (m, m) contains the similarities of m > 1 models."""
        m = len(cosines)
        if self.collaborator == "in_order":
            return [(i + number % (m - 1) + 1) % m for i in range(m)]
        own = float("inf") if self.collaborator == "lowest" else -float("inf")
        others = cosines.clone().fill_diagonal_(own)
        found: list[int] = (others.argmin(1) if self.collaborator == "lowest" else others.argmax(1)).tolist()
        return found

    def server_logs(self, server: Tree, uplinks: Sequence[Tree], round: Round) -> Mapping[str, float]:
        """Return the mean pairwise cosine of the returned models' parameters."""
        models = [uplink["weights"]["params"] for uplink in uplinks]
        return {"slot_cosine": tree.mean_cosine(models)} if len(models) > 1 else {}

    def deploy(self, server: Tree, task: Task, round: Round) -> Downlink:
        """Return the mean of the returned models."""
        return Downlink({"weights": server["weights"]})
