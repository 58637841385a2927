"""The cumulative cost of a run: bytes in messages, seconds, and floating-point operations."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from fedloom.engines import Problem, Reply
from fedloom.experiment.costs import Costs
from fedloom.tree import Tree
from fedloom.wire.messages import Meter

T = TypeVar("T")

log = logging.getLogger(__name__)


class Accounting:
    """The cumulative cost of one run."""

    def __init__(self, problem: Problem, state: Mapping[str, Any] | None = None) -> None:
        """Start from zero or, if `state` is passed, continue from this earlier result of `state()`."""
        state = state or {}
        self._costs: Costs | None = Costs(problem)
        self.meter = Meter()
        self.kinds: dict[str, dict[str, int]] = state.get("bytes_by_kind", {"uplink": {}, "downlink": {}})
        self.train_seconds: float = state.get("train_seconds", 0.0)
        self.eval_seconds: float = state.get("eval_seconds", 0.0)
        self.phase_seconds: dict[str, float] = state.get("phase_seconds", {})
        self.flops: float = state.get("flops", 0.0)
        self.trained: set[int] = set(state.get("trained", ()))

    def count(self, way: str, message: Tree, kind: str | None = None) -> int:
        """Add one message and return its size in bytes.

        The size is counted under `kind` if it is passed, and otherwise under the kinds that the message contains.
        """
        sizes = self.meter.sizes(message)
        sizes = {kind: sum(sizes.values())} if kind else sizes
        for kind, n in sizes.items():
            self.kinds[way][kind] = self.kinds[way].get(kind, 0) + n
        return sum(sizes.values())

    def turn(self, reply: Reply, number: int, taken: bool) -> float | None:
        """Add the cost of one local update in round `number`. Return its floating-point operations, or None if they cannot be counted.

        `taken` states whether the server accepted the uplink of the local update.
        """
        flops = self._counted(lambda costs: sum(costs.flops(reply.client, number).values()))
        if taken:
            self.trained.add(reply.client)
        self.flops += flops or 0.0
        for phase, seconds in reply.phase_seconds.items():
            self.phase_seconds[phase] = self.phase_seconds.get(phase, 0.0) + seconds
        return flops

    def peak_client_bytes(self) -> int | None:
        """Return `Costs.peak_client_bytes`, or None if it cannot be counted."""
        return self._counted(Costs.peak_client_bytes)

    def total(self, way: str) -> int:
        """Return the total size in bytes of all messages in one direction, `uplink` or `downlink`."""
        return sum(self.kinds[way].values())

    def state(self) -> dict[str, Any]:
        """Return the state for the checkpoint."""
        return {
            "bytes_by_kind": self.kinds,
            "train_seconds": self.train_seconds,
            "eval_seconds": self.eval_seconds,
            "phase_seconds": self.phase_seconds,
            "flops": self.flops,
            "trained": sorted(self.trained),
        }

    def _counted(self, count: Callable[[Costs], T]) -> T | None:
        """Return the result of `count`. If counting fails, log one warning and return None, so that the run continues."""
        if self._costs is None:
            return None
        try:
            return count(self._costs)
        except Exception as error:
            log.warning("costs of local updates are not counted: %s: %s", type(error).__name__, error)
            self._costs = None
            return None
