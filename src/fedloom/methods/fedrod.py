"""FedRoD: a generic head that is trained as if classes were balanced, and a personal head on top of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from fedloom import losses
from fedloom.method import (
    Architecture,
    Batch,
    ClientData,
    Logs,
    Method,
    Need,
    Paper,
    Phase,
    Predictor,
    Task,
    Train,
    predict_model,
)
from fedloom.nets import Nets
from fedloom.tree import Tree, Weights

RARE = 1e-9  # stands for 0 examples: the class's logit is lowered by about 21


@dataclass(frozen=True)
class FedRoD(Method):
    """FedRoD (Chen, Chao; ICLR 2022) with linear heads: one model that is both generic and personal.

    Sent: `model` (body and generic head), both ways. Kept: the personal head `own`, and the client's class counts. Body and generic
    head minimise the balanced softmax loss, the cross-entropy of generic logits + log n_y, with n_y the client's examples of class y: a
    class that the client lacks is not pushed down. The personal head minimises the cross-entropy of the sum of both heads' logits, of
    which only its own are trained. Both happen in one pass. `server_accuracy` scores the generic head, `personal_accuracy` the sum.

    The personal head starts at 0, so a client that has not trained yet predicts as the generic model does. The paper's hypernetwork for
    personal heads is not included.
    """

    accepts_late: ClassVar[bool] = True
    needs: ClassVar[tuple[Need, ...]] = ("classes", "vector", "head")
    paper: ClassVar[Paper] = Paper(
        "On bridging generic and personalized federated learning for image classification",
        "Chen, Chao",
        "ICLR 2022",
        "https://arxiv.org/abs/2107.00778",
    )

    def nets(self, arch: Architecture, task: Task) -> dict[str, nn.Module]:
        """Return the model and a personal head of zeros."""
        model, own = arch.model(), arch.head()
        for parameter in own.parameters():
            nn.init.zeros_(parameter)
        return {"model": model, "own": own}

    def init_memory(self, weights: Weights, task: Task, data: ClientData) -> Tree:
        """Return log n_y (Y,)."""
        return {"log_counts": data.class_counts.clamp(min=RARE).log()}

    def phases(self) -> tuple[Phase, ...]:
        """Return one phase for the model and the personal head; their losses have no parameter in common."""
        return (Train("train", self.loss, ("model", "own"), self.local_optimizer(), epochs=self.local_epochs),)

    def loss(self, nets: Nets, batch: Batch, down: Tree, memory: Tree) -> tuple[Tensor, Logs]:
        """Return the balanced loss of the generic head plus the loss of the sum, in which only the personal head is trained."""
        features = nets.model.body(batch.x)
        generic = nets.model.head(features)
        balanced = losses.cross_entropy(generic + memory["log_counts"], batch.y)
        personal = losses.cross_entropy(generic.detach() + nets.own(features.detach()), batch.y)
        return balanced + personal, {"balanced": balanced, "personal": personal}

    def predictors(self) -> dict[str, Predictor]:
        """Return the sum of both heads as the client's predictor, and the generic head as the server's."""
        return {"personal": self.predict, "server": predict_model}

    def predict(self, nets: Nets, x: Any, down: Tree, memory: Tree) -> Tensor:
        """Return the sum of both heads' logits (B, Y)."""
        features = nets.model.body(x)
        logits: Tensor = nets.model.head(features) + nets.own(features)
        return logits
