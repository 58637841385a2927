"""FedMRL: a small common model and a private model share a nested representation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedloom.errors import ConfigError
from fedloom.method import Architecture, Batch, Logs, Method, Need, Paper, Phase, Predictor, Task, Train
from fedloom.models.layers import Split
from fedloom.nets import Nets
from fedloom.ranges import Whole
from fedloom.tree import Tree


@dataclass(frozen=True)
class FedMRL(Method):
    """FedMRL (Yi et al., NeurIPS 2024): model-heterogeneous federated learning with Matryoshka representations.

    Sent: The common model `model` is sent in both directions. It has the architecture `common_model` with d features. Kept: Each client
    keeps its private model `personal`, which has the client's own architecture with D features, and `projection`, a linear map from d + D
    features to D features.

    With z_s and z the features of the common and the private body, the representation is r = projection([z_s, z]). The private head uses
    r, and the common head uses its first d numbers. The sum of both losses trains all three nets. A client predicts with the private head.
    There is no server model, because the common head is trained only on the outputs of private projections.

    Differences from the released code: common models are averaged, weighted by numbers of examples. In the authors' code, all uploads are
    the same object, so the mean is the last client's model. The code in HtFLlib does not keep the trained projection.
    """

    small_features: Whole = 0
    """Number d of features of the common model, which must not exceed that of any private model. With 0, it is a quarter of the number of
    features of the first architecture (HtFLlib: 128 of 512)."""

    accepts_late: ClassVar[bool] = True
    needs: ClassVar[tuple[Need, ...]] = ("vector", "head", "common_model")
    paper: ClassVar[Paper] = Paper(
        "Federated model heterogeneous Matryoshka representation learning",
        "Yi, Yu, Ren, Wang, Liu, Li",
        "NeurIPS 2024",
        "https://arxiv.org/abs/2406.00488",
    )

    def nets(self, arch: Architecture, task: Task) -> dict[str, nn.Module]:
        """Return the common model, the private model and the projection. Raise ConfigError if d is larger than D."""
        small, width = self.small_features or max(task.width // 4, 1), arch.features
        if small > width:
            raise ConfigError(
                f"method.small_features={small}: must be at most {width}, the number of features of {arch.name}"
            )
        common = Split(arch.common.body(small), arch.common.head(small))
        return {"model": common, "personal": arch.model(), "projection": nn.Linear(small + width, width)}

    def phases(self) -> tuple[Phase, ...]:
        """Return one phase that trains all nets."""
        nets, optimizer = ("model", "personal", "projection"), self.local_optimizer()
        return (Train("train", self.loss, nets, optimizer, epochs=self.local_epochs),)

    def loss(self, nets: Nets, batch: Batch, down: Tree, memory: Tree) -> tuple[Tensor, Logs]:
        """Return the sum of the losses of the private head and of the common head."""
        r, n_small = self.representation(nets, batch.x)
        own = nets.loss(nets.personal.head(r), batch.y)
        common = nets.loss(nets.model.head(r[:, :n_small]), batch.y)
        return own + common, {"own": own, "common": common}

    def representation(self, nets: Nets, x: Any) -> tuple[Tensor, int]:
        """Return r (B, D), and the number d of its features that the common head uses."""
        small: Tensor = nets.model.body(x)
        r: Tensor = nets.projection(torch.cat([small, nets.personal.body(x)], 1))
        return r, small.shape[1]

    def predictors(self) -> dict[str, Predictor]:
        """Return the predictor of a client, which uses the private head on r. There is no server model."""
        return {"personal": self.predict}

    def predict(self, nets: Nets, x: Any, down: Tree, memory: Tree) -> Tensor:
        """Return the outputs of the private head, such as logits (B, Y)."""
        outputs: Tensor = nets.personal.head(self.representation(nets, x)[0])
        return outputs
