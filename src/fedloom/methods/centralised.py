"""Centralised training: one model is trained on all clients' examples, as a reference for methods with one shared model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedloom.method import Method, Paper, Round, Task
from fedloom.tree import Tree


@dataclass(frozen=True)
class Centralised(Method):
    """One model is trained on the union of all clients' examples. A round consists of `local_epochs` passes over that union.

    This is not a federated method. It ignores participation, and the recorded traffic is that of one client that has all examples. The
    model is scored on the same examples as with every other method.
    """

    pooled: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper("(no federation)", "", "upper reference")

    def cohort(self, server: Tree, task: Task, size: int, round: Round) -> Sequence[int]:
        """Return the one client that has all examples."""
        return [0]
