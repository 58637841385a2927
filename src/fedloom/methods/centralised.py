"""Centralised training: one model on everybody's rows, the upper reference for one shared model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedloom.method import Method, Paper, Task
from fedloom.rng import Stream
from fedloom.tree import Tree


@dataclass(frozen=True)
class Centralised(Method):
    """One model, trained on the union of all clients' rows; a round is `local_epochs` passes over that union.

    It is no federated method: participation is ignored, and its bytes are those of one client that holds everything.
    Scores are taken on the same rows as every other method's.
    """

    pooled: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper("(no federation)", "", "upper reference")

    def cohort(self, server: Tree, task: Task, size: int, rng: Stream) -> Sequence[int]:
        """The one client that holds all rows."""
        return [0]
