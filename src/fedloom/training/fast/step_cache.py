"""Steps that are replayed where that is faster and gives the same bits.

A step of a small model costs more in Python and autograd than in arithmetic. So when a kind of step turns out to be short, it
is traced into a flat list of tensor operations; if replaying the list is faster and gives the same bits, it is replayed from
then on. Whatever cannot be traced, and nets with buffers (BatchNorm changes them on the way), is computed as written. On a CUDA
device a step of any length, with buffers or without, is recorded as a CUDA graph (`cuda_graph.py`) and judged in the same way.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedloom import tree
from fedloom.accelerator import HOST, synchronise
from fedloom.training.fast.cpu_trace import Step, trace
from fedloom.training.fast.cuda_graph import Found, Recording, record_graph, twin
from fedloom.tree import Tree

log = logging.getLogger(__name__)

SHORT_S = 0.002  # a step that takes longer is mostly arithmetic, which a replay does not shorten
TRIALS = 30  # steps of a kind before it is judged
REPEATS = 5  # timings of each way
MOST_KINDS = 256  # of steps; a loss that is made anew in every turn would make ever more of them
MOST_RECORDINGS = 16  # each holds memory of the device; the commonest kinds of step get there first


class Replayed:
    """Runs steps; remembers which kinds of them to replay."""

    def __init__(self, device: torch.device, replays: Replays) -> None:
        self._device, self._replays = device, replays
        self._numbers: dict[Any, int] = {}
        self._kinds: dict[Any, _Kind] = {}

    def number(self, what: Any) -> int | None:
        """A number that stands for a part of keys, which would be slow to compare in every step; None: such steps run as written."""
        try:
            known = self._numbers.get(what)
        except TypeError:  # something in it cannot be told from its like: a loss with a list, say
            return None
        if known is None and len(self._numbers) < MOST_KINDS:
            known = self._numbers[what] = len(self._numbers)
        return known

    def __call__(self, key: Any, written: Step, inputs: Tree, n_lanes: int = 1) -> Found:
        """A step as written, or its replay once that has proved itself; `key` tells kinds of step apart."""
        kind = self._kinds.get(key)
        if kind is None:
            if len(self._kinds) == MOST_KINDS:
                return written(inputs)
            kind = self._kinds[key] = _Kind(self._replays.longest_s)
        if kind.replay is not None:
            return kind.replay(inputs)
        started = time.perf_counter()
        found = written(inputs)
        if kind.is_worth_a_trial((time.perf_counter() - started) / n_lanes) and self._n_replays < self._replays.most:
            with torch.random.fork_rng(_indices(self._device)):  # the trial must not move the phase's generator
                kind.replay = faster_replay(written, inputs, self._replays.make, self._device)
        return found

    @property
    def _n_replays(self) -> int:
        return sum(kind.replay is not None for kind in self._kinds.values())


def fingerprint(value: Any) -> Any:
    """What stands for a function in a key: its code and all that a trace bakes in with it, which is what it is bound to, or encloses.

    Bound methods, lambdas and partial functions are other objects each time they are made. Anything else stands for itself.
    """
    if isinstance(value, functools.partial):
        return fingerprint(value.func), value.args, tuple(value.keywords.items())
    function = getattr(value, "__func__", value)
    code = getattr(function, "__code__", None)
    if code is None:
        return value
    enclosed = tuple(fingerprint(cell.cell_contents) for cell in function.__closure__ or ())
    defaults = function.__defaults__, tuple((function.__kwdefaults__ or {}).items())
    return code, getattr(value, "__self__", None), enclosed, defaults


class _Kind:
    """Steps of one `Train` on batches of one shape."""

    def __init__(self, longest_s: float) -> None:
        self.replay: Step | None = None
        self._left, self._best, self._longest = TRIALS, float("inf"), longest_s

    def is_worth_a_trial(self, seconds: float) -> bool:
        """Whether now is the time to try a replay: once, after some steps, if the shortest was short."""
        self._left -= 1
        self._best = min(self._best, seconds)
        return self._left == 0 and self._best < self._longest


class Replays(NamedTuple):
    """How steps are replayed on some device."""

    make: Callable[[Step, Tree], Step]  # (a step, inputs of its kind) -> its replay
    longest_s: float  # steps that take longer are not tried
    most: float  # replays of one `Gradients`


def replays_on(device: torch.device, stateful: bool) -> Replays | None:
    """How steps are replayed on a device, `stateful` ones where nets have buffers; None: not at all."""
    if device.type == "cuda":
        return Replays(lambda step, inputs: Recording(step, inputs, record_graph), float("inf"), MOST_RECORDINGS)
    return Replays(trace, SHORT_S, float("inf")) if device == HOST and not stateful else None


def replayed_on(device: torch.device, stateful: bool) -> Replayed | None:
    """What runs steps on a device; see `replays_on`."""
    replays = replays_on(device, stateful)
    return None if replays is None else Replayed(device, replays)


def faster_replay(
    step: Step,
    inputs: Tree,
    make: Callable[[Step, Tree], Step],
    device: torch.device,
) -> Step | None:
    """A replay of `step` that gives the same bits in less time, or None; judged on inputs of its own, different in every leaf."""
    inputs = tree.map_tree(_varied, inputs)
    try:
        replay = make(step, inputs)
        other = tree.map_tree(_varied, inputs)
        mine, theirs = tree.map_tree(twin, other), tree.map_tree(twin, other)  # buffers change on the way
        found = zip((*replay(mine), mine["buffers"]), (*_with_grad(step, theirs), theirs["buffers"]), strict=True)
        same = all(a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in found)
        slow = _shortest(lambda: _with_grad(step, other), device)
        fast = _shortest(lambda: replay(other), device)
    except Exception as error:  # whatever a replay cannot do (a value read out of a tensor, ...) runs as written
        _say(device, f"{type(error).__name__}: {error}")
        return None
    if not same:
        _say(device, "a replay gave other bits")
    return replay if same and fast < 0.95 * slow else None


def _say(device: torch.device, why: str) -> None:
    """One line; on the host, where little is lost by it, it would be noise."""
    if device != HOST:
        log.warning("steps of a kind run as written, without a CUDA graph: %s", why.splitlines()[0])


def _varied(leaf: Tensor) -> Tensor:
    """A copy with slightly other numbers.

    Whole numbers (labels) are drawn anew from those that are there. A tensor that stands in two places (the received weights are both
    parameters and part of the downlink) would be traced as one.
    """
    other = twin(leaf)
    if leaf.is_floating_point():
        return other.mul_(1 + 0.01 * torch.rand_like(leaf))
    if not leaf.numel():
        return other
    return other.copy_(leaf.flatten()[torch.randint(leaf.numel(), leaf.shape, device=leaf.device)])


def _indices(device: torch.device) -> list[int]:
    """The device as `fork_rng` wants it."""
    return [device.index] if device.type == "cuda" else []


def _with_grad(step: Step, inputs: Tree) -> Found:
    with torch.enable_grad():
        return step(inputs)


def _shortest(work: Callable[[], Any], device: torch.device) -> float:
    times = []
    for _ in range(REPEATS):
        synchronise(device)
        started = time.perf_counter()
        work()
        synchronise(device)
        times.append(time.perf_counter() - started)
    return min(times)
