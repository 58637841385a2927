"""CCVR: after FedAvg, the server calibrates the classifier on virtual features drawn from one Gaussian per class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedloom import losses, optim, tree
from fedloom.method import (
    Batch,
    Client,
    ClientData,
    Combines,
    Downlink,
    Method,
    Need,
    Paper,
    Phase,
    Round,
    Sweep,
    Task,
    Turn,
)
from fedloom.nets import Nets, select
from fedloom.ranges import Count, Positive
from fedloom.rng import Stream
from fedloom.tree import Tree, Weights

HEAD = ("model:head",)
AT_ONCE = 64  # number of virtual features per calibration step


@dataclass(frozen=True, kw_only=True)
class CCVR(Method):
    """CCVR (Luo et al., NeurIPS 2021): FedAvg with a classifier that is calibrated once, after training.

    Sent: In every round, the whole model is sent in both directions. After the last round, every client sends the counts, means and
    covariances of its features by class (about Y d^2 / 2 numbers). Kept: Clients keep nothing between rounds.

    The server merges the statistics of all clients, draws virtual features from one Gaussian per class, and trains the head on them. The
    body never changes. All rounds before the last one give the same numbers as FedAvg with the same seed, so the difference from FedAvg is
    the gain from the calibration.

    A class with one example has no covariance, so all its virtual features equal its mean. The paper does not specify the optimiser of the
    calibration; tune `calibration_lr` and `calibration_epochs` on validation examples. A client's memory contains about Y d^2 numbers, so
    use a small `width`.
    """

    virtual_features: Count = 200
    """Average number of virtual features per class."""
    sampling: Literal["proportional", "equal"] = "proportional"
    """Whether a class's number of virtual features is proportional to its number of examples, or the same for all classes."""
    calibration_lr: Positive = 0.01
    """Learning rate of the calibration (SGD)."""
    calibration_epochs: Count = 10
    """Number of passes over the virtual features."""

    also_travels: ClassVar[tuple[str, ...]] = ("counts", "means", "covariances")
    combines: ClassVar[Combines] = "individual"
    needs: ClassVar[tuple[Need, ...]] = ("classes", "vector", "head")
    paper: ClassVar[Paper] = Paper(
        "No fear of heterogeneity: Classifier calibration for federated learning with non-IID data",
        "Luo, Chen, Hu, Zhang, Liang, Feng",
        "NeurIPS 2021",
        "https://arxiv.org/abs/2106.05001",
    )

    def init_memory(self, weights: Weights, task: Task, data: ClientData) -> Tree:
        """Return zero counts (Y,), sums (Y, d) and sums of products (Y, d, d), in float64."""
        y, d = task.n_classes, task.width
        shapes = {"counts": (y,), "sums": (y, d), "products": (y, d, d)}
        return {"statistics": {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}}

    def init_server(self, weights: Weights, task: Task, round: Round) -> Tree:
        """Return the initial model. Its head is also the head in use."""
        return super().init_server(weights, task, round) | {"head": select(weights, HEAD)["params"]}

    def phases(self) -> tuple[Phase, ...]:
        """Return FedAvg's training phase, and a sweep that runs in the final exchange."""
        return *super().phases(), Sweep("statistics", self.statistics, when=self.closes)

    def closes(self, turn: Turn) -> bool:
        """Return whether this is the final exchange."""
        return turn.closing

    def statistics(self, nets: Nets, batch: Batch, total: Tree, down: Tree, memory: Tree) -> Tree:
        """Add a batch to the counts, sums and sums of products."""
        z = nets.model.body(batch.x).double()
        member = losses.one_hot(batch.y, len(total["counts"])).double()
        products = torch.einsum("byp,bq->ypq", member[:, :, None] * z[:, None], z)
        return tree.add(total, {"counts": member.sum(0), "sums": member.T @ z, "products": products})

    def uplink(self, client: Client, received: Weights, down: Tree, turn: Turn) -> tuple[Tree, Tree]:
        """Return the model. In the final exchange, return the counts (Y,), means (Y, d) and upper triangles of the covariances instead."""
        if not turn.closing:
            return super().uplink(client, received, down, turn)
        found = client.memory["statistics"]
        counts, means = found["counts"], found["sums"] / found["counts"].clamp(min=1)[:, None]
        outer = torch.einsum("yp,yq->ypq", means, means)
        spread = found["products"] - counts[:, None, None] * outer
        covariances = spread / (counts - 1).clamp(min=1)[:, None, None]
        rows, columns = torch.triu_indices(means.shape[1], means.shape[1])
        sent = {"counts": counts, "means": means, "covariances": covariances[:, rows, columns]}
        return {name: value.to(torch.get_default_dtype()) for name, value in sent.items()}, client.memory

    def uplink_fault(self, uplink: Tree, class_counts: Tensor | None) -> str:
        """Return a fault if a count is negative or exceeds the client's number of examples of that class."""
        if "counts" not in uplink:
            return ""
        if bool((uplink["counts"] < 0).any()):
            return "'counts' has a negative number"
        if class_counts is not None and bool((uplink["counts"] > class_counts).any()):
            return "'counts' has more examples of a class than the client has"
        return ""

    def aggregate(self, server: Tree, uplinks: Sequence[Tree], round: Round) -> Tree:
        """Return FedAvg's model. Its head is in use until the calibration."""
        new = super().aggregate(server, uplinks, round)
        return new | {"head": select(new["weights"], HEAD)["params"]}

    def finish(self, server: Tree, uplinks: Sequence[Tree], round: Round) -> Tree:
        """Return the server's state with the calibrated head as the head in use."""
        z, y = self.virtual(*self.merged(uplinks), round.rng.child("features"))
        nets, head = round.nets(server["weights"]), select(server["weights"], HEAD)["params"]
        if not len(y):
            return server

        def loss(head: dict[str, Tensor], z: Tensor, y: Tensor) -> Tensor:
            return losses.cross_entropy(nets.with_params(head).model.head(z), y)

        batches = optim.minibatches((z, y), AT_ONCE, self.calibration_epochs, round.rng)
        head, _ = optim.fit(loss, head, optim.sgd(self.calibration_lr), batches)
        return server | {"head": head}

    def merged(self, uplinks: Sequence[Tree]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the counts (Y,), means (Y, d) and covariances (Y, d, d) of all clients' features, in float64.

        The covariances follow from the law of total covariance.
        """
        counts, local, triangles = (
            torch.stack([uplink[name].double() for uplink in uplinks]) for name in ("counts", "means", "covariances")
        )
        total, d = counts.sum(0), local.shape[2]
        means = torch.einsum("ky,kyp->yp", counts, local) / total.clamp(min=1)[:, None]
        rows, columns = torch.triu_indices(d, d)
        within = local.new_zeros(*triangles.shape[:2], d, d)
        within[:, :, rows, columns] = within[:, :, columns, rows] = triangles
        away = local - means
        spread = torch.einsum("ky,kypq->ypq", (counts - 1).clamp(min=0), within)
        spread += torch.einsum("ky,kyp,kyq->ypq", counts, away, away)
        return total, means, spread / (total - 1).clamp(min=1)[:, None, None]

    def virtual(self, counts: Tensor, means: Tensor, covariances: Tensor, rng: Stream) -> tuple[Tensor, Tensor]:
        """Draw virtual features (n, d) and labels (n,) of the classes that have examples."""
        held = counts > 0
        share = counts / counts.sum().clamp(min=1) if self.sampling == "proportional" else held / len(held)
        sizes = torch.where(held, (self.virtual_features * len(held) * share).round().clamp(min=1), 0).long()
        features, labels = [means.new_zeros(0, means.shape[1])], sizes.new_zeros(0)
        for y in held.nonzero()[:, 0].tolist():
            values, vectors = torch.linalg.eigh(covariances[y])
            noise = rng.normal((int(sizes[y]), means.shape[1])).double()
            features.append(
                means[y] + noise * values.clamp(min=0).sqrt() @ vectors.T
            )  # rounding can make them negative
            labels = torch.cat([labels, torch.full((int(sizes[y]),), y)])
        return torch.cat(features).to(torch.get_default_dtype()), labels

    def deploy(self, server: Tree, task: Task, round: Round) -> Downlink:
        """Return the model with the head in use."""
        return Downlink({"weights": tree.merge(server["weights"], {"params": server["head"]})})
