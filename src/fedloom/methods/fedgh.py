"""FedGH: the server trains one head for all clients on the class means of their features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedloom import optim
from fedloom.method import (
    Architecture,
    Batch,
    Client,
    ClientData,
    Combines,
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
from fedloom.methods.fedproto import body_and_head
from fedloom.nets import Nets
from fedloom.ranges import Count, NonNegative
from fedloom.tree import Tree, Weights


@dataclass(frozen=True)
class FedGH(Method):
    """FedGH (Yi et al., ACM MM 2023): heterogeneous bodies with a generalised global header.

    Sent: The downlink contains the head. The uplink contains the mean features of each class, and the number of examples per class. Kept:
    Each client keeps its body. Bodies may have different architectures, but must have the same number of features.

    A client trains its body and the received head together, and then computes the mean features of each of its classes, in evaluation
    mode. It discards its trained head. The server trains the head with the cross-entropy on these means, with one example for each client
    and class; it uses the numbers of examples only to determine which classes a client has. A client is scored with its body and the
    received head, before it trains.

    Differences from the released code: in the released code, the server's optimiser updates the net of the last client, so the global head
    keeps its initial values. Means are means of batch means, and clients are scored after training, with their own head. The released
    momentum (0.9), weight decay (0.001) and clipping of gradients (50) are not defaults here. HtFLlib's server uses batches of 10.
    """

    server_lr: NonNegative = 0.01
    """Learning rate of the head on the server (SGD). With 0, the head does not change."""
    server_epochs: Count = 1
    """Number of passes over the class means in a round."""
    server_batch: Count = 1
    """Number of class means in each step on the server."""

    shared: ClassVar[tuple[str, ...]] = ("head",)
    also_travels: ClassVar[tuple[str, ...]] = ("prototypes", "counts")
    combines: ClassVar[Combines] = "individual"
    needs: ClassVar[tuple[Need, ...]] = ("classes", "vector", "head")
    paper: ClassVar[Paper] = Paper(
        "FedGH: Heterogeneous federated learning with generalized global header",
        "Yi, Wang, Liu, Shi, Yu",
        "ACM MM 2023",
        "https://arxiv.org/abs/2303.13137",
    )

    def nets(self, arch: Architecture, task: Task) -> dict[str, nn.Module]:
        """Return an architecture's body and head. Raise ConfigError if the numbers of features of bodies differ."""
        return body_and_head(arch, task)

    def init_memory(self, weights: Weights, task: Task, data: ClientData) -> Tree:
        """Return zero counts (Y,) and sums of features (Y, D) by class."""
        return {"statistics": feature_statistics.no_sums(task.n_classes, task.width)}

    def phases(self) -> tuple[Phase, ...]:
        """Return the phase that trains body and head, and a sweep that collects the features of the trained body."""
        train = Train("train", self.loss, ("body", "head"), self.local_optimizer(), epochs=self.local_epochs)
        return train, Sweep("statistics", self.collect)

    def loss(self, nets: Nets, batch: Batch, down: Tree, memory: Tree) -> Tensor:
        """Return the cross-entropy of body and head."""
        return nets.loss(nets.head(nets.body(batch.x)), batch.y)

    def collect(self, nets: Nets, batch: Batch, total: Tree, down: Tree, memory: Tree) -> Tree:
        """Add the features of a batch to the counts and sums."""
        return feature_statistics.add_sums(total, nets.body(batch.x), batch.y)

    def uplink(self, client: Client, received: Weights, down: Tree, turn: Turn) -> tuple[Tree, Tree]:
        """Return the mean features (C_k, D) of the client's classes, in the order of the classes, and the counts (Y,) of all classes."""
        found, dtype = client.memory["statistics"], received["params"]["head.weight"].dtype
        prototypes = feature_statistics.held_means(found, dtype)
        return {"prototypes": prototypes, "counts": found["counts"].to(dtype)}, client.memory

    def ragged(self, uplink: Tree) -> Mapping[str, int]:
        """Return the number of the client's classes, each of which has one mean."""
        return {"prototypes": int((uplink["counts"] > 0).sum())}

    def uplink_fault(self, uplink: Tree, class_counts: Tensor | None) -> str:
        """Return a message if a count is negative, is not an integer, or exceeds the client's number of examples of that class.

        Return an empty string otherwise.
        """
        return feature_statistics.count_fault(uplink["counts"], class_counts)

    def aggregate(self, server: Tree, uplinks: Sequence[Tree], round: Round) -> Tree:
        """Return the head after training on the means in the uplinks."""
        rows = torch.cat([uplink["prototypes"] for uplink in uplinks])
        labels = torch.cat([(uplink["counts"] > 0).nonzero()[:, 0] for uplink in uplinks])
        nets = round.nets(server["weights"])

        def loss(head: dict[str, Tensor], z: Tensor, y: Tensor) -> Tensor:
            return nets.loss(nets.with_params(head).head(z), y)

        batches = optim.minibatches((rows, labels), self.server_batch, self.server_epochs, round.rng)
        head, _ = optim.fit(loss, server["weights"]["params"], optim.sgd(self.server_lr), batches)
        return {"weights": {**server["weights"], "params": head}}

    def predictors(self) -> dict[str, Predictor]:
        """Return the client's body with the received head. There is no server model, because the server has no body."""
        return {"personal": self.predict}

    def predict(self, nets: Nets, x: Any, down: Tree, memory: Tree) -> Tensor:
        """Return the logits (B, Y)."""
        logits: Tensor = nets.head(nets.body(x))
        return logits
