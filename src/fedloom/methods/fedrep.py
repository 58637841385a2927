"""FedRep: each client first trains its personal head on the common body, and then the body with that head fixed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedloom.method import Need, Paper, Phase, Train
from fedloom.methods.fedper import FedPer
from fedloom.ranges import Count, Whole


@dataclass(frozen=True)
class FedRep(FedPer):
    """FedRep (Collins et al., ICML 2021): a common representation, which is trained with heads that were fitted first.

    Sent: The body is sent in both directions. Kept: Each client keeps its head.

    A local update consists of `head_epochs` passes that update only the head, and then `local_epochs` passes that update only the body.
    The whole model is in training mode in both, as in the released code, so running statistics also change while the head is trained.
    """

    head_epochs: Count = 10
    """Number of passes that update the head, before the body's `local_epochs`."""

    final_head_epochs: Whole = 0
    """Number of passes that re-fit a copy of the head to the received body before predictions.

    The released code uses 10 in the last round. With 0, heads are not re-fitted.
    """

    needs: ClassVar[tuple[Need, ...]] = ("head",)
    paper: ClassVar[Paper] = Paper(
        "Exploiting shared representations for personalized federated learning",
        "Collins, Hassani, Mokhtari, Shakkottai",
        "ICML 2021",
        "https://arxiv.org/abs/2102.07078",
    )

    def phases(self) -> tuple[Phase, ...]:
        """Return a phase that trains the head, and a phase that trains the body."""
        head = Train("head", self.loss, ("model:head",), self.local_optimizer(), epochs=self.head_epochs)
        body = Train("body", self.loss, ("model:body",), self.local_optimizer(), epochs=self.local_epochs)
        return head, body

    def adapt(self) -> tuple[Phase, ...]:
        """Return a phase that re-fits the head, if `final_head_epochs` is not 0."""
        if not self.final_head_epochs:
            return ()
        return (Train("refit", self.loss, ("model:head",), self.local_optimizer(), epochs=self.final_head_epochs),)
