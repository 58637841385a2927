"""FedBN: average everything except the normalisation layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedloom.method import Method, Paper, Predictor, predict_model


@dataclass(frozen=True)
class FedBN(Method):
    """FedBN (Li et al., ICLR 2021): normalisation layers stay with the client and adapt to the client's own inputs.

    Sent: everything except the normalisation layers, both ways. Kept: the normalisation layers (parameters and running statistics).
    For a model without normalisation layers it is FedAvg.
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
        """Return the client's predictor; there is no server model, because no normalisation layer reaches the server."""
        return {"personal": predict_model}
