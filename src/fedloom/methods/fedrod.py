"""FedRoD: a generic head is trained as if classes were balanced, and a personal head is added to it."""

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

RARE = 1e-9  # replaces a count of 0, which lowers the class's logit by about 21


@dataclass(frozen=True)
class FedRoD(Method):
    """FedRoD (Chen, Chao; ICLR 2022) with linear heads: one model that is both generic and personal.

    Sent: `model` (body and generic head) is sent in both directions. Kept: Each client keeps the personal head `own` and its class counts.

    Body and generic head minimise the balanced softmax loss: the cross-entropy of the generic logits + log n_y, where n_y is the client's
    number of examples of class y. A class that the client lacks is therefore not pushed down. The personal head minimises the
    cross-entropy of the sum of both heads' logits; this loss trains the personal head only. Both losses are minimised in one pass.
    `server_accuracy` scores the generic head; `personal_accuracy` scores the sum.

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
        """Return one phase for the model and the personal head, whose losses have no parameter in common."""
        return (Train("train", self.loss, ("model", "own"), self.local_optimizer(), epochs=self.local_epochs),)

    def loss(self, nets: Nets, batch: Batch, down: Tree, memory: Tree) -> tuple[Tensor, Logs]:
        """Return the balanced loss of the generic head plus the loss of the sum, which trains only the personal head."""
        features = nets.model.body(batch.x)
        generic = nets.model.head(features)
        balanced = losses.cross_entropy(generic + memory["log_counts"], batch.y)
        personal = losses.cross_entropy(generic.detach() + nets.own(features.detach()), batch.y)
        return balanced + personal, {"balanced": balanced, "personal": personal}

    def predictors(self) -> dict[str, Predictor]:
        """Return the sum of both heads as the client's predictor, and the generic head as the server's predictor."""
        return {"personal": self.predict, "server": predict_model}

    def predict(self, nets: Nets, x: Any, down: Tree, memory: Tree) -> Tensor:
        """Return the sum of both heads' logits (B, Y)."""
        features = nets.model.body(x)
        logits: Tensor = nets.model.head(features) + nets.own(features)
        return logits
