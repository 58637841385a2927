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
from fedloom.engines.sequential import Member, Sequential
from fedloom.lanes import CannotMapError, run_turns

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

    def turns(self, number: int, members: Sequence[Member]) -> list[Reply]:
        """See `Sequential.turns`."""
        done = {reply.slot: reply for group in self._groups(members) for reply in self._group_turns(number, group)}
        return [done[member.slot] for member in members]

    def _groups(self, members: Sequence[Member]) -> list[list[Member]]:
        """Clients of one architecture with similar numbers of rows together, as many as there are lanes."""
        groups: list[list[Member]] = []
        arch_of, n_train = self.problem.arch_of, self.problem.data.n_train
        for arch, lanes in enumerate(self._lanes):
            mine = [member for member in members if arch_of[member.client] == arch]
            mine.sort(key=lambda member: (-n_train(member.client), member.slot))
            groups += [mine[start : start + lanes] for start in range(0, len(mine), lanes)]
        return groups

    def _group_turns(self, number: int, group: list[Member]) -> list[Reply]:
        arch = self.problem.arch_of[group[0].client]
        if self._lanes[arch] > 1 and len(group) > 1:
            try:
                return self._mapped_turns(number, group)
            except (CannotMapError, RuntimeError, ValueError, TypeError) as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                log.warning("clients are trained one after another, since they cannot be mapped: %s", reason)
                self._lanes[arch] = 1
        return super().turns(number, group)

    def _mapped_turns(self, number: int, group: list[Member]) -> list[Reply]:
        p, started = self.problem, time.perf_counter()
        clients, downs = [member.client for member in group], [member.message for member in group]
        sites = [self._site(number, i, "train", False, p.data.augmented) for i in clients]
        gradients = self._gradients_of(clients[0])
        done = run_turns(p.method, gradients, [self._whole(i) for i in clients], downs, sites, number)
        seconds = (time.perf_counter() - started) / len(clients)
        replies = []
        for member, outcome in zip(group, done, strict=True):
            self._keep(member.client, outcome)
            turn, logs, by_phase = outcome.turn, outcome.logs, outcome.seconds
            replies.append(
                Reply(member.client, member.slot, outcome.uplink, turn.examples, turn.steps, logs, seconds, by_phase)
            )
        return replies
