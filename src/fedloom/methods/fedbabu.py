"""FedBABU: the federation trains a body under a fixed random head; fine-tuning personalises the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from fedloom.method import Need, Paper, Phase, Train
from fedloom.methods.fedavg_ft import FedAvgFT
from fedloom.ranges import Count


@dataclass(frozen=True)
class FedBABU(FedAvgFT):
    """FedBABU (Oh et al., ICLR 2022): the body is trained and averaged; the head keeps its random initial values.

    Sent: The body is sent in both directions. Kept: Each client keeps the head, which is never trained and is the same for all clients
    (with `same_init=true`).

    Before a client predicts, it fine-tunes a copy of the model on its own examples; the copy is then discarded. `personal_accuracy` scores
    that copy; `server_accuracy` scores the body with the common head.
    """

    tuning_epochs: Count = 5
    tuned: Literal["model", "body", "head"] = "model"
    """The weights that fine-tuning updates."""

    shared: ClassVar[tuple[str, ...]] = ("model:body",)
    needs: ClassVar[tuple[Need, ...]] = ("head",)
    paper: ClassVar[Paper] = Paper(
        "FedBABU: Toward enhanced representation for federated image classification",
        "Oh, Kim, Yun",
        "ICLR 2022",
        "https://arxiv.org/abs/2106.06042",
    )

    def phases(self) -> tuple[Phase, ...]:
        """Return a phase that trains only the body."""
        return (Train("train", self.loss, ("model:body",), self.local_optimizer(), epochs=self.local_epochs),)

    def adapt(self) -> tuple[Phase, ...]:
        """Return a phase that fine-tunes the whole model, its body or its head."""
        part = "model" if self.tuned == "model" else f"model:{self.tuned}"
        optimizer = self.local_optimizer(self.tuning_lr or self.lr)
        return (Train("tune", self.loss, (part,), optimizer, epochs=self.tuning_epochs, balanced=self.is_balanced),)
