"""GPFL: shared class embeddings guide generic features, and a conditional layer turns features into personal features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedloom import losses
from fedloom.method import Architecture, Batch, ClientData, Logs, Method, Need, Paper, Phase, Predictor, Task, Train
from fedloom.nets import Nets
from fedloom.ranges import NonNegative
from fedloom.tree import Tree, Weights


class Valve(nn.Module):
    """A layer that scales and shifts features (B, D) by functions of a context u (D,): relu((gamma(u) + 1) z + beta(u))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma, self.beta = (
            nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.LayerNorm(width)) for _ in range(2)
        )

    def forward(self, z: Tensor, context: Tensor) -> Tensor:
        """Return the conditioned features."""
        return F.relu((self.gamma(context) + 1) * z + self.beta(context))


@dataclass(frozen=True, kw_only=True)
class GPFL(Method):
    """GPFL (Zhang et al., ICCV 2023): generic and personal features from one body.

    Sent: The body, the class embeddings E (Y, D) and the conditional layer (`valve`) are sent in both directions. Kept: Each client keeps
    its head.

    With u = mean_y E_y, the layer computes generic features z_G. With u = sum_y (n_y / n) E_y, it computes personal features z_P, which
    the head classifies. The loss is the cross-entropy of the head, plus the cross-entropy of the cosines of z_G with the embeddings, plus
    magnitude times the mean distance between z_G and the received embedding of the class. The contexts and this received embedding come
    from the received E.

    Differences from the released code: in every round, contexts are computed from the received embeddings (the code uses the client's own
    embeddings, and 0 in the first round). The distance is a mean over examples, not a norm over the whole batch.
    """

    magnitude: NonNegative = 0.01
    """Weight of the distance to the received embedding (the paper's lambda)."""
    embedding_decay: NonNegative = 0.1
    """Coefficient of an L2 penalty that is added to the gradient of the embeddings and the conditional layer (the paper's mu)."""

    shared: ClassVar[tuple[str, ...]] = ("model:body", "classes", "valve")
    accepts_late: ClassVar[bool] = True
    needs: ClassVar[tuple[Need, ...]] = ("classes", "vector", "head")
    paper: ClassVar[Paper] = Paper(
        "GPFL: Simultaneously learning global and personalized feature information for personalized federated learning",
        "Zhang, Hua, Wang, Song, Xue, Ma, Cao, Guan",
        "ICCV 2023",
        "https://arxiv.org/abs/2308.10279",
    )

    def nets(self, arch: Architecture, task: Task) -> dict[str, nn.Module]:
        """Return the model, the class embeddings (initially standard normal) and the conditional layer."""
        model = arch.model()
        return {"model": model, "classes": nn.Embedding(task.n_classes, arch.features), "valve": Valve(arch.features)}

    def init_memory(self, weights: Weights, task: Task, data: ClientData) -> Tree:
        """Return the client's class fractions (Y,)."""
        return {"fractions": data.class_counts / max(data.examples, 1)}

    def phases(self) -> tuple[Phase, ...]:
        """Return one phase for all nets."""
        nets = ("model", "classes", "valve")
        return (Train("train", self.loss, nets, self.local_optimizer(), epochs=self.local_epochs),)

    def loss(self, nets: Nets, batch: Batch, down: Tree, memory: Tree) -> tuple[Tensor, Logs]:
        """Return the sum of the losses of personal and generic features."""
        z, received = nets.model.body(batch.x), self.embeddings(down)
        error = nets.loss(nets.model.head(nets.valve(z, memory["fractions"] @ received)), batch.y)
        generic, now = losses.wide(nets.valve(z, received.mean(0))), nets.params["classes.weight"]
        cosines = F.normalize(generic, dim=1) @ F.normalize(now, dim=1).T
        away = (generic - received[batch.y]).square().sum(1).clamp(min=1e-12).sqrt().mean()
        guided = losses.cross_entropy(cosines, batch.y)
        common = torch.stack([p.square().sum() for n, p in nets.params.items() if not n.startswith("model.")]).sum()
        total = error + guided + self.magnitude * away + self.embedding_decay / 2 * common
        return total, {"cross_entropy": error, "guidance": guided}

    def embeddings(self, down: Tree) -> Tensor:
        """Return the received class embeddings (Y, D)."""
        received: Tensor = down["weights"]["params"]["classes.weight"]
        return received

    def predictors(self) -> dict[str, Predictor]:
        """Return the client's predictor. There is no server model, because the server does not receive a head."""
        return {"personal": self.predict}

    def predict(self, nets: Nets, x: Any, down: Tree, memory: Tree) -> Tensor:
        """Return the head's logits (B, Y) for the personal features."""
        personal = nets.valve(nets.model.body(x), memory["fractions"] @ self.embeddings(down))
        logits: Tensor = nets.model.head(personal)
        return logits
