"""FedALA: before training, each client mixes the received head with its own head, element by element, with learned weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from fedloom import optim, tree
from fedloom.method import Architecture, Batch, Method, Need, Paper, Phase, Set, Task, Train, Turn
from fedloom.nets import Nets, select
from fedloom.ranges import Count, NonNegative
from fedloom.tree import Tree, Weights

Params = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class FedALA(Method):
    """FedALA (Zhang et al., AAAI 2023): adaptive local aggregation of the head.

    Sent: The whole model is sent in both directions. Kept: Each client keeps its trained model, and the mixing weights `mixer` (W), with
    one number in [0, 1] for each number of the head.

    A local update starts from the received body and the head own + (received - own) W. Before training, W takes gradient steps on the loss
    of this model and is clamped to [0, 1], while everything else is fixed and in evaluation mode. W starts at 1 and is kept between local
    updates. `personal_accuracy` scores each client with its mixed head; `server_accuracy` scores the server's model.

    Differences from the released code: W is trained on all of a client's examples, not on 80 % of them. The first mixing has a fixed
    number of epochs (`first_epochs`, in the second round) instead of a convergence criterion. Clients outside the cohort do not mix.
    """

    eta: NonNegative = 1.0
    """Learning rate of W, which is scaled by `lr_decay` like all learning rates. With 0, W stays 1, and the method is FedAvg."""
    mixing_epochs: Count = 1
    """Number of passes over the client's examples that train W, in every local update and before predictions."""
    first_epochs: Count = 5
    """Number of passes that train W in the second round, which is the first round in which a client's head differs
    from the received head.
    """

    shared: ClassVar[tuple[str, ...]] = ("model",)
    keeps_shared: ClassVar[bool] = True
    accepts_late: ClassVar[bool] = True
    needs: ClassVar[tuple[Need, ...]] = ("head",)
    paper: ClassVar[Paper] = Paper(
        "FedALA: Adaptive local aggregation for personalized federated learning",
        "Zhang, Hua, Wang, Song, Xue, Ma, Guan",
        "AAAI 2023",
        "https://arxiv.org/abs/2212.01197",
    )

    def nets(self, arch: Architecture, task: Task) -> dict[str, nn.Module]:
        """Return the model, and a module in the form of the head that holds W, filled with ones."""
        model, mixer = arch.model(), arch.head()
        for parameter in mixer.parameters():
            nn.init.ones_(parameter)
        return {"model": model, "mixer": mixer}

    def receive(self, weights: Weights, down: Tree, memory: Tree) -> Weights:
        """Return the received model with the client's own head. The heads are mixed later."""
        own = select(weights, ("model:head",))
        return tree.merge(super().receive(weights, down, memory), own)

    def phases(self) -> tuple[Phase, ...]:
        """Return the phases: the training of W, the mixing, and FedAvg's training."""
        return *self.adapt(), *super().phases()

    def adapt(self) -> tuple[Phase, ...]:
        """Return the phases that train W and mix the heads."""
        optimizer = optim.clamped(optim.sgd(self.eta), 0, 1)
        first = Train("first mix", self.mixing_loss, ("mixer",), optimizer, self.first_epochs, when=self.is_first)
        later = Train("mix", self.mixing_loss, ("mixer",), optimizer, self.mixing_epochs, when=self.is_later)
        return first, later, Set("take", self.take)

    def is_first(self, turn: Turn) -> bool:
        """Return whether this is the first round in which clients' heads differ from the received head."""
        return turn.number == 1

    def is_later(self, turn: Turn) -> bool:
        """Return whether heads have been mixed before. In the first round, all heads are equal, so there is nothing to learn."""
        return turn.number > 1

    def mixing_loss(self, nets: Nets, batch: Batch, down: Tree, memory: Tree) -> Tensor:
        """Return the loss of the model with the mixed head."""
        mixed = nets.with_params(self.mixed(dict(nets.params), down))
        return nets.loss(mixed.model(batch.x), batch.y)

    def take(self, weights: Weights, down: Tree, memory: Tree) -> Weights:
        """Return the weights with the mixed head."""
        return tree.merge(weights, {"params": self.mixed(weights["params"], down)})

    def mixed(self, params: Params, down: Tree) -> Params:
        """Return the head own + (received - own) W, with the names of `model`."""
        received, found = down["weights"]["params"], {}
        for name, weight in params.items():
            if name.startswith("mixer."):
                own = "model.head." + name.removeprefix("mixer.")
                found[own] = params[own] + (received[own] - params[own]) * weight
        return found
