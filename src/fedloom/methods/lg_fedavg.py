"""LG-FedAvg: local representations under a common head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedloom.method import Method, Need, Paper, Predictor, predict_model


@dataclass(frozen=True)
class LGFedAvg(Method):
    """LG-FedAvg (Liang et al., 2020): think locally, act globally.

    Sent: the head, both ways. Kept: the body. Both are trained together, like FedAvg's single model. All clients have equal weights in
    the mean of the heads. Bodies may differ between clients, as long as they have the same number of features.

    Differences from the released code: only the last layer is common (there, the last two of four layers, or three of four on MNIST);
    training starts from random weights (there, from a model trained with FedAvg for hundreds of rounds); clients are scored with their
    current body and the common head (there, each with its best model on the test examples). The ensemble of all clients' models for new
    data and the adversarial loss are not included.
    """

    shared: ClassVar[tuple[str, ...]] = ("model:head",)
    equal_shares: ClassVar[bool] = True
    accepts_late: ClassVar[bool] = True
    needs: ClassVar[tuple[Need, ...]] = ("head",)
    paper: ClassVar[Paper] = Paper(
        "Think locally, act globally: Federated learning with local and global representations",
        "Liang, Liu, Ziyin, Allen, Auerbach, Brent, Salakhutdinov, Morency",
        "arXiv 2020",
        "https://arxiv.org/abs/2001.01523",
    )

    def predictors(self) -> dict[str, Predictor]:
        """Return the client's predictor; there is no server model, because no body reaches the server."""
        return {"personal": predict_model}
