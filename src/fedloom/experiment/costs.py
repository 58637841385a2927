"""The cost of a client's local update by phase: floating-point operations and memory, which are counted on a few steps, not timed."""

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
from fedloom.inputs import map_inputs, tensors_of
from fedloom.method import Client, Downlink, Phase, Set, Sweep, Turn, active_trains
from fedloom.nets import frozen_parameters, read_weights
from fedloom.rng import Stream
from fedloom.training.batches import Plan, Rows
from fedloom.training.context import ClientContext
from fedloom.training.dispatch import DispatchMode
from fedloom.training.gradients import Gradients
from fedloom.training.sweeps import EVAL_BATCH
from fedloom.training.turn import run_phases
from fedloom.tree import Tree

STRIDE = 6  # counted batches have 6, 12 and 18 examples, because a method may divide a batch into halves or thirds


class Costs:
    """Floating-point operations and memory of the local updates of a problem's clients.

    Matrix products, convolutions and attention are counted, forward and backward, with torch's formulas. A multiply-add counts as two
    operations. A step on B examples takes a + b B + c B^2 operations, so the counts of three small steps determine the count for every B.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._polynomials: dict[Any, tuple[int, int, int]] = {}
        self._turns: dict[Any, dict[str, float]] = {}
        self._last: tuple[Any, dict[str, float]] = None, {}  # consecutive clients often have the same cost

    @cached_property
    def _gradients(self) -> list[Gradients]:
        return [
            Gradients(self.problem.modules(arch), objective=self.problem.task.objective, as_written=True)
            for arch in range(len(self.problem.archs))
        ]

    @cached_property
    def downlink(self) -> Downlink:
        """The server's message to one client in the first round."""
        method, task = self.problem.method, self.problem.task
        server = self.problem.init_server(read_weights(self._gradients[0].modules))
        # The server's state may contain one model per member of a cohort. The downlink is copied, so that this state can be released.
        down = method.downlink(server, list(range(task.max_cohort)), self.problem.round("downlink", 0))
        return Downlink(tree.clone(down.to(0)))

    def received(self, i: int) -> Client:
        """Return client `i` with its initial state, after the first downlink."""
        p = self.problem
        client = p.initial(i, read_weights(self._gradients[p.arch_of[i]].modules))
        weights = p.method.receive(client.weights, self.downlink.to(0), client.memory)
        return client._replace(weights=weights)

    def flops(self, i: int, number: int) -> dict[str, float]:
        """Return the number of floating-point operations of client `i`'s local update in round `number`, by phase."""
        p, n = self.problem, self.problem.data.n_train(i)
        asked = p.arch_of[i], n, self._n_valid(i), p.plan_of(i), number
        if self._last[0] != asked:
            self._last = asked, self._flops(i, number)
        return self._last[1]

    def _flops(self, i: int, number: int) -> dict[str, float]:
        p, n = self.problem, self.problem.data.n_train(i)
        turn = Turn(number, p.task.rounds - 1, n, closing=number >= p.task.rounds)
        phases = p.method.phases()
        active = tuple((phase.works_in(turn), len(active_trains(phase, turn))) for phase in phases)
        key = p.arch_of[i], n, self._n_valid(i), p.plan_of(i), active
        if key not in self._turns:
            self._turns[key] = {
                phase.name: float(self._phase_flops(phase, i, turn, (p.arch_of[i], phase.name, active)))
                for phase in phases
            }
        return self._turns[key]

    def _phase_flops(self, phase: Phase, i: int, turn: Turn, key: Any) -> int:
        if key not in self._polynomials:
            few = (self._counted(phase, i, n * STRIDE, turn) for n in (1, 2, 3))
            self._polynomials[key] = _differences(*few)
        on_valid = isinstance(phase, Sweep) and phase.rows == "valid"
        sizes = pieces(phase, self.problem.plan_of(i), (on_valid and self._n_valid(i)) or turn.examples)
        return sum(times * _value(self._polynomials[key], size) for size, times in sizes.items())

    def _n_valid(self, i: int) -> int:
        """Return the number of client `i`'s validation examples, or 0 if no phase visits them."""
        return self.problem.data.n_valid(i) if self.problem.uses_valid else 0

    def _counted(self, phase: Phase, i: int, n: int, turn: Turn) -> int:
        """Return the number of operations of one step, or one sweep, on `n` examples of client `i`.

        If it has fewer, examples are repeated.
        """
        p, (x, y) = self.problem, self.problem.data.train(i)
        rows = Rows(map_inputs(lambda v: v[torch.arange(n) % len(v)], x), y[torch.arange(n) % len(y)])
        site = ClientContext(rows=rows, plan=Plan(n), task=p.task, rng=Stream(p.seed, "costs"))
        with Operations() as counter:
            gradients = self._gradients[p.arch_of[i]]
            run_phases((shortened(phase, 1),), gradients, self.received(i), self._down, site, turn=turn)
        return counter.flops  # type: ignore[no-any-return]

    @property
    def _down(self) -> Tree:
        return self.downlink.to(0)

    def largest(self, arch: int) -> int | None:
        """Return the client with the most training examples among those with the architecture `arch`, or None if none has examples."""
        p = self.problem
        members = [i for i, mine in enumerate(p.arch_of) if mine == arch and p.data.n_train(i)]
        return max(members, key=p.data.n_train) if members else None

    def busiest(self, i: int) -> Turn:
        """Return client `i`'s first local update with the largest number of active phases."""
        p = self.problem
        phases, rounds = p.method.phases(), p.task.rounds
        turns = (Turn(number, rounds - 1, p.data.n_train(i)) for number in range(rounds))
        return max(turns, key=lambda turn: sum(len(active_trains(phase, turn)) for phase in phases))

    def peak_bytes(self, i: int) -> dict[str, int]:
        """Return the peak memory of client `i`'s tensors in bytes, by phase. The peak of the local update is the maximum over phases.

        This includes the client's examples, its complete state, the downlink, and every tensor that a step creates, but neither temporary
        memory inside an operation nor Python objects. Each phase is tracked for two steps, because later steps use the same amount of
        memory.
        """
        p, (x, y) = self.problem, self.problem.data.train(i)
        site = ClientContext(rows=Rows(x, y), plan=p.plan, task=p.task, rng=Stream(p.seed, "costs"))
        turn, client = self.busiest(i), self.received(i)
        peaks: dict[str, int] = {}
        frozen = frozen_parameters(self._gradients[p.arch_of[i]].modules)
        with Live([*tensors_of(x), y, *frozen, *tree.leaves(client._asdict()), *tree.leaves(self._down)]) as live:
            for phase in p.method.phases():
                live.peak = live.now
                gradients = self._gradients[p.arch_of[i]]
                client = run_phases((shortened(phase, 2),), gradients, client, self._down, site, turn=turn)[0]
                peaks[phase.name] = live.peak
        return peaks

    def peak_client_bytes(self) -> int:
        """Return the maximum over clients of the peak memory of their tensors, in bytes.

        Each architecture is measured on its largest client.
        """
        clients = (self.largest(arch) for arch in range(len(self.problem.archs)))
        return max(max(self.peak_bytes(i).values()) for i in clients if i is not None)


