"""The expected form of uplinks, derived by calling the method's own `uplink` for a client that has received its
message but not trained.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fedloom import tree
from fedloom.engines.base import Problem
from fedloom.method import Interleave, Turn, trains_of
from fedloom.nets import read_weights
from fedloom.rng import Stream
from fedloom.tree import Tree, Weights


class UplinkForm(NamedTuple):
    """The uplink of a client that has received its message but has not trained."""

    uplink: Tree  # the uplink as returned by the method
    travels: Tree  # the uplink as it is sent
    structure: dict[str, tuple[tuple[int, ...], torch.dtype]]  # structure of `travels`


class UplinkForms:
    """The uplink forms of one problem, each of which is derived once."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._initial: dict[int, Weights] = {}  # by architecture
        self._known: dict[tuple[int, object, bool], UplinkForm] = {}
        self._last: tuple[Tree, object] = {}, ()  # the latest downlink and its structure, which many clients share

    def of(self, number: int, i: int, down: Tree) -> UplinkForm:
        """Return the form of client `i`'s uplink in round `number`. `down` is the decoded message to the client."""
        p, arch = self._problem, self._problem.arch_of[i]
        if self._last[0] is not down:
            self._last = down, tuple(tree.structure(down).items())
        last = p.task.rounds - 1
        key = arch, self._last[1], number > last
        if key not in self._known:
            if arch not in self._initial:
                self._initial[arch] = read_weights(p.modules(arch))
            client = p.initial(i, self._initial[arch])
            received = p.method.receive(client.weights, down, client.memory)
            phases = p.method.phases()
            names = [phase.name for phase in phases if isinstance(phase, Interleave)]
            names += [train.name for train in trains_of(phases)]
            turn = Turn(number, last, 1, dict.fromkeys(names, 1), closing=number > last)
            uplink, _ = p.method.uplink(client._replace(weights=received), received, down, turn)
            codec = p.codec.only(uplink) if turn.closing else p.codec
            travels, _ = codec.reply(uplink, down, client.unsent, Stream())
            self._known[key] = UplinkForm(uplink, travels, tree.structure(travels))
        return self._known[key]
