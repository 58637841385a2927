"""pFedMe: a client's model minimises its own loss plus the distance to the common model (a Moreau envelope)."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from fedloom import losses, optim, tree
from fedloom.method import (
    Architecture,
    Batch,
    Client,
    Combines,
    Interleave,
    Method,
    Paper,
    Phase,
    Predictor,
    Round,
    Task,
    Train,
    Turn,
    predict_model,
    predict_with,
)
from fedloom.nets import Nets
from fedloom.ranges import Count, NonNegative, Positive, Whole
from fedloom.tree import Tree, Weights


@dataclass(frozen=True, kw_only=True)
class PFedMe(Method):
    """pFedMe (Dinh, Tran, Nguyen; NeurIPS 2020, algorithm 1): personalised federated learning with Moreau envelopes.

    Sent: The common model `model` (w) is sent in both directions. Kept: Each client keeps its personal model `personal` (theta). Only
    `eval.fitted` uses it, because each local update starts with theta = w.

    On each batch, a local update takes `inner_steps` gradient steps of theta on f(theta) + (mu / 2) ||theta - w||^2, and then one step
    w <- w - lr mu (w - theta), whose direction is the gradient of the minimum over theta. The server's new w is (1 - beta) w + beta
    mean(w_k), where all clients have equal weights. `personal_accuracy` scores theta after the steps of a local update, but with the
    received w fixed; `server_accuracy` scores w.

    There is no forward pass with w, so the running statistics sent with w are those of theta. `optimizer`, `momentum` and `weight_decay`
    apply to theta.

    Differences from the released code: the released code adds an undocumented weight decay (`weight_decay=0.001` here). It trains all
    clients in every round, and draws the cohort afterwards. Its mean is weighted by the numbers of examples. The accuracy that it reports
    for theta is that of w after the local update, because at that time, both are the same tensors.
    """

    lr: Positive = 0.005
    mu: NonNegative = 15.0
    """Weight of the distance (the paper's lambda). lr mu should be at most 1. With 0, w does not change."""
    personal_lr: Positive = 0.05
    """Learning rate of theta (released scripts: 0.01 to 0.1). Steps are stable if personal_lr (L + mu) < 2 (L: curvature of f)."""
    inner_steps: Count = 5
    """Number of steps of theta on each batch (the paper's K)."""
    local_steps: Whole = 20
    """Number of batches in a local update (the paper's R). With 0, there are `local_epochs` passes over the client's examples."""
    beta: Positive = 1.0
    """Step size of the server (at most 2 in the paper)."""

    combines: ClassVar[Combines] = "mean"
    equal_shares: ClassVar[bool] = True
    accepts_late: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        "Personalized federated learning with Moreau envelopes",
        "Dinh, Tran, Nguyen",
        "NeurIPS 2020",
        "https://arxiv.org/abs/2006.08848",
    )

    def __post_init__(self) -> None:
        """Raise ValueError if `local_epochs` would have no effect."""
        super().__post_init__()
        if self.local_steps and self.local_epochs != 1:
            steps = self.local_steps
            raise ValueError(
                f"local_epochs={self.local_epochs}: has no effect with local_steps={steps}; set local_steps=0"
            )

    def nets(self, arch: Architecture, task: Task) -> dict[str, nn.Module]:
        """Return w and theta, which have equal initial weights."""
        model = arch.model()
        return {"model": model, "personal": deepcopy(model)}

    def receive(self, weights: Weights, down: Tree, memory: Tree) -> Weights:
        """Return the weights after a downlink: the received w, and theta = w."""
        theta = {
            kind: {"personal" + name.removeprefix("model"): value for name, value in part.items()}
            for kind, part in down["weights"].items()
        }
        return tree.merge(super().receive(weights, down, memory), theta)

    def phases(self) -> tuple[Phase, ...]:
        """Return a phase in which steps of theta and a step of w alternate on every batch."""
        outer = Train("train", self.distance, ("model",), optim.sgd(self.lr))
        members = (self.inner("personal"), outer)
        return (Interleave("envelope", members, epochs=self.local_epochs, steps=self.local_steps or None),)

    def adapt(self) -> tuple[Phase, ...]:
        """Return a phase with as many steps of theta as in a local update, but with w fixed."""
        return (self.inner("adapt"),)

    def inner(self, name: str) -> Train:
        """Return a phase that trains theta."""
        return Train(
            name,
            self.loss,
            ("personal",),
            self.local_optimizer(self.personal_lr),
            epochs=self.local_epochs,
            steps=self.local_steps or None,
            repeats=self.inner_steps,
        )

    def loss(self, nets: Nets, batch: Batch, down: Tree, memory: Tree) -> Tensor:
        """Return f(theta) + (mu / 2) ||theta - w||^2."""
        return nets.loss(nets.personal(batch.x), batch.y) + self.distance(nets, batch, down, memory)

    def distance(self, nets: Nets, batch: Batch, down: Tree, memory: Tree) -> Tensor:
        """Return (mu / 2) ||theta - w||^2 over the parameters; its gradient in w is mu (w - theta)."""
        return self.mu / 2 * losses.squared_distance(nets.renamed("personal", "model"), nets.params)

    def uplink(self, client: Client, received: Weights, down: Tree, turn: Turn) -> tuple[Tree, Tree]:
        """Return w with the running statistics of theta."""
        sent, memory = super().uplink(client, received, down, turn)
        own, weights = client.weights["buffers"], sent["weights"]
        buffers = {name: own["personal" + name.removeprefix("model")] for name in weights["buffers"]}
        return {"weights": {**weights, "buffers": buffers}}, memory

    def aggregate(self, server: Tree, uplinks: Sequence[Tree], round: Round) -> Tree:
        """Return (1 - beta) w + beta mean(w_k), with the mean of the running statistics."""
        before, mean = server["weights"]["params"], super().aggregate(server, uplinks, round)["weights"]
        params = tree.add(before, tree.sub(mean["params"], before), self.beta)
        return {"weights": {**mean, "params": params}}

    def predictors(self) -> dict[str, Predictor]:
        """Return theta as the client's predictor and w as the server's."""
        return {"personal": predict_with("personal"), "server": predict_model}