class Operations(DispatchMode):  # type: ignore[no-untyped-call]
    """Count floating-point operations with torch's own formulas."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Count one operation, or decompose it if it consists of other operations (such as a linear layer in inference mode)."""
        count = flop_registry.get(func._overloadpacket)
        if count is None:
            with self:
                made = func.decompose(*args, **(kwargs or {}))
            return func(*args, **(kwargs or {})) if made is NotImplemented else made
        made = func(*args, **(kwargs or {}))
        self.flops += count(*args, **(kwargs or {}), out_val=made)
        return made


class Live(DispatchMode):  # type: ignore[no-untyped-call]
    """Tracks the tensors that are created within the context: their current number of bytes, and the peak."""

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        """Start with the tensors in `held`, which already exist."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()
        for tensor in held:
            self._add(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Run one operation and track its outputs."""
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
    """Return the phase with the given number of steps. A phase without steps is returned unchanged."""
    return phase if isinstance(phase, Sweep | Set) else dataclasses.replace(phase, steps=steps)


def pieces(phase: Phase, plan: Plan, n: int) -> Mapping[int, int]:
    """Return how often a phase processes batches of each size for a client with `n` examples, as `{examples: times}`."""
    if isinstance(phase, Set):
        return {n: 1}
    if isinstance(phase, Sweep):
        return Counter(min(EVAL_BATCH, n - start) for start in range(0, n, EVAL_BATCH))
    return Counter(len(batch) for batch in plan.batches(n, phase.epochs, phase.steps, Stream("sizes")))


def _differences(first: int, second: int, third: int) -> tuple[int, int, int]:
    return first, second - first, third - 2 * second + first


def _value(differences: tuple[int, int, int], n: int) -> int:
    """Return the value at `n` of the quadratic function through the three counted values (Newton's formula, rounded to an integer)."""
    first, slope, curve = differences
    away, square = n - STRIDE, 2 * STRIDE**2
    return (square * first + 2 * STRIDE * away * slope + away * (away - STRIDE) * curve + square // 2) // square
