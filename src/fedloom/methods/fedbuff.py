"""FedBuff: the server collects changes in a buffer as they arrive, and takes a step when the buffer is full."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedloom import tree
from fedloom.method import Combines, Method, Paper, Round, Task
from fedloom.ranges import Count, Positive
from fedloom.tree import Tree, Weights

log = logging.getLogger(__name__)
REMEMBERED = 100  # rounds; an older uplink counts as if it had been sent in the earliest of them


@dataclass(frozen=True)
class FedBuff(Method):
    """FedBuff (Nguyen et al., AISTATS 2022, algorithm 1): buffered asynchronous aggregation.

    Sent: The whole model is sent in both directions. Kept: Clients keep nothing between rounds.

    When a change D_k arrives, the server adds D_k / sqrt(1 + s_k) to a buffer. The staleness s_k is the number of the server's steps
    since it sent the model to the client. When the buffer contains `buffer_size` changes, the server adds server_lr / buffer_size times
    their sum to the model, and empties the buffer. Clients have equal weights. A round may contain several steps or none. If the buffer
    contains exactly the uplinks of one round, and none is late, the method is FedAvg with equal weights.

    With `devices.stragglers=late`, slow clients arrive some rounds later. Within a round, changes are added in the order of the cohort,
    and then the late ones. The released code (FLSim) does not divide by the buffer's size, and at the end of an epoch it empties a buffer
    that is not full. Running statistics are averaged over the buffer with weights 1 / sqrt(1 + s_k).
    """

    buffer_size: Count = 10
    """Number of changes in a full buffer (the paper's K)."""
    server_lr: Positive = 1.0
    """The server's step size (the paper's global eta)."""

    accepts_late: ClassVar[bool] = True
    combines: ClassVar[Combines] = "individual"
    paper: ClassVar[Paper] = Paper(
        "Federated learning with buffered asynchronous aggregation",
        "Nguyen, Malik, Zhan, Yousefpour, Rabbat, Malek, Huba",
        "AISTATS 2022",
        "https://arxiv.org/abs/2106.06639",
    )

    def init_server(self, weights: Weights, task: Task, round: Round) -> Tree:
        """Return the model, an empty buffer, the number of the next round, and `steps` (REMEMBERED,), which are 0.

        `steps` contains the numbers of the server's steps before the next round and before each earlier round.
        """
        most = task.rounds * task.max_cohort
        if most < self.buffer_size:
            warn_once(self.buffer_size, most)
        server, none = super().init_server(weights, task, round), torch.zeros(REMEMBERED, dtype=torch.int64)
        return server | {"buffer": empty(server["weights"]), "steps": none, "next": none[0].clone()}

    def aggregate(self, server: Tree, uplinks: Sequence[Tree], round: Round) -> Tree:
        """Add each change to the buffer, and take a step whenever it is full."""
        x, buffer, n_steps = server["weights"], server["buffer"], int(server["steps"][0])
        history = self.history(server, round)
        for arrival, uplink in zip(round.arrivals, uplinks, strict=True):
            scale = (1 + n_steps - history[arrival.age]) ** -0.5
            moved = tree.sub(uplink["weights"]["params"], server["weights"]["params"])
            buffer = {
                "changes": tree.add(buffer["changes"], moved, scale),
                "statistics": tree.add(buffer["statistics"], doubled(uplink["weights"]["buffers"]), scale),
                "scales": buffer["scales"] + scale,
                "held": buffer["held"] + 1,
            }
            if int(buffer["held"]) == self.buffer_size:
                x, buffer, n_steps = self.step(x, buffer), empty(x), n_steps + 1
        steps = torch.tensor([n_steps, *history][:REMEMBERED])
        return {"weights": x, "buffer": buffer, "steps": steps, "next": torch.tensor(round.number + 1)}

    def history(self, server: Tree, round: Round) -> list[int]:
        """Return the number of the server's steps before this round and before each earlier round, back to that of the oldest uplink."""
        steps: list[int] = server["steps"].tolist()
        skipped = round.number - int(server["next"])  # rounds without an uplink
        oldest = max(arrival.age for arrival in round.arrivals)
        return [steps[0]] * skipped + steps + steps[-1:] * oldest

    def step(self, x: Weights, buffer: Tree) -> Weights:
        """Return the model after a step with the full buffer."""
        means = tree.map_tree(lambda total: total / buffer["scales"], buffer["statistics"])
        buffers = tree.map_tree(
            lambda mean, old: mean.to(old.dtype) if old.is_floating_point() else mean.round().to(old.dtype),
            means,
            x["buffers"],
        )
        return {
            "params": tree.add(x["params"], buffer["changes"], self.server_lr / self.buffer_size),
            "buffers": buffers,
        }

    def server_logs(self, server: Tree, uplinks: Sequence[Tree], round: Round) -> Mapping[str, float]:
        """Return the number of steps before the round, the number of changes in the buffer, and the mean staleness of the uplinks."""
        history = self.history(server, round)
        late = [history[0] - history[arrival.age] for arrival in round.arrivals]
        held = float(server["buffer"]["held"])
        return {"steps": float(history[0]), "held": held, "staleness": sum(late) / len(late)}


@functools.cache  # the state is also created to count costs
def warn_once(buffer_size: int, most: int) -> None:
    """Log that a run with at most `most` uplinks never fills the buffer."""
    what = "the run has at most %d uplinks, so the model never changes; use a smaller buffer or more rounds"
    log.warning(f"method.buffer_size=%d: {what}", buffer_size, most)


def empty(weights: Weights) -> Tree:
    """Return a buffer without changes."""
    return {
        "changes": tree.zeros_like(weights["params"]),
        "statistics": tree.zeros_like(doubled(weights["buffers"])),
        "scales": torch.zeros((), dtype=torch.float64),
        "held": torch.zeros((), dtype=torch.int64),
    }


def doubled(buffers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return running statistics, including counters, as float64."""
    return {name: value.double() for name, value in buffers.items()}
