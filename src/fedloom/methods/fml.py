"""FML: a private model of any architecture and a common model, which is sent, teach each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from fedloom import losses
from fedloom.method import (
    Architecture,
    Batch,
    Logs,
    Method,
    Need,
    Paper,
    Phase,
    Predictor,
    Task,
    Train,
    predict_model,
    predict_with,
)
from fedloom.nets import Nets
from fedloom.ranges import Share
from fedloom.tree import Tree


@dataclass(frozen=True)
class FML(Method):
    """FML (Shen et al., 2020): federated mutual learning.

    Sent: The common model `model` (the paper's meme), whose architecture is `common_model`, is sent in both directions. Kept: Each client
    keeps its private model `personal`, which has the client's own architecture. Clients are scored with the private model;
    `server_accuracy` scores the common model. With the predicted probabilities p of both models, every step minimises

        alpha CE(p_personal, y) + (1 - alpha) KL(p_model || p_personal)   over the private model, and
        beta  CE(p_model, y)    + (1 - beta)  KL(p_personal || p_model)   over the common model,

    where the first argument of each KL divergence is a constant. The steps of both models use the outputs from before the step. Clients
    have equal weights in the mean. With alpha = beta = 1, the private models train alone, and the common model is that of FedAvg with
    equal weights.

    Differences from the released code: in the authors' code, the lines that exchange the models are commented out. The code in HtFLlib
    divides the KL divergence by the number of classes, lets gradients flow through the teachers, and clips gradients.
    """

    alpha: Share = 0.5
    """Weight of the private model's cross-entropy. The weight of its KL divergence is 1 - alpha."""
    beta: Share = 0.5
    """Weight of the common model's cross-entropy. The weight of its KL divergence is 1 - beta."""

    equal_shares: ClassVar[bool] = True
    accepts_late: ClassVar[bool] = True
    needs: ClassVar[tuple[Need, ...]] = ("classes", "common_model")
    paper: ClassVar[Paper] = Paper(
        "Federated mutual learning",
        "Shen, Zhang, Jia, Zhang, Huang, Zhou, Kuang, Wu, Wu",
        "arXiv 2020",
        "https://arxiv.org/abs/2006.16765",
    )

    def nets(self, arch: Architecture, task: Task) -> dict[str, nn.Module]:
        """Return the common and the private model, which have different initial weights."""
        return {"model": arch.common.model(), "personal": arch.model()}

    def phases(self) -> tuple[Phase, ...]:
        """Return one phase that trains both models."""
        return (Train("train", self.loss, ("model", "personal"), self.local_optimizer(), epochs=self.local_epochs),)

    def loss(self, nets: Nets, batch: Batch, down: Tree, memory: Tree) -> tuple[Tensor, Logs]:
        """Return the sum of both losses. Each loss has a gradient only in its own model."""
        meme, own = nets.model(batch.x), nets.personal(batch.x)
        errors = nets.loss(own, batch.y), nets.loss(meme, batch.y)
        to_meme, to_own = losses.kl_divergence(own, meme).mean(), losses.kl_divergence(meme, own).mean()
        mine = self.alpha * errors[0] + (1 - self.alpha) * to_meme
        common = self.beta * errors[1] + (1 - self.beta) * to_own
        return mine + common, {"cross_entropy": errors[0], "common_cross_entropy": errors[1], "distance": to_meme}

    def predictors(self) -> dict[str, Predictor]:
        """Return the private model as the client's predictor and the common model as the server's."""
        return {"personal": predict_with("personal"), "server": predict_model}
