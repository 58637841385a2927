"""Lanes: clients of one architecture are trained side by side, in one batched operation instead of many small ones.

This engine is for GPUs, on which small models spend most of their time on kernel launches, and for small models without convolutions. On a
CPU, models with convolutions become slower, because batched weights turn them into grouped convolutions. `auto` therefore does not choose
this engine on a CPU.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import nn

from fedloom import tree
from fedloom.accelerator import HOST, ON_HOST, DeviceBudget, free_bytes
from fedloom.engines.base import Problem, Reply
from fedloom.engines.local import CohortMember, note_client
from fedloom.engines.sequential import Sequential
from fedloom.errors import first_line
from fedloom.method import active_trains
from fedloom.training.choose import Convolutions
from fedloom.training.lanes import CannotMapError, client_updates
from fedloom.training.turn import UpdateResult, turn_of

LANES_BYTES = 1 << 28  # limit on the stacked weights of a group, excluding activations and optimiser states
MOST_LANES = 64
MOST_LANES_ON_DEVICE = 256
TIMES_WEIGHTS = (
    8  # a lane's GPU memory without activations (received, gradients, moments, a graph's copies) over its weights
)

log = logging.getLogger(__name__)


class Vectorised(Sequential):
    """An engine that trains stacked clients in lanes.

    If a method cannot be vectorised, or if a model is recurrent, clients run one after another, and a warning states the reason.
    """

    def __init__(
        self,
        problem: Problem,
        lanes: int | None = None,
        place: DeviceBudget = ON_HOST,
        convolutions: Convolutions | None = None,
    ) -> None:
        super().__init__(problem, place, convolutions)
        self._lanes = [self._lanes_for(arch, lanes) for arch in range(len(problem.archs))]

    def _lanes_for(self, arch: int, lanes: int | None) -> int:
        """Return the number of lanes: 1 for a recurrent model, and otherwise `lanes`, or by default as many as fit into memory.

        On a GPU, the size of the activations is unknown before the first step, so `_group_turns` halves the number if necessary.
        """
        if _is_recurrent(self.modules()[arch]):
            name = self.problem.archs[arch].name
            log.warning("model=%s: clients run one after another, because recurrent layers are slower in lanes", name)
            return 1
        if lanes:
            return lanes
        size, most, room = tree.n_bytes(self.initial(arch)), MOST_LANES, LANES_BYTES
        if self.device != HOST:
            size, most, room = TIMES_WEIGHTS * size, MOST_LANES_ON_DEVICE, free_bytes(self.device) // 2
        return max(1, min(most, room // max(size, 1)))

    def updates(self, number: int, members: Sequence[CohortMember]) -> Iterator[Reply]:
        """See `LocalEngine.updates`."""
        for group in self._groups(number, members):
            yield from self._group_turns(number, group)

    def _groups(self, number: int, members: Sequence[CohortMember]) -> list[list[CohortMember]]:
        """Return groups of clients, each with at most as many clients as there are lanes.

        Clients of a group have the same architecture, the same phases, messages of the same form and similar numbers of examples.
        """
        alike: dict[tuple[int, tuple[str, ...], object], list[CohortMember]] = {}
        messages = {id(member.message): member.message for member in members}  # often one message for all clients
        forms = {key: tuple(tree.structure(message).items()) for key, message in messages.items()}
        p, phases = self.problem, self.problem.method.phases()
        for member in sorted(members, key=lambda member: (-p.data.n_train(member.client), member.slot)):
            turn = turn_of(p.method, p.task, number, p.data.n_train(member.client))
            work = tuple(phase.name for phase in phases if phase.works_in(turn))
            work += tuple(train.name for phase in phases for train in active_trains(phase, turn))
            kind = p.arch_of[member.client], work, forms[id(member.message)]
            alike.setdefault(kind, []).append(member)
        sizes = [(mine, self._lanes[kind[0]]) for kind, mine in alike.items()]
        return [mine[start : start + lanes] for mine, lanes in sizes for start in range(0, len(mine), lanes)]

    def _group_turns(self, number: int, group: list[CohortMember]) -> Iterator[Reply]:
        arch = self.problem.arch_of[group[0].client]
        if self._lanes[arch] == 1 or len(group) == 1:
            yield from super().updates(number, group)
            return
        try:
            done, share = self._mapped_turns(number, group)
        except (torch.OutOfMemoryError, MemoryError):
            self._lanes[arch] = len(group) // 2
            log.warning(
                "%d clients side by side do not fit in memory; half as many are trained side by side from now on",
                len(group),
            )
        except (CannotMapError, RuntimeError, ValueError, TypeError) as error:
            log.warning("clients run one after another, because they cannot be vectorised: %s", first_line(error))
            self._lanes[arch] = 1
        else:
            for member, end in zip(group, done, strict=True):
                yield self._ended(number, member, end, time.perf_counter() - share)
            return
        lanes = self._lanes[arch]
        for start in range(0, len(group), lanes):
            yield from self._group_turns(number, group[start : start + lanes])

    def _ended(self, number: int, member: CohortMember, end: Callable[[], UpdateResult], started: float) -> Reply:
        """Finish a local update and return its reply. `started` is the start time, set back by the client's share of the group's time."""
        try:
            done = end()
        except Exception as error:
            note_client(error, member.client, number)
            raise
        return self.finish(member, done, started)

    def _mapped_turns(self, number: int, group: list[CohortMember]) -> tuple[list[Callable[[], UpdateResult]], float]:
        """Return one function per client that finishes its update, and the share of each client in the seconds so far.

        Nothing is stored yet.
        """
        p, started = self.problem, time.perf_counter()
        clients, downs = [member.client for member in group], [self.to_device(member.message) for member in group]
        rows = zip(clients, self.data.train_of(clients), strict=True)
        sites = [self.context(number, i, "train", False, own) for i, own in rows]
        gradients = self.gradients_of(clients[0])
        done = client_updates(p.method, gradients, [self.load(i) for i in clients], downs, sites, number=number)
        if self.device != HOST:  # finish all now, so that a lack of memory is detected before anything is stored
            done = [partial(_given, end()) for end in done]
        return done, (time.perf_counter() - started) / len(group)


def _is_recurrent(modules: Mapping[str, nn.Module]) -> bool:
    """Return whether a module contains torch's LSTM, GRU or RNN.

    vmap cannot batch these over clients, and takes several times as long.
    """
    return any(isinstance(part, nn.RNNBase) for module in modules.values() for part in module.modules())


def _given(outcome: UpdateResult) -> UpdateResult:
    return outcome
