"""Return to the server's state before the latest aggregation if a round has no usable uplink."""

from __future__ import annotations

from collections.abc import Collection

from fedloom.errors import NoValidUplinkError
from fedloom.tree import Tree

LIMIT = 3  # number of consecutive rounds without a usable uplink after which the run ends


class RollBack:
    """The server's state before the latest aggregation, and the number of consecutive rounds without a usable uplink."""

    def __init__(self, on: bool) -> None:
        """Create the object. `on` states whether states are kept and restored."""
        self.on = on
        self.previous: Tree | None = None
        self.failed = 0

    def keep(self, before: Tree) -> None:
        """Keep the state before an aggregation that succeeded."""
        self.failed = 0
        if self.on:
            self.previous = before

    def restored(self, server: Tree) -> Tree:
        """Return the state to continue from after a round without a usable uplink."""
        self.failed += 1
        return server if self.previous is None else self.previous

    def check(self, number: int, clients: Collection[int]) -> None:
        """Raise NoValidUplinkError after `LIMIT` such rounds in a row.

        `clients` are the clients whose uplinks were rejected in round `number`.
        """
        if self.failed >= LIMIT:
            raise NoValidUplinkError(
                f"rounds {number + 2 - LIMIT} to {number + 1}: no uplink could be aggregated; in the last round, those of clients "
                f"{', '.join(map(str, sorted(clients)))} were rejected; events.jsonl gives the reasons; "
                "check these clients, or try a smaller method.lr"
            )
