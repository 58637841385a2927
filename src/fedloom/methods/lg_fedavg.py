"""LG-FedAvg: local representations, and a common head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedloom.method import Method, Need, Paper, Predictor, predict_model


@dataclass(frozen=True)
class LGFedAvg(Method):
    """LG-FedAvg (Liang et al., 2020): think locally, act globally.

    Sent: The head is sent in both directions. Kept: Each client keeps its body. Both are trained together, like FedAvg's single model. All
    clients have equal weights in the mean of the heads. Bodies may differ between clients, but must have the same number of features.

    Differences from the released code: only the last layer is common (in the released code, the last two of four layers, or three of four
    on MNIST). Training starts from random weights, not from a model trained with FedAvg for hundreds of rounds. Clients are scored with
    their current body and the common head; the released code scores each client with its best model on the test examples. The ensemble of
    all clients' models for new data and the adversarial loss are not implemented.
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
        """Return the client's predictor; there is no server model, because bodies are not sent."""
        return {"personal": predict_model}
