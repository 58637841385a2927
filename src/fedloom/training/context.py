"""What one client's local work depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from fedloom.method import Client, Task, Turn
from fedloom.rng import Stream
from fedloom.training.batches import Plan, Rows
from fedloom.tree import Tree
from fedloom.wire.codec import PLAIN, Codec


@dataclass(frozen=True, kw_only=True)
class ClientContext:
    """A client's examples and how they are batched, the task, its random stream, and its end of the wire."""

    rows: Rows
    plan: Plan
    task: Task
    rng: Stream
    codec: Codec = PLAIN


class LocalWork(NamedTuple):
    """A client at work in one phase, or in all of them."""

    client: Client
    down: Tree
    context: ClientContext
    turn: Turn
