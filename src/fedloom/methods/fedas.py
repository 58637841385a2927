"""FedAS: clients align the received body with their own features, and the server weights bodies by their Fisher information."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from fedloom import losses, optim, tree
from fedloom.inputs import map_inputs
from fedloom.method import Batch, Client, ClientData, Combines, Need, Paper, Phase, Round, Sweep, Task, Train, Turn
from fedloom.methods.fedper import FedPer
from fedloom.nets import Nets
from fedloom.ranges import Count, NonNegative
from fedloom.tree import Tree, Weights


@dataclass(frozen=True, kw_only=True)
class FedAS(FedPer):
    """FedAS (Yang, Huang, Ye; CVPR 2024): bridging inconsistency in personalised federated learning.

    Sent: The uplink contains the body and a number F. The downlink contains the mean body, weighted by F. Kept: Each client keeps its
    head, and its prototypes: the mean features of each of its classes, computed with the body that it has trained.

    A local update has three parts:

    1. It aligns the received body. On each batch, it minimises the sum over classes of the mean squared difference per feature between
       the features and the prototype of their class.
    2. It trains body and head together.
    3. It computes new prototypes and F. F is the sum over batches of the squared norm of the loss's gradient with respect to body and
       head.

    Clients are scored with the received body after the alignment, and with their own head.

    Differences from the released code: each client aligns a copy of the server's body, whereas in the released code, every client
    continues with the body that the previous client has aligned. The first local update of a client has no alignment, because the
    features of an untrained body carry no information. Clients are scored after a downlink (the released code scores them before it, as
    with `eval.fitted=true`). The body is in evaluation mode during the alignment. F has its own batch size.
    """

    align_lr: NonNegative = 0.01
    """Learning rate of the alignment, which uses SGD. With 0, there is no alignment."""
    align_epochs: Count = 1
    """Number of passes over the client's training examples in the alignment."""
    fisher_batch: Count = 16
    """Batch size for F, which is larger with more and smaller batches."""

    also_travels: ClassVar[tuple[str, ...]] = ("fisher",)
    needs: ClassVar[tuple[Need, ...]] = ("classes", "vector", "head")
    combines: ClassVar[Combines] = "individual"
    paper: ClassVar[Paper] = Paper(
        "FedAS: Bridging inconsistency in personalized federated learning", "Yang, Huang, Ye", "CVPR 2024"
    )

    def init_memory(self, weights: Weights, task: Task, data: ClientData) -> Tree:
        """Return prototypes without examples, and F = 0."""
        prototypes = {"sums": torch.zeros(task.n_classes, task.width), "counts": torch.zeros(task.n_classes)}
        return {"prototypes": prototypes, "fisher": {"trace": torch.zeros(())}}

    def phases(self) -> tuple[Phase, ...]:
        """Return the alignment, the training, and the sweeps that compute the prototypes and F."""
        return *self.adapt(), *super().phases(), Sweep("prototypes", self.collect), Sweep("fisher", self.squared_slopes)

    def adapt(self) -> tuple[Phase, ...]:
        """Return the phase that aligns the received body."""
        if not self.align_lr:
            return ()
        optimizer = optim.sgd(self.align_lr)
        return (Train("align", self.distance, ("model:body",), optimizer, epochs=self.align_epochs, train_mode=()),)

    def distance(self, nets: Nets, batch: Batch, down: Tree, memory: Tree) -> Tensor:
        """Return the sum over classes of the mean squared difference from the prototype; classes without a prototype add 0."""
        counts, sums = memory["prototypes"]["counts"], memory["prototypes"]["sums"]
        prototypes = sums / counts.clamp(min=1)[:, None]
        away = (losses.wide(nets.model.body(batch.x)) - prototypes[batch.y]).square().mean(1)
        similar = losses.one_hot(batch.y, len(counts)).sum(0)
        distance: Tensor = ((counts > 0)[batch.y] * away / similar[batch.y]).sum()
        return distance

    def collect(self, nets: Nets, batch: Batch, total: Tree, down: Tree, memory: Tree) -> Tree:
        """Add a batch to the sums of features and the counts of the classes."""
        member = losses.one_hot(batch.y, len(total["counts"]))
        features = nets.model.body(batch.x).to(member.dtype)
        return {"sums": total["sums"] + member.T @ features, "counts": total["counts"] + member.sum(0)}

    def squared_slopes(self, nets: Nets, batch: Batch, total: Tree, down: Tree, memory: Tree) -> Tree:
        """Add the squared norms of the gradients on pieces of a batch."""
        trace, size = total["trace"], self.fisher_batch
        for start in range(0, len(batch.y), size):
            x = map_inputs(lambda values, a=start: values[a : a + size], batch.x)
            piece = Batch(x, batch.y[start : start + size])
            slope = nets.gradient(partial(self.error, batch=piece), ("model",))
            trace = trace + tree.dot(slope, slope)
        return {"trace": trace}

    def error(self, nets: Nets, batch: Batch) -> Tensor:
        """Return the loss of the model on a batch."""
        return nets.loss(nets.model(batch.x), batch.y)

    def uplink(self, client: Client, received: Weights, down: Tree, turn: Turn) -> tuple[Tree, Tree]:
        """Return the body and F."""
        sent, memory = super().uplink(client, received, down, turn)
        return sent | {"fisher": memory["fisher"]["trace"]}, memory

    def uplink_fault(self, uplink: Tree, class_counts: Tensor | None) -> str:
        """Return a message if F is negative, and an empty string otherwise."""
        return "'fisher' is negative" if uplink["fisher"] < 0 else ""

    def aggregate(self, server: Tree, uplinks: Sequence[Tree], round: Round) -> Tree:
        """Return the mean body."""
        return {"weights": tree.mean([uplink["weights"] for uplink in uplinks], self.importances(uplinks, round))}

    def importances(self, uplinks: Sequence[Tree], round: Round) -> list[float]:
        """Return the weights of the bodies, whose sum is 1.

        They are proportional to F / sqrt(1 + age). If all F are 0, they are the shares.
        """
        aged = [float(up["fisher"]) / (1 + one.age) ** 0.5 for up, one in zip(uplinks, round.arrivals, strict=True)]
        total = sum(aged)
        return [f / total for f in aged] if total > 0 else round.shares

    def server_logs(self, server: Tree, uplinks: Sequence[Tree], round: Round) -> Mapping[str, float]:
        """Return the largest weight of a body in the mean (`largest_share`)."""
        return {"largest_share": max(self.importances(uplinks, round))}
