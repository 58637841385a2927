"""FedRIR with matched class moments: f_g has the same mean and variance within a class on every client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedloom import losses
from fedloom.method import Batch, Client, ClientData, Combines, Downlink, Need, Phase, Round, Sweep, Task, Turn
from fedloom.methods import feature_statistics
from fedloom.methods.fedrir import FedRIR
from fedloom.nets import Nets
from fedloom.ranges import Positive
from fedloom.tree import Tree, Weights

LEAST = 1e-2


@dataclass(frozen=True, kw_only=True)
class FedRIRMoments(FedRIR):
    """FedRIR with a term against factors that are constant within a client, such as its camera. This term is not part of the paper.

    Information terms compare only examples of the same client, so they cannot detect such a factor. But if f_g encodes the factor, the
    features of one class differ between clients. Every client therefore sends the mean and the variance of f_g for each class. Stage 2
    pulls the moments of each class in a batch towards the moments of the federation.

    Sent: In addition to gfe, the number of examples, the mean (D) and the variance (D) of each class are sent in both directions.
    """

    moment_weight: Positive = 1.0
    """Weight of the distance between the moments of f_g in a batch and those of the federation."""

    also_travels: ClassVar[tuple[str, ...]] = ("moments",)
    combines: ClassVar[Combines] = "individual"
    needs: ClassVar[tuple[Need, ...]] = (*FedRIR.needs, "classes")

    @property
    def needed(self) -> frozenset[Need]:
        """FedRIR's requirements, and class labels."""
        return super().needed | {"classes"}

    def init_memory(self, weights: Weights, task: Task, data: ClientData) -> Tree:
        """Return zero counts, sums and squares of f_g by class."""
        return {"moments": feature_statistics.zeros("class", task.n_classes, task.width)}

    def init_server(self, weights: Weights, task: Task, round: Round) -> Tree:
        """Return FedRIR's weights, and zero counts (Y,), means and variances (Y, D). A class with count 0 has no moments yet."""
        means = torch.zeros(task.n_classes, task.width)
        moments = {"counts": torch.zeros(task.n_classes), "means": means, "variances": means.clone()}
        return super().init_server(weights, task, round) | {"moments": moments}

    def downlink(self, server: Tree, cohort: Sequence[int], round: Round) -> Downlink:
        """Return gfe and the moments."""
        return Downlink(dict(server))

    def phases(self) -> tuple[Phase, ...]:
        """Return FedRIR's phases, and a sweep that collects the moments."""
        return (*super().phases(), Sweep("moments", self.collect))

    def collect(self, nets: Nets, batch: Batch, total: Tree, down: Tree, memory: Tree) -> Tree:
        """Add a batch to the statistics of f_g."""
        return feature_statistics.add_features(total, nets.gfe(batch.x), batch.y, "class")

    def loss_of(
        self, features: Mapping[str, Tensor], nets: Nets, batch: Batch, down: Tree
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return FedRIR's loss plus moment_weight times the distance of the moments."""
        error, logs = super().loss_of(features, nets, batch, down)
        distance = moment_distance(features["f_g"], batch.y, down["moments"])
        return error + self.moment_weight * distance, {**(logs or {"cross_entropy": error}), "moments": distance}

    def uplink(self, client: Client, received: Weights, down: Tree, turn: Turn) -> tuple[Tree, Tree]:
        """Return gfe and the moments of the client's own examples."""
        sent, memory = super().uplink(client, received, down, turn)
        found, dtype = client.memory["moments"], down["moments"]["means"].dtype
        means = found["sums"] / found["counts"].clamp(min=1)[:, None]
        moments = {"counts": found["counts"], "means": means, "variances": feature_statistics.within(found, "class")}
        return sent | {"moments": {name: value.to(dtype) for name, value in moments.items()}}, memory

    def uplink_fault(self, uplink: Tree, class_counts: Tensor | None) -> str:
        """Return a fault if a count is negative, not an integer or too large, or if a variance is negative."""
        counts: Tensor = uplink["moments"]["counts"]
        if bool(((counts < 0) | (counts != counts.round())).any()):
            return "'moments/counts' has a number that is negative or not an integer"
        if class_counts is not None and bool((counts > class_counts).any()):
            return "'moments/counts' has more examples of a class than the client has"
        return feature_statistics.variance_fault(uplink["moments"]["variances"], "class")

    def aggregate(self, server: Tree, uplinks: Sequence[Tree], round: Round) -> Tree:
        """Return the mean of gfe, and the moments of all examples of the cohort. A class that no member has keeps its moments."""
        after = super().aggregate(server, uplinks, round)
        counts, means, variances = (
            torch.stack([up["moments"][name] for up in uplinks]) for name in ("counts", "means", "variances")
        )
        seen = (counts.sum(0) > 0)[:, None]
        mean = ((counts / counts.sum(0).clamp(min=1))[:, :, None] * means).sum(0)
        variance = feature_statistics.total_variance(variances, means, mean, counts, "class")
        old = server["moments"]
        after["moments"] = {
            "counts": torch.where(seen[:, 0], counts.sum(0), old["counts"]),
            "means": torch.where(seen, mean, old["means"]),
            "variances": torch.where(seen, variance, old["variances"]),
        }
        return after


def moment_distance(features: Tensor, labels: Tensor, moments: Tree) -> Tensor:
    """Return the mean distance, over the examples, between the moments of a class in the batch and those in the federation.

    For a class with mean m and standard deviation s in the batch, and M and S in the federation, the distance is the mean over features of
    (m - M)^2 + (s - S)^2, divided by the mean over features of S^2. It is 0 for classes without moments or with one example in the batch.
    LEAST times that mean is added to every variance, because a standard deviation of 0 has no gradient.

    Args:
        features: features (B, D).
        labels: classes (B,).
        moments: `counts` (Y,), and `means` and `variances` (Y, D).
    """
    features = losses.wide(features)
    away, variance = losses.within_classes(features, labels)
    mean, target = features - away, moments["variances"][labels].to(features.dtype)
    counted = (moments["counts"][labels] > 0) & ((labels[:, None] == labels).sum(1) > 1)
    scale = target.mean(1).clamp(min=1e-6)
    off_mean = (mean - moments["means"][labels]).square().mean(1)
    least = LEAST * scale[:, None]
    off_spread = ((variance + least).sqrt() - (target + least).sqrt()).square().mean(1)
    distance: Tensor = (counted * (off_mean + off_spread) / scale).mean()
    return distance
