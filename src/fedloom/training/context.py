"""The inputs of one client's local work."""

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
    """A client's examples, the plan of their batches, the task, the client's random stream, its codec, and its validation examples."""

    rows: Rows
    plan: Plan
    task: Task
    rng: Stream
    codec: Codec = PLAIN
    valid: Rows | None = None  # None if the client has none, or if no phase visits them


class LocalWork(NamedTuple):
    """The inputs of one phase of a client's local update, or of all its phases."""

    client: Client
    down: Tree
    context: ClientContext
    turn: Turn
