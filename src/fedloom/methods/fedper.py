"""FedPer: clients share a body and keep a personal head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedloom.method import Method, Need, Paper, Predictor, predict_model


@dataclass(frozen=True)
class FedPer(Method):
    """FedPer (Arivazhagan et al., 2019): the base layers are averaged; the personalisation layers stay with the client.

    Sent: The body is sent in both directions. Kept: Each client keeps its head. Both are trained together, like FedAvg's single model.
    """

    shared: ClassVar[tuple[str, ...]] = ("model:body",)
    accepts_late: ClassVar[bool] = True
    needs: ClassVar[tuple[Need, ...]] = ("head",)
    paper: ClassVar[Paper] = Paper(
        "Federated learning with personalization layers",
        "Arivazhagan, Aggarwal, Singh, Choudhary",
        "arXiv 2019",
        "https://arxiv.org/abs/1912.00818",
    )

    def predictors(self) -> dict[str, Predictor]:
        """Return the client's predictor. There is no server model, because the server does not receive a head."""
        return {"personal": predict_model}
