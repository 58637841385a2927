"""FedMR: the server shuffles and recombines the layers of client models instead of averaging them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedloom import tree
from fedloom.errors import ConfigError
from fedloom.method import Combines, Downlink, Method, Paper, Round, Task
from fedloom.nets import units
from fedloom.ranges import Count, Fraction, Positive, Share, Whole
from fedloom.rng import Stream
from fedloom.tree import Tree, Weights

Unit = list[tuple[str, str]]  # tensors as (params|buffers, name)


@dataclass(frozen=True, kw_only=True)
class FedMR(Method):
    """FedMR (Hu et al., KDD 2024).

    Sent: A whole model is sent in both directions: a different one for each member of the cohort, but as many bytes as with FedAvg. Kept:
    Clients keep nothing between rounds.

    The server keeps one model (slot) per member of the cohort. In each round, it sends slot i to the i-th member. Then it shuffles every
    unit (a layer) of the returned models over the slots, with a separate permutation per unit (recombination). In the first
    `first_stage_rounds` rounds, it fills all slots with the average instead (the two-stage scheme). The model in use is the equal-weight
    mean of the slots, which recombination leaves unchanged. With `secure` (the paper's secure recombination), clients first shuffle their
    units among themselves.

    Differences from the released code: a unit is a layer, as in the paper (`unit=tensor` permutes every tensor separately, as the code
    does). If the client of a slot is lost, or a smaller cohort does not use the slot, the slot enters the recombination unchanged.
    """

    lr: Positive = 0.01
    momentum: Fraction = 0.5
    local_epochs: Count = 5
    unit: Literal["layer", "tensor", "block", "segment"] = "layer"
    """The unit that is shuffled as a whole: a layer's tensors, a single tensor, a block, or a segment of consecutive tensors."""
    segment: Share = 0.1
    """Size of a segment as a fraction of all tensors (with `unit=segment`)."""
    first_stage_rounds: Whole = 0
    """Number of rounds of plain averaging before recombination begins (T1)."""
    first_stage_patience: Whole = 0
    """Number of rounds without an increase of the returned models' similarity after which the first stage ends.

    With 0, it never ends early.
    """
    secure: bool = False
    """Whether clients exchange units before the upload, so that the server never sees one client's whole model."""

    combines: ClassVar[Combines] = "individual"
    paper: ClassVar[Paper] = Paper(
        "Is aggregation the only choice? Federated learning via layer-wise model recombination",
        "Hu, Yue, Xie, Chen, Huang, Wei, Lian, Liu, Chen",
        "KDD 2024",
        "https://arxiv.org/abs/2305.10730",
    )

    def __post_init__(self) -> None:
        """Raise ValueError if the patience is longer than the first stage."""
        super().__post_init__()
        if self.first_stage_patience > self.first_stage_rounds:
            raise ValueError(f"first_stage_patience={self.first_stage_patience}: must be at most first_stage_rounds")

    def init_server(self, weights: Weights, task: Task, round: Round) -> Tree:
        """Return K stacked slots, so every leaf is (K, ...).

        With patience, also return the best similarity and the number of rounds since then.
        """
        slots = {"slots": tree.stack([self.travelling(weights)] * task.max_cohort)}
        if not self.first_stage_patience:
            return slots
        return slots | {"stage": {"best": torch.tensor(-1.0, dtype=torch.float64), "rounds": torch.tensor(0)}}

    def downlink(self, server: Tree, cohort: Sequence[int], round: Round) -> Downlink:
        """Return slot i for the i-th member."""
        return Downlink(each=[{"weights": slot} for slot in tree.unstack(server["slots"])[: len(cohort)]])

    @property
    def exchanges(self) -> bool:
        """Whether the recombination is secure."""
        return self.secure

    def exchange(self, uplinks: Sequence[Tree], rng: Stream) -> Sequence[Tree]:
        """Shuffle units among the clients whose uplinks arrived, until no tree is one client's whole model (secure recombination)."""
        if not self.secure:
            return uplinks
        models = tree.stack([uplink["weights"] for uplink in uplinks])
        n, pieces = len(uplinks), self.units(models)
        if n < 2 or len(pieces) < 2:
            raise ConfigError(
                f"method.secure=true: needs at least two clients and two units per round, not {n} and {len(pieces)}"
            )
        orders = [torch.arange(n)] * len(pieces)
        while (torch.stack(orders) == orders[0]).all(0).any():
            orders = [rng.permutation(n) for _ in pieces]
        return [{"weights": model} for model in tree.unstack(_shuffled(models, pieces, orders))]

    def aggregate(self, server: Tree, uplinks: Sequence[Tree], round: Round) -> Tree:
        """Return the average in the first stage, and the recombined slots in the second stage."""
        slots, models = tree.unstack(server["slots"]), [uplink["weights"] for uplink in uplinks]
        if self.averages(server, round.number):
            return self.watched(server, models) | {"slots": tree.stack([tree.mean(models)] * len(slots))}
        for arrival, model in zip(round.arrivals, models, strict=True):
            slots[arrival.slot] = model
        return server | {"slots": self.recombine(tree.stack(slots), round.rng)}

    def averages(self, server: Tree, number: int) -> bool:
        """Return whether a round belongs to the first stage."""
        patient = not self.first_stage_patience or int(server["stage"]["rounds"]) < self.first_stage_patience
        return number < self.first_stage_rounds and patient

    def watched(self, server: Tree, models: Sequence[Weights]) -> Tree:
        """Return the server's state with updated patience: the best mean cosine of returned models, and the number of rounds since then."""
        if not self.first_stage_patience or len(models) < 2:
            return server
        best, now = server["stage"]["best"], tree.mean_cosine([model["params"] for model in models])
        waited = torch.zeros_like(server["stage"]["rounds"]) if now > best else server["stage"]["rounds"] + 1
        return server | {"stage": {"best": best.clamp(min=now), "rounds": waited}}

    def server_logs(self, server: Tree, uplinks: Sequence[Tree], round: Round) -> Mapping[str, float]:
        """Return the mean pairwise cosine of the returned models' parameters (`slot_cosine`) and of their updates (`update_cosine`)."""
        if len(uplinks) < 2:
            return {}
        slots = tree.unstack(server["slots"])
        models = [uplink["weights"]["params"] for uplink in uplinks]
        alike = {"slot_cosine": tree.mean_cosine(models)}
        if self.first_stage_patience:
            alike["first_stage"] = float(self.averages(server, round.number))
        if self.secure:  # the server cannot determine which slot a unit came from
            return alike
        moved = [tree.sub(m, slots[a.slot]["params"]) for m, a in zip(models, round.arrivals, strict=True)]
        return alike | {"update_cosine": tree.mean_cosine(moved)}

    def recombine(self, slots: Weights, rng: Stream) -> Weights:
        """Return the recombined slots: slot_i[u] <- slot_{pi_u(i)}[u], with an independent uniform permutation pi_u for every unit u."""
        n, pieces = len(tree.leaves(slots)[0]), self.units(slots)
        return _shuffled(slots, pieces, [rng.permutation(n) for _ in pieces])

    def units(self, weights: Weights) -> list[Unit]:
        """Return the groups of tensors that are moved together."""
        if self.unit != "segment":
            return units(weights, self.unit)
        tensors = [tensor for layer in units(weights, "layer") for tensor in layer]
        size = max(round(self.segment * len(tensors)), 1)
        return [tensors[start : start + size] for start in range(0, len(tensors), size)]

    def deploy(self, server: Tree, task: Task, round: Round) -> Downlink:
        """Return the equal-weight mean of the slots (w_glb)."""
        return Downlink({"weights": tree.mean(tree.unstack(server["slots"]))})


def _shuffled(models: Weights, pieces: Sequence[Unit], orders: Sequence[Tensor]) -> Weights:
    """Return the stacked models with each unit permuted in its own order."""
    order = {tensor: order for piece, order in zip(pieces, orders, strict=True) for tensor in piece}
    return {kind: {name: leaf[order[kind, name]] for name, leaf in part.items()} for kind, part in models.items()}
