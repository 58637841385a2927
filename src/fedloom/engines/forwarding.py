"""Engines that delegate the storage of clients to another engine."""

from __future__ import annotations

from collections.abc import Iterable

from fedloom.engines.base import Engine, Problem
from fedloom.method import Client, Downlink
from fedloom.training.turn import Modules
from fedloom.tree import Tree


class ForwardingEngine(Engine):
    """An engine that delegates calls about individual clients to `inner`, which stores the clients."""

    def __init__(self, problem: Problem, inner: Engine) -> None:
        super().__init__(problem)
        self.inner = inner

    def personal(self, number: int, down: Downlink, i: int, adapt: bool = True) -> tuple[Modules, Client, Tree]:
        """See `Engine.personal`."""
        return self.inner.personal(number, down, i, adapt)

    def server(self, down: Downlink) -> tuple[Modules, Client, Tree]:
        """See `Engine.server`."""
        return self.inner.server(down)

    def client(self, i: int) -> Client:
        """See `Engine.client`."""
        return self.inner.client(i)

    def changed(self) -> Iterable[int]:
        """See `Engine.changed`."""
        return self.inner.changed()

    def restore(self, i: int, client: Client) -> None:
        """See `Engine.restore`."""
        self.inner.restore(i, client)
