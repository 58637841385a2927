"""Clients of one architecture side by side, in this process: one batched operation in place of many small ones.

Made for accelerators, where small models wait for launches, and for small matmul-only models. On a CPU convolutions lose by it
(batched weights make grouped convolutions), and `auto` does not choose it there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from fedloom import tree
from fedloom.accelerator import HOST, ON_HOST, DeviceBudget, free_bytes
from fedloom.engines.base import Problem, Reply
from fedloom.engines.local import CohortMember
from fedloom.engines.sequential import Sequential
from fedloom.method import Turn, trains_of
from fedloom.training.choose import Convolutions
from fedloom.training.lanes import CannotMapError, client_updates
from fedloom.training.turn import UpdateResult

LANES_BYTES = 1 << 28  # stacked weights of a group; activations and optimiser states come on top
MOST_LANES = 64
MOST_LANES_ON_DEVICE = 256
TIMES_WEIGHTS = (
    8  # on a device: what a lane holds beside its activations (received, gradients, moments, a recording's copies)
)

log = logging.getLogger(__name__)


class Vectorised(Sequential):
    """Lanes of stacked clients; falls back to one after another, with a warning that says why, where a method cannot be mapped."""

    def __init__(
        self,
        problem: Problem,
        lanes: int | None = None,
        place: DeviceBudget = ON_HOST,
        convolutions: Convolutions | None = None,
    ) -> None:
        super().__init__(problem, place, convolutions)
        self._lanes = [lanes or self._lanes_for(arch) for arch in range(len(problem.archs))]

    def _lanes_for(self, arch: int) -> int:
        """By memory; nobody knows what activations take before a step was made, so on a device too many are halved (`_group_turns`)."""
        size, most, room = tree.n_bytes(self.initial(arch)), MOST_LANES, LANES_BYTES
        if self.device != HOST:
            size, most, room = TIMES_WEIGHTS * size, MOST_LANES_ON_DEVICE, free_bytes(self.device) // 2
        return max(1, min(most, room // max(size, 1)))

    def updates(self, number: int, members: Sequence[CohortMember]) -> Iterator[Reply]:
        """See `LocalEngine.updates`."""
        for group in self._groups(number, members):
            yield from self._group_turns(number, group)

    def _groups(self, number: int, members: Sequence[CohortMember]) -> list[list[CohortMember]]:
        """Clients of one architecture with the same work and similar numbers of rows together, as many as there are lanes."""
        alike: dict[tuple[int, tuple[str, ...]], list[CohortMember]] = {}
        p, trains = self.problem, trains_of(self.problem.method.phases())
        for member in sorted(members, key=lambda member: (-p.data.n_train(member.client), member.slot)):
            turn = Turn(number, p.task.rounds - 1, p.data.n_train(member.client))
            work = tuple(train.name for train in trains if train.works_in(turn))
            alike.setdefault((p.arch_of[member.client], work), []).append(member)
        sizes = [(mine, self._lanes[arch]) for (arch, _), mine in alike.items()]
        return [mine[start : start + lanes] for mine, lanes in sizes for start in range(0, len(mine), lanes)]

    def _group_turns(self, number: int, group: list[CohortMember]) -> Iterator[Reply]:
        arch = self.problem.arch_of[group[0].client]
        if self._lanes[arch] == 1 or len(group) == 1:
            yield from super().updates(number, group)
            return
        try:
            done, share = self._mapped_turns(number, group)
        except torch.OutOfMemoryError:
            self._lanes[arch] = len(group) // 2
            log.warning("%d clients side by side are too many for the device's memory; halved from now on", len(group))
        except (CannotMapError, RuntimeError, ValueError, TypeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            log.warning("clients are trained one after another, since they cannot be mapped: %s", reason)
            self._lanes[arch] = 1
        else:
            for member, end in zip(group, done, strict=True):
                yield self._ended(number, member, end, time.perf_counter() - share)
            return
        lanes = self._lanes[arch]
        for start in range(0, len(group), lanes):
            yield from self._group_turns(number, group[start : start + lanes])

    def _ended(self, number: int, member: CohortMember, end: Callable[[], UpdateResult], started: float) -> Reply:
        """The reply to a turn that began at `started`, as it were, after its end."""
        try:
            done = end()
        except Exception as error:
            error.add_note(f"client {member.client}, round {number}")
            raise
        return self.finish(member, done, started)

    def _mapped_turns(self, number: int, group: list[CohortMember]) -> tuple[list[Callable[[], UpdateResult]], float]:
        """What ends each turn, and each turn's share of the seconds so far. Nothing is kept yet."""
        p, started = self.problem, time.perf_counter()
        clients, downs = [member.client for member in group], [self.to_device(member.message) for member in group]
        rows = zip(clients, self.data.train_of(clients), strict=True)
        sites = [self.context(number, i, "train", False, own) for i, own in rows]
        gradients = self.gradients_of(clients[0])
        done = client_updates(p.method, gradients, [self.load(i) for i in clients], downs, sites, number=number)
        if self.device != HOST:  # all at once: what does not fit its memory must show before anything is kept
            done = [partial(_given, end()) for end in done]
        return done, (time.perf_counter() - started) / len(group)


def _given(outcome: UpdateResult) -> UpdateResult:
    return outcome
