"""Centralised training: one model trained on all clients' examples, the upper reference for one shared model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedloom.method import Method, Paper, Round, Task
from fedloom.tree import Tree


@dataclass(frozen=True)
class Centralised(Method):
    """One model trained on the union of all clients' examples; a round is `local_epochs` passes over that union.

    This is not a federated method: participation is ignored, and its traffic is that of one client that has all examples.
    It is scored on the same examples as every other method.
    """

    pooled: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper("(no federation)", "", "upper reference")

    def cohort(self, server: Tree, task: Task, size: int, round: Round) -> Sequence[int]:
        """Return the one client that has all examples."""
        return [0]
