"""FedAvg with local fine-tuning: a client fine-tunes FedAvg's model on its own examples before predicting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from fedloom.method import Need, Paper, Phase, Train
from fedloom.methods.fedavg import FedAvg
from fedloom.ranges import Count, NonNegative


@dataclass(frozen=True)
class FedAvgFT(FedAvg):
    """FedAvg with local fine-tuning before prediction (FedAvg+FT; Collins et al., 2022, section 2).

    Sent: The whole model is sent in both directions. Kept: Clients keep nothing between rounds. The fine-tuned copy is created for scoring
    and then discarded.
    """

    tuning_epochs: Count = 1
    """Number of passes over the client's training examples before it predicts."""
    tuning_lr: NonNegative = 0.0
    """Learning rate of fine-tuning. With 0, it is the same as `lr`."""
    control: Literal["none", "same-steps-balanced"] = "none"
    """Control arm that fine-tunes for the same number of steps, on batches in which the client's classes are equally frequent."""

    paper: ClassVar[Paper] = Paper(
        "FedAvg with fine tuning: local updates lead to representation learning",
        "Collins, Hassani, Mokhtari, Shakkottai",
        "NeurIPS 2022",
        "https://arxiv.org/abs/2205.13692",
    )

    def adapt(self) -> tuple[Phase, ...]:
        """Return a phase that trains the received model."""
        optimizer = self.local_optimizer(self.tuning_lr or self.lr)
        return (Train("tune", self.loss, ("model",), optimizer, epochs=self.tuning_epochs, balanced=self.is_balanced),)

    @property
    def is_balanced(self) -> bool:
        """Whether fine-tuning draws the client's classes equally often."""
        return self.control == "same-steps-balanced"

    @property
    def needed(self) -> frozenset[Need]:
        """The method's requirements, including class labels if batches are balanced."""
        return super().needed | ({"classes"} if self.is_balanced else set())
