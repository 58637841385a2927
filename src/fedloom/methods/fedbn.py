"""FedBN: the server averages everything except the normalisation layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedloom.method import Method, Paper, Predictor, predict_model


@dataclass(frozen=True)
class FedBN(Method):
    """FedBN (Li et al., ICLR 2021): normalisation layers stay with the client and adapt to the client's own inputs.

    Sent: Everything except the normalisation layers is sent in both directions. Kept: Each client keeps its normalisation layers
    (parameters and running statistics). For a model without normalisation layers, the method is FedAvg.
    """

    shared: ClassVar[tuple[str, ...]] = ("model:-norm",)
    accepts_late: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        "FedBN: Federated learning on non-IID features via local batch normalization",
        "Li, Jiang, Zhang, Kamp, Dou",
        "ICLR 2021",
        "https://arxiv.org/abs/2102.07623",
    )

    def predictors(self) -> dict[str, Predictor]:
        """Return the client's predictor. There is no server model, because the server does not receive the normalisation layers."""
        return {"personal": predict_model}
