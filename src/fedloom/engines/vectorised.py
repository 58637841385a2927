"""Clients of one architecture side by side, in this process: one batched operation in place of many small ones.

Made for accelerators, where small models wait for launches, and for small matmul-only models. On a CPU convolutions lose by it
(batched weights make grouped convolutions), and `auto` does not choose it there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from fedloom import tree
from fedloom.engines.base import Problem, Reply
from fedloom.engines.sequential import Sequential
from fedloom.lanes import CannotMapError, run_turns
from fedloom.method import Downlink

LANES_BYTES = 1 << 28  # stacked weights of a group; activations and optimiser states come on top
MOST_LANES = 64

log = logging.getLogger(__name__)


class Vectorised(Sequential):
    """Lanes of stacked clients; falls back to one after another, with a warning that says why, where a method cannot be mapped."""

    def __init__(self, problem: Problem, lanes: int | None = None) -> None:
        super().__init__(problem)
        self._lanes = [lanes or self._lanes_for(arch) for arch in range(len(problem.archs))]

    def _lanes_for(self, arch: int) -> int:
        size = tree.n_bytes(self._initial[arch])
        return max(1, min(MOST_LANES, LANES_BYTES // max(size, 1)))

    def train(self, number: int, cohort: Sequence[int], down: Downlink) -> list[Reply]:
        """See `Engine.train`."""
        replies = [reply for group in self._groups(cohort) for reply in self._turns(number, cohort, group, down)]
        return sorted(replies, key=lambda reply: reply.slot)

    def _groups(self, cohort: Sequence[int]) -> list[list[int]]:
        """Places in the cohort: clients of one architecture with similar numbers of rows together, as many as there are lanes."""
        groups: list[list[int]] = []
        arch_of, n_train = self.problem.arch_of, self.problem.data.n_train
        for arch, lanes in enumerate(self._lanes):
            places = [slot for slot, i in enumerate(cohort) if arch_of[i] == arch]
            places.sort(key=lambda slot: (-n_train(cohort[slot]), slot))
            groups += [places[start : start + lanes] for start in range(0, len(places), lanes)]
        return groups

    def _turns(self, number: int, cohort: Sequence[int], group: list[int], down: Downlink) -> list[Reply]:
        arch = self.problem.arch_of[cohort[group[0]]]
        if self._lanes[arch] > 1 and len(group) > 1:
            try:
                return self._mapped_turns(number, [cohort[slot] for slot in group], group, down)
            except (CannotMapError, RuntimeError, ValueError, TypeError) as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                log.warning(
                    "engine=vectorised: clients are trained one after another, since they cannot be mapped: %s", reason
                )
                self._lanes[arch] = 1
        return [self.turn(number, cohort[slot], slot, down.to(slot)) for slot in group]

    def _mapped_turns(self, number: int, clients: list[int], slots: list[int], down: Downlink) -> list[Reply]:
        p, started = self.problem, time.perf_counter()
        sites = [self._site(number, i, "train", False, p.data.augmented) for i in clients]
        downs = [down.to(slot) for slot in slots]
        gradients = self._gradients_of(clients[0])
        done = run_turns(p.method, gradients, [self._whole(i) for i in clients], downs, sites, number)
        seconds = (time.perf_counter() - started) / len(clients)
        replies = []
        for i, slot, outcome in zip(clients, slots, done, strict=True):
            self._keep(i, outcome)
            turn = outcome.turn
            replies.append(Reply(i, slot, outcome.uplink, turn.examples, turn.steps, outcome.logs, seconds))
        return replies
