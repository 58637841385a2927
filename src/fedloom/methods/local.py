"""Local training: every client trains alone, as a baseline for personalised federated learning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedloom.method import Method, Paper, Predictor, predict_model


@dataclass(frozen=True)
class Local(Method):
    """Every client trains its own model on its own examples.

    Sent: Nothing is sent. Kept: Each client keeps its model. A round consists of `local_epochs` passes, so a run has the same number of
    steps as with FedAvg.
    """

    shared: ClassVar[tuple[str, ...]] = ()
    paper: ClassVar[Paper] = Paper("(no federation)", "", "lower reference")

    def predictors(self) -> dict[str, Predictor]:
        """Return the client's predictor. There is no server model."""
        return {"personal": predict_model}
