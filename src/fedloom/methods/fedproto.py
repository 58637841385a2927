"""FedProto: clients exchange the mean features of their classes instead of weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fedloom import losses, tree
from fedloom.errors import ConfigError
from fedloom.method import (
    Architecture,
    Batch,
    Client,
    ClientData,
    Combines,
    Downlink,
    Logs,
    Method,
    Need,
    Paper,
    Phase,
    Predictor,
    Round,
    Sweep,
    Task,
    Train,
    Turn,
)
from fedloom.methods import feature_statistics
from fedloom.nets import Nets
from fedloom.ranges import NonNegative
from fedloom.tree import Tree, Weights


def body_and_head(arch: Architecture, task: Task) -> dict[str, nn.Module]:
    """Return an architecture's body and head. Raise ConfigError if its number of features differs from that of the first architecture."""
    if arch.features != task.width:
        raise ConfigError(
            f"models: {arch.name} has {arch.features} features, but another architecture has {task.width}; "
            "set one width for all, such as width=64"
        )
    return {"body": arch.body(), "head": arch.head()}


@dataclass(frozen=True, kw_only=True)
class FedProto(Method):
    """FedProto (Tan et al., AAAI 2022): prototypes couple models of different architectures that have the same feature width.

    There are two nets: `body` outputs features z (B, p), and `head` outputs logits. A client's prototypes (C_k, p) are the mean features
    of the C_k classes of its examples. The server averages the prototypes class by class.

    Sent: Prototypes and counts (Y,) are sent in both directions. Kept: Each client keeps all its weights. A client predicts the class of
    the nearest global prototype, among the classes that have one.
    """

    prototype_weight: NonNegative = 1.0
    """Weight lambda of the mean squared distance between an example's features and the global prototype of its class."""
    prototype_mean: Literal["weighted", "uniform"] = "weighted"
    """Weight of a client in a class's mean: its number of examples of the class, or the same for all clients that have the class."""

    predict_by: Literal["prototypes", "own_prototypes", "head"] = "prototypes"
    """How a client predicts: the nearest global prototype, the nearest one of its own classes (released code), or its own head."""

    shared: ClassVar[tuple[str, ...]] = ()
    also_travels: ClassVar[tuple[str, ...]] = ("prototypes", "counts")
    combines: ClassVar[Combines] = "sums"
    needs: ClassVar[tuple[Need, ...]] = ("classes", "vector", "head")
    paper: ClassVar[Paper] = Paper(
        "FedProto: Federated prototype learning across heterogeneous clients",
        "Tan, Long, Liu, Zhou, Lu, Jiang, Zhang",
        "AAAI 2022",
        "https://arxiv.org/abs/2105.00243",
    )

    def nets(self, arch: Architecture, task: Task) -> dict[str, nn.Module]:
        """Return an architecture's body and head. All bodies must have the same number of features."""
        return body_and_head(arch, task)

    def init_memory(self, weights: Weights, task: Task, data: ClientData) -> Tree:
        """Return zero counts (Y,) and sums of features (Y, p) by class, in float64."""
        return {"statistics": feature_statistics.no_sums(task.n_classes, task.width)}

    def init_server(self, weights: Weights, task: Task, round: Round) -> Tree:
        """Return zero prototypes (Y, p) and example counts (Y,). A class with count 0 has no prototype yet."""
        return {"prototypes": torch.zeros(task.n_classes, task.width), "counts": torch.zeros(task.n_classes)}

    def downlink(self, server: Tree, cohort: Sequence[int], round: Round) -> Downlink:
        """Return all prototypes and counts."""
        return Downlink(dict(server))

    def phases(self) -> tuple[Phase, ...]:
        """Return a training phase, and a sweep that collects the prototypes of the trained body."""
        train = Train("train", self.loss, ("body", "head"), self.local_optimizer(), epochs=self.local_epochs)
        return train, Sweep("statistics", self.statistics)

    def loss(self, nets: Nets, batch: Batch, down: Tree, memory: Tree) -> tuple[Tensor, Logs]:
        """Return the cross-entropy plus prototype_weight times the distance to the prototypes, which is 0 for
        examples without a prototype.
        """
        features = nets.body(batch.x)
        error = nets.loss(nets.head(features), batch.y)
        known = down["counts"][batch.y] > 0
        distance = (known * self.distance(features, batch.y, down)).mean()
        return error + self.prototype_weight * distance, {"cross_entropy": error, "distance": distance}

    def distance(self, features: Tensor, labels: Tensor, down: Tree) -> Tensor:
        """Return the mean squared distance per feature between the features (B, p) and the prototypes of their
        classes, as a tensor (B,).
        """
        away: Tensor = features - down["prototypes"][labels]
        return away.square().mean(1)

    def statistics(self, nets: Nets, batch: Batch, total: Tree, down: Tree, memory: Tree) -> Tree:
        """Add a batch to the counts and sums."""
        return feature_statistics.add_sums(total, nets.body(batch.x), batch.y)

    def uplink(self, client: Client, received: Weights, down: Tree, turn: Turn) -> tuple[Tree, Tree]:
        """Return the prototypes of the client's classes (C_k, p), in the order of the classes, and the counts of all classes (Y,)."""
        found, dtype = client.memory["statistics"], down["prototypes"].dtype
        prototypes = feature_statistics.held_means(found, dtype)
        return {"prototypes": prototypes, "counts": found["counts"].to(dtype)}, client.memory

    def ragged(self, uplink: Tree) -> Mapping[str, int]:
        """Return the number of the client's classes as the length of `prototypes`."""
        return {"prototypes": int((uplink["counts"] > 0).sum())}

    def uplink_fault(self, uplink: Tree, class_counts: Tensor | None) -> str:
        """Return a fault if a count is negative, is not an integer, or exceeds the client's number of examples of that class."""
        return feature_statistics.count_fault(uplink["counts"], class_counts)

    def sums(self, uplink: Tree) -> Tree:
        """Return counts (Y,) and weighted class means (Y, p) in float64; the means are 0 for classes that the client does not hold.

        If clients have equal weights, also return 1 or 0 (Y,) for whether the client holds the class.
        """
        _, local = self.gathered([uplink])
        weights = self.weights_of([uplink])[0].double()
        found = {"counts": uplink["counts"].double(), "sums": weights[:, None] * local[0].double()}
        return found if self.prototype_mean == "weighted" else found | {"held": weights}

    def from_sums(self, total: Tree, n: int) -> Tree:
        """Return the mean prototypes of the classes whose weight is at least 1/2 (noise may have been added), and
        the counts divided by n.
        """
        weights = self.total_weights(total)
        held = weights > 0
        return {"prototypes": total["sums"][held] / weights[held, None], "counts": total["counts"] * held / n}

    def total_weights(self, total: Tree) -> Tensor:
        """Return the total weight of each class (Y,). It is 0 for classes whose weight or count is below 1/2."""
        counts: Tensor = total["counts"]
        weights: Tensor = total.get("held", counts)
        return weights * ((weights >= 0.5) & (counts >= 0.5))

    def aggregate(self, server: Tree, uplinks: Sequence[Tree], round: Round) -> Tree:
        """Return the mean prototypes, class by class. A class that no client of the cohort has keeps its prototype."""
        shares, local = self.gathered(uplinks)
        seen = shares.sum(0) > 0
        prototypes = torch.where(seen[:, None], (shares[:, :, None] * local).sum(0), server["prototypes"])
        counts = torch.stack([up["counts"] for up in uplinks]).sum(0)
        return {"prototypes": prototypes, "counts": torch.where(seen, counts, server["counts"])}

    def server_logs(self, server: Tree, uplinks: Sequence[Tree], round: Round) -> Mapping[str, float]:
        """Return `prototype_cosine`, the mean cosine of two clients' prototypes of the same class.

        The mean is over the classes that two or more clients hold.
        """
        _, local = self.gathered(uplinks)
        held = torch.stack([up["counts"] > 0 for up in uplinks])
        by_class = [[{"prototype": p} for p in local[held[:, y], y]] for y in range(held.shape[1])]
        cosines = [tree.mean_cosine(prototypes) for prototypes in by_class if len(prototypes) > 1]
        return {"prototype_cosine": sum(cosines) / len(cosines)} if cosines else {}

    def gathered(self, uplinks: Sequence[Tree]) -> tuple[Tensor, Tensor]:
        """Return each client's weight in each class (K, Y), whose sum over clients is 1 or 0, and its prototypes
        (K, Y, p), or 0 if it has none.
        """
        weights = self.weights_of(uplinks)
        local = uplinks[0]["prototypes"].new_zeros(*weights.shape, uplinks[0]["prototypes"].shape[1])
        for mine, up in zip(local, uplinks, strict=True):
            mine[up["counts"] > 0] = up["prototypes"]
        return weights / weights.sum(0).clamp(min=1), local

    def weights_of(self, uplinks: Sequence[Tree]) -> Tensor:
        """Return each client's unnormalised weight in each class (K, Y)."""
        counts = torch.stack([up["counts"] for up in uplinks])
        return counts if self.prototype_mean == "weighted" else (counts > 0).to(counts.dtype)

    def predictors(self) -> dict[str, Predictor]:
        """Return a client's predictor, which chooses the nearest prototype. There is no server model."""
        return {"personal": self.predict}

    def predict(self, nets: Nets, x: Tensor, down: Tree, memory: Tree) -> Tensor:
        """Return the logits, or the negative distances to the global prototypes (B, Y); a class without a prototype is never chosen."""
        if self.predict_by == "head":
            logits: Tensor = nets.head(nets.body(x))
            return logits
        features, known = losses.wide(nets.body(x)), down["counts"] > 0
        if self.predict_by == "own_prototypes":
            known = known & (memory["statistics"]["counts"] > 0)
        distance = (features[:, None] - down["prototypes"].to(features.dtype)).norm(dim=2)
        return torch.where(known, -distance, torch.finfo(features.dtype).min)
