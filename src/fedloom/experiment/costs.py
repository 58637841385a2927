"""What a client's turn costs, phase by phase: floating-point operations and memory. Counted on a few steps, never by a clock."""

from __future__ import annotations

import dataclasses
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from fedloom import tree
from fedloom.engines.base import Problem
from fedloom.method import Client, Downlink, Free, Phase, Sweep, Turn, trains_of
from fedloom.nets import frozen_parameters, read_weights
from fedloom.rng import Stream
from fedloom.training.batches import Plan, Rows
from fedloom.training.context import ClientContext
from fedloom.training.dispatch import DispatchMode
from fedloom.training.gradients import Gradients
from fedloom.training.sweeps import EVAL_BATCH
from fedloom.training.turn import run_phases
from fedloom.tree import Tree

FEWEST = 2  # rows of the smallest batch that is counted: BatchNorm cannot train on one


class Costs:
    """Floating-point operations and memory of the turns of one problem's clients.

    Operations are those of matrix products, convolutions and attention, forward and backward, as torch counts them: two for a
    multiplication with an addition. A step on B rows takes a + b B + c B^2 of them, so three small steps tell all others.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._polynomials: dict[Any, tuple[int, int, int]] = {}
        self._turns: dict[Any, dict[str, float]] = {}
        self._last: tuple[Any, dict[str, float]] = None, {}  # many clients in a row have the same work

    @cached_property
    def _gradients(self) -> list[Gradients]:
        return [Gradients(self.problem.modules(arch), as_written=True) for arch in range(len(self.problem.archs))]

    @cached_property
    def downlink(self) -> Downlink:
        """What the server sends to one client in the first round."""
        method, task = self.problem.method, self.problem.task
        server = self.problem.init_server(read_weights(self._gradients[0].modules))
        # a copy, since a server may hold a model for every member of a cohort
        return Downlink(tree.clone(method.downlink(server, list(range(task.max_cohort))).to(0)))

    def received(self, i: int) -> Client:
        """Client `i` with its initial state, after the first downlink."""
        p = self.problem
        client = p.initial(i, read_weights(self._gradients[p.arch_of[i]].modules))
        weights = p.method.receive(client.weights, self.downlink.to(0), client.memory)
        return client._replace(weights=weights)

    def flops(self, i: int, number: int) -> dict[str, float]:
        """Floating-point operations of client `i`'s turn in round `number`, by phase."""
        p, n = self.problem, self.problem.data.n_train(i)
        asked = p.arch_of[i], n, p.plan_of(i), number
        if self._last[0] != asked:
            self._last = asked, self._flops(i, number)
        return self._last[1]

    def _flops(self, i: int, number: int) -> dict[str, float]:
        p, n = self.problem, self.problem.data.n_train(i)
        turn = Turn(number, p.task.rounds - 1, n)
        phases = p.method.phases()
        active = tuple(train.works_in(turn) for train in trains_of(phases))
        key = p.arch_of[i], n, p.plan_of(i), active
        if key not in self._turns:
            self._turns[key] = {
                phase.name: float(self._phase_flops(phase, i, turn, (p.arch_of[i], phase.name, active)))
                for phase in phases
            }
        return self._turns[key]

    def _phase_flops(self, phase: Phase, i: int, turn: Turn, key: Any) -> int:
        if key not in self._polynomials:
            few = (self._counted(phase, i, n, turn) for n in range(FEWEST, FEWEST + 3))
            self._polynomials[key] = _differences(*few)
        sizes = pieces(phase, self.problem.plan_of(i), turn.examples)
        return sum(times * _value(self._polynomials[key], size) for size, times in sizes.items())

    def _counted(self, phase: Phase, i: int, n: int, turn: Turn) -> int:
        """The operations of one step, or one sweep, on `n` rows of client `i`, repeated where it has fewer."""
        p, (x, y) = self.problem, self.problem.data.train(i)
        rows = Rows(x[torch.arange(n) % len(x)], y[torch.arange(n) % len(y)])
        site = ClientContext(rows=rows, plan=Plan(n), task=p.task, rng=Stream(p.seed, "costs"))
        with Operations() as counter:
            gradients = self._gradients[p.arch_of[i]]
            run_phases((shortened(phase, 1),), gradients, self.received(i), self._down, site, turn=turn)
        return counter.flops  # type: ignore[no-any-return]

    @property
    def _down(self) -> Tree:
        return self.downlink.to(0)

    def largest(self, arch: int) -> int | None:
        """The client of an architecture with the most training rows; None where none has any."""
        p = self.problem
        members = [i for i, mine in enumerate(p.arch_of) if mine == arch and p.data.n_train(i)]
        return max(members, key=p.data.n_train) if members else None

    def busiest(self, i: int) -> Turn:
        """Client `i`'s first turn in which as many phases as ever are switched on."""
        p = self.problem
        trains, rounds = trains_of(p.method.phases()), p.task.rounds
        turns = (Turn(number, rounds - 1, p.data.n_train(i)) for number in range(rounds))
        return max(turns, key=lambda turn: sum(train.works_in(turn) for train in trains))

    def peak_bytes(self, i: int) -> dict[str, int]:
        """The most bytes that client `i`'s tensors take at once, by phase; the turn's peak is the largest of them.

        Counted are its rows, all that it keeps, the downlink, and every tensor that a step makes; not what an operation borrows
        inside, nor Python itself. A phase is followed for two steps, whose memory is that of all others.
        """
        p, (x, y) = self.problem, self.problem.data.train(i)
        site = ClientContext(rows=Rows(x, y), plan=p.plan, task=p.task, rng=Stream(p.seed, "costs"))
        turn, client = self.busiest(i), self.received(i)
        peaks: dict[str, int] = {}
        frozen = frozen_parameters(self._gradients[p.arch_of[i]].modules)
        with Live([x, y, *frozen, *tree.leaves(client._asdict()), *tree.leaves(self._down)]) as live:
            for phase in p.method.phases():
                live.peak = live.now
                gradients = self._gradients[p.arch_of[i]]
                client = run_phases((shortened(phase, 2),), gradients, client, self._down, site, turn=turn)[0]
                peaks[phase.name] = live.peak
        return peaks

    def peak_client_bytes(self) -> int:
        """The most bytes that any client's tensors take at once; every architecture is tried on its largest client."""
        clients = (self.largest(arch) for arch in range(len(self.problem.archs)))
        return max(max(self.peak_bytes(i).values()) for i in clients if i is not None)


