"""FedALA: each client mixes the received head with its own, element by element, with weights that it learns before it trains."""

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

    Sent: the whole model, both ways. Kept: the client's trained model, and the mixing weights `mixer` (W), one number in [0, 1] for
    each number of the head. A local update starts from the received body and the head own + (received - own) W. Before training, W
    takes gradient steps of this model's loss, clamped to [0, 1], with everything else fixed and in evaluation mode. W starts at 1 and
    is kept between local updates. Clients are scored with the mixed head, `server_accuracy` scores the server's model.

    Differences from the released code: W is trained on all of a client's examples, not on 80 % of them; the first mixing has a fixed
    number of epochs (`first_epochs`, in the second round) instead of a rule of convergence; clients outside the cohort do not mix.
    """

    eta: NonNegative = 1.0
    """Learning rate of W, scaled by `lr_decay` like all learning rates; 0: W stays 1, which is FedAvg."""
    mixing_epochs: Count = 1
    """Passes over the client's examples that train W, in every local update and before predictions."""
    first_epochs: Count = 5
    """Passes that train W in the second round, the first in which clients have a head of their own."""

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
        """Return the model, and a module of the head's form for W, with ones."""
        model, mixer = arch.model(), arch.head()
        for parameter in mixer.parameters():
            nn.init.ones_(parameter)
        return {"model": model, "mixer": mixer}

    def receive(self, weights: Weights, down: Tree, memory: Tree) -> Weights:
        """Return the received model with the client's own head, which is mixed later."""
        own = select(weights, ("model:head",))
        return tree.merge(super().receive(weights, down, memory), own)

    def phases(self) -> tuple[Phase, ...]:
        """Return the training of W, the mixing, and FedAvg's training."""
        return *self.adapt(), *super().phases()

    def adapt(self) -> tuple[Phase, ...]:
        """Return the training of W and the mixing."""
        optimizer = optim.clamped(optim.sgd(self.eta), 0, 1)
        first = Train("first mix", self.mixing_loss, ("mixer",), optimizer, self.first_epochs, when=self.is_first)
        later = Train("mix", self.mixing_loss, ("mixer",), optimizer, self.mixing_epochs, when=self.is_later)
        return first, later, Set("take", self.take)

    def is_first(self, turn: Turn) -> bool:
        """Return whether heads differ from the received one for the first time."""
        return turn.number == 1

    def is_later(self, turn: Turn) -> bool:
        """Return whether heads have been mixed before. In the first round, all heads are equal, and there is nothing to learn."""
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
