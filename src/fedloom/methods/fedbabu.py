"""FedBABU: the federation learns a body under a head that never moves; fine-tuning makes it personal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from fedloom.method import Paper, Phase, Train
from fedloom.methods.fedavg_ft import FedAvgFT
from fedloom.ranges import Count


@dataclass(frozen=True)
class FedBABU(FedAvgFT):
    """FedBABU (Oh et al., ICLR 2022): the body is trained and averaged, the head keeps its random initial values.

    Travels: the body, both ways. Stays: the head, the same for all (with `same_init=true`), and never trained. A copy of the model is
    fine-tuned on a client's own rows before it predicts there, and thrown away: `personal_accuracy` is the copy's,
    `server_accuracy` that of the body with the common head.
    """

    tuning_epochs: Count = 5
    tuned: Literal["model", "body", "head"] = "model"
    """What fine-tuning updates."""

    shared: ClassVar[tuple[str, ...]] = ("model:body",)
    paper: ClassVar[Paper] = Paper(
        "FedBABU: Toward enhanced representation for federated image classification",
        "Oh, Kim, Yun",
        "ICLR 2022",
        "https://arxiv.org/abs/2106.06042",
    )

    def phases(self) -> tuple[Phase, ...]:
        """The body alone."""
        return (Train("train", self.loss, ("model:body",), self.local_optimizer(), epochs=self.local_epochs),)

    def adapt(self) -> tuple[Phase, ...]:
        """Fine-tuning of the whole model, or of a part of it."""
        part = "model" if self.tuned == "model" else f"model:{self.tuned}"
        optimizer = self.local_optimizer(self.tuning_lr or self.lr)
        return (Train("tune", self.loss, (part,), optimizer, epochs=self.tuning_epochs),)
