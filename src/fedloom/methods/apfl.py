"""APFL: a client predicts with a mixture of its own model and the common model; it may learn the proportions."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedloom import optim
from fedloom.method import (
    Architecture,
    Batch,
    Logs,
    Method,
    Paper,
    Phase,
    Predictor,
    Task,
    Train,
    predict_model,
)
from fedloom.nets import Nets
from fedloom.ranges import NonNegative, Proportion
from fedloom.tree import Tree


@dataclass(frozen=True, kw_only=True)
class APFL(Method):
    """APFL (Deng, Kamani, Mahdavi; 2020, algorithm 1 and its adaptive alpha): adaptive personalised federated learning.

    Sent: The common model `model` (w) is sent in both directions. Kept: Each client keeps its own model `personal` (v) and the proportion
    `alpha` (a) of that model. With the mixture m = a v + (1 - a) w of weights, one step on a batch is

        w <- w - lr grad f(w),   v <- v - lr a grad f(m),   a <- a - alpha_lr <v - w, grad f(m)>, clamped to [0, 1],

    where all gradients are taken before the step. Clients are scored with a v + (1 - a) w_received; `server_accuracy` scores w. All
    clients have equal weights in the mean of w. The mixture uses the running statistics of v, and only passes through the mixture change
    them.

    Differences from the paper: models are averaged after every local update (`local_epochs` passes), not after every tau steps. Clients
    are scored with a mixture that contains the received w, not the client's own w. The released code (FedTorch) implements another
    method: it mixes logits, and its update of a uses the gradients of both models and adds 0.02 a.
    """

    alpha: Proportion = 0.5
    """Proportion a of the client's own model (its initial value if it is learned). 0: predict with w; 1: train v alone."""
    alpha_lr: NonNegative = 0.0
    """Learning rate of a. With 0, a is constant (the default of the released code)."""

    equal_shares: ClassVar[bool] = True
    accepts_late: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        "Adaptive personalized federated learning",
        "Deng, Kamani, Mahdavi",
        "arXiv 2020",
        "https://arxiv.org/abs/2003.13461",
    )

    def nets(self, arch: Architecture, task: Task) -> dict[str, nn.Module]:
        """Return w and v, which have equal initial weights, and a."""
        model = arch.model()
        mixing = nn.ParameterDict({"own": torch.tensor(self.alpha)})
        return {"model": model, "personal": deepcopy(model), "alpha": mixing}

    def phases(self) -> tuple[Phase, ...]:
        """Return one phase that trains w, v and, if a is learned, a."""
        nets = ("model", "personal", "alpha") if self.alpha_lr else ("model", "personal")
        mixing = optim.clamped(optim.sgd(self.alpha_lr), 0, 1)
        own = self.local_optimizer()
        optimizer = optim.by_net({"model": own, "personal": own, "alpha": mixing})
        return (Train("train", self.loss, nets, optimizer, epochs=self.local_epochs),)

    def loss(self, nets: Nets, batch: Batch, down: Tree, memory: Tree) -> tuple[Tensor, Logs]:
        """Return f(w) + f(m); f(m) has gradients in v and a, but not in w."""
        common = nets.loss(nets.model(batch.x), batch.y)
        mixed = nets.loss(self.mixture(nets, batch.x), batch.y)
        return common + mixed, {"common": common, "mixture": mixed, "alpha": nets.params["alpha.own"]}

    def mixture(self, nets: Nets, x: Any) -> Tensor:
        """Return the outputs of m, such as logits (B, Y)."""
        w, v, a = nets.renamed("model", "personal"), nets.renamed("personal", "personal"), nets.params["alpha.own"]
        mixed = nets.with_params({name: a * v[name] + (1 - a) * w[name].detach() for name in v})
        outputs: Tensor = mixed.personal(x)
        return outputs

    def predictors(self) -> dict[str, Predictor]:
        """Return m as the client's predictor and w as the server's."""
        return {"personal": self.predict, "server": predict_model}

    def predict(self, nets: Nets, x: Any, down: Tree, memory: Tree) -> Tensor:
        """Return the outputs of m, with the received w."""
        return self.mixture(nets, x)
