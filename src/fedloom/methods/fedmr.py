"""FedMR: the server shuffles and recombines the layers of client models instead of averaging them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from fedloom import tree
from fedloom.method import Downlink, Method, Paper, Round, Task
from fedloom.nets import units
from fedloom.rng import Stream
from fedloom.tree import Tree, Weights


@dataclass(frozen=True)
class FedMR(Method):
    """FedMR (Hu et al., KDD 2024).

    Travels: a whole model, both ways, a different one to each member of the cohort; as many bytes as FedAvg. Stays: nothing.
    The server keeps as many models (slots) as a cohort has members. Each round sends slot i to the i-th member; then every unit
    (a layer) of the returned models is shuffled over the slots by a permutation of its own (recombination). The first
    `first_stage_rounds` rounds fill all slots with the average instead (the two-stage scheme).
    The model in use is the equal-weight mean of the slots, which recombination leaves unchanged.

    Differences from the released code: a unit is a layer, as the paper says (`unit=tensor` permutes every tensor on its own, as the code
    does). A slot whose client is lost, or that a smaller cohort does not use, goes into the recombination as it is.
    """

    lr: float = 0.01
    momentum: float = 0.5
    local_epochs: int = 5
    unit: Literal["layer", "tensor", "block", "segment"] = "layer"
    """What is shuffled as one piece: the tensors of a layer, single tensors, blocks, or segments of consecutive tensors."""
    segment: float = 0.1
    """The size of a segment as a part of all tensors (with `unit=segment`)."""
    first_stage_rounds: int = 0
    """Rounds of plain averaging before recombination begins (T1)."""

    paper: ClassVar[Paper] = Paper(
        "Is aggregation the only choice? Federated learning via layer-wise model recombination",
        "Hu, Yue, Xie, Chen, Huang, Wei, Lian, Liu, Chen",
        "KDD 2024",
        "https://arxiv.org/abs/2305.10730",
    )

    def __post_init__(self) -> None:
        """Check what is FedMR's own."""
        super().__post_init__()
        if not 0 < self.segment <= 1:
            raise ValueError(f"segment={self.segment}: must be above 0 and at most 1")
        if self.first_stage_rounds < 0:
            raise ValueError(f"first_stage_rounds={self.first_stage_rounds}: must be at least 0")

    def init_server(self, weights: Weights, task: Task) -> Tree:
        """K slots, stacked: every leaf is (K, ...)."""
        return {"slots": tree.stack([self.travelling(weights)] * task.max_cohort)}

    def downlink(self, server: Tree, cohort: Sequence[int]) -> Downlink:
        """Slot i to the i-th member."""
        return Downlink(each=[{"weights": slot} for slot in tree.unstack(server["slots"])[: len(cohort)]])

    def aggregate(self, server: Tree, uplinks: Sequence[Tree], round: Round) -> Tree:
        """Average in the first stage, recombine in the second."""
        slots = tree.unstack(server["slots"])
        if round.number < self.first_stage_rounds:
            return {"slots": tree.stack([tree.mean([uplink["weights"] for uplink in uplinks])] * len(slots))}
        for arrival, uplink in zip(round.arrivals, uplinks, strict=True):
            slots[arrival.slot] = uplink["weights"]
        return {"slots": self.recombine(tree.stack(slots), round.rng)}

    def server_logs(self, server: Tree, uplinks: Sequence[Tree], round: Round) -> Mapping[str, float]:
        """Mean pairwise cosine of the returned models' parameters (`slot_cosine`), and of what each moved by (`update_cosine`)."""
        if len(uplinks) < 2:
            return {}
        slots = tree.unstack(server["slots"])
        models = [uplink["weights"]["params"] for uplink in uplinks]
        moved = [tree.sub(m, slots[a.slot]["params"]) for m, a in zip(models, round.arrivals, strict=True)]
        return {"slot_cosine": tree.mean_cosine(models), "update_cosine": tree.mean_cosine(moved)}

    def recombine(self, slots: Weights, rng: Stream) -> Weights:
        """slot_i[u] <- slot_{pi_u(i)}[u] with an independent uniform permutation pi_u for every unit u."""
        mixed: Weights = {"params": {}, "buffers": {}}
        n = len(tree.leaves(slots)[0])
        for unit in self.units(slots):
            order = rng.permutation(n)
            for kind, name in unit:
                mixed[kind][name] = slots[kind][name][order]
        return mixed

    def units(self, weights: Weights) -> list[list[tuple[str, str]]]:
        """The pieces that stay together, as (params|buffers, name)."""
        if self.unit != "segment":
            return units(weights, self.unit)
        tensors = [tensor for layer in units(weights, "layer") for tensor in layer]
        size = max(round(self.segment * len(tensors)), 1)
        return [tensors[start : start + size] for start in range(0, len(tensors), size)]

    def deploy(self, server: Tree, task: Task) -> Downlink:
        """The equal-weight mean of the slots (w_glb)."""
        return Downlink({"weights": tree.mean(tree.unstack(server["slots"]))})