class Operations(DispatchMode):  # type: ignore[no-untyped-call]
    """Counts floating-point operations by torch's own formulas."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """One operation; one that consists of others (a linear layer, in inference mode) is taken apart."""
        count = flop_registry.get(func._overloadpacket)
        if count is None:
            with self:
                made = func.decompose(*args, **(kwargs or {}))
            return func(*args, **(kwargs or {})) if made is NotImplemented else made
        made = func(*args, **(kwargs or {}))
        self.flops += count(*args, **(kwargs or {}), out_val=made)
        return made


class Live(DispatchMode):  # type: ignore[no-untyped-call]
    """Follows the tensors that are made while it lasts: bytes alive now, and the most so far."""

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        """`held` are tensors that are there already."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()
        for tensor in held:
            self._add(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """One operation."""
        made = func(*args, **(kwargs or {}))
        for leaf in tree_iter(made):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return made

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place, n_bytes = storage._cdata, storage.nbytes()
        if place not in self._known:
            self._known.add(place)
            self.now += n_bytes
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, place, n_bytes)

    def _drop(self, place: int, n_bytes: int) -> None:
        self._known.discard(place)
        self.now -= n_bytes


def shortened(phase: Phase, steps: int) -> Phase:
    """A phase with so many steps; one that has none stays as it is."""
    return phase if isinstance(phase, Sweep | Free) else dataclasses.replace(phase, steps=steps)


def pieces(phase: Phase, plan: Plan, n: int) -> Mapping[int, int]:
    """How often a phase works on how many of a client's `n` rows at once: `{rows: times}`."""
    if isinstance(phase, Free):
        return {n: 1}
    if isinstance(phase, Sweep):
        return Counter(min(EVAL_BATCH, n - start) for start in range(0, n, EVAL_BATCH))
    return Counter(len(batch) for batch in plan.batches(n, phase.epochs, phase.steps, Stream("sizes")))


def _differences(first: int, second: int, third: int) -> tuple[int, int, int]:
    return first, second - first, third - 2 * second + first


def _value(differences: tuple[int, int, int], n: int) -> int:
    """Newton's formula: the quadratic through three neighbouring sizes, exact in whole numbers."""
    first, slope, curve = differences
    away = n - FEWEST
    return first + away * slope + away * (away - 1) // 2 * curve
