"""A cache of steps. A step is replayed if the replay is faster and gives the same bits.

A step of a small model spends more time in Python and autograd than in arithmetic. If steps of one kind are short, the step is therefore
traced into a flat list of tensor operations (`cpu_trace.py`). If replaying the list is faster and gives the same bits, later steps of this
kind are replayed. Steps that cannot be traced, and steps of nets with buffers (which BatchNorm changes), run as written. On a CUDA device,
steps of any duration, with or without buffers, are recorded as CUDA graphs (`cuda_graph.py`) and tested in the same way.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedloom import tree
from fedloom.accelerator import HOST, shortest_s
from fedloom.method import Train
from fedloom.training.context import LocalWork
from fedloom.training.fast.cpu_trace import trace
from fedloom.training.fast.cuda_graph import Recording, record_graph, twin
from fedloom.training.steps import Step, StepResult
from fedloom.tree import Tree

log = logging.getLogger(__name__)

SHORT_S = 0.002  # a step that takes longer is mostly arithmetic, which a replay does not shorten
TRIALS = 30  # number of steps of one kind before a replay is tested
REPEATS = 5  # number of timings of each form
MOST_KINDS = 256  # maximum number; a loss that is recreated in every local update adds kinds
MOST_RECORDINGS = 16  # each recording uses device memory; the most frequent kinds are recorded first


class StepCache:
    """Stores which kinds of step are replayed."""

    def __init__(self, device: torch.device, rules: ReplayRules) -> None:
        self._device, self._rules = device, rules
        self._numbers: dict[Any, int] = {}
        self._kinds: dict[Any, _Kind] = {}

    def cached(self, step: Step, kind: Any, *, stacked: bool) -> Step:
        """Return a step that is replayed as soon as a replay has passed the test.

        Args:
            kind: identifies the step, together with the shapes of batches. A step with an unhashable kind runs as written.
            stacked: whether this is a step of several clients at once.
        """
        number = self._number(kind)
        if number is None:
            return step

        def run(inputs: Tree) -> StepResult:
            batch = inputs["batch"]
            key = number, tuple(inputs["wanted"]), form_of_batch(batch)
            return self._run(key, step, inputs, len(batch["y"]) if stacked else 1)

        return run

    def _number(self, kind: Any) -> int | None:
        """Return a number that represents a kind, because comparing the kinds themselves in every step would be slow."""
        try:
            known = self._numbers.get(kind)
        except TypeError:  # unhashable, e.g. a loss that closes over a list
            return None
        if known is None and len(self._numbers) < MOST_KINDS:
            known = self._numbers[kind] = len(self._numbers)
        return known

    def _run(self, key: Any, step: Step, inputs: Tree, n_clients: int) -> StepResult:
        kind = self._kinds.get(key)
        if kind is None:
            if len(self._kinds) == MOST_KINDS:
                return step(inputs)
            kind = self._kinds[key] = _Kind(self._rules.longest_s)
        if kind.replay is not None:
            return kind.replay(inputs)
        started = time.perf_counter()
        result = step(inputs)
        if kind.is_worth_a_trial((time.perf_counter() - started) / n_clients) and self._n_replays < self._rules.most:
            with torch.random.fork_rng(_indices(self._device)):  # the trial must not advance the generator of the phase
                kind.replay = faster_replay(step, inputs, self._rules.make, self._device)
        return result

    @property
    def _n_replays(self) -> int:
        return sum(kind.replay is not None for kind in self._kinds.values())


def kind_of(train: Train, work: LocalWork) -> Any:
    """Return the key of steps that share a trace: the loss, and the structure of everything that it may read except batches.

    The name of the phase alone is not sufficient: a downlink may gain a branch in a later round, and a training phase and an adaptation
    phase may have the same name.
    """
    return train.name, fingerprint(train.loss), train.modes, _form(work.down), _form(work.client.memory)


def form_of_batch(batch: Tree) -> Any:
    """Return the shapes of a batch (a tree)."""
    x = batch["x"]
    form: Any = (
        (x.shape, x.stride()) if isinstance(x, Tensor) else tuple((n, v.shape, v.stride()) for n, v in x.items())
    )
    return form, batch["y"].shape, _form(batch["draws"]), _form(batch["precomputed"])


def _form(tensors: Mapping[str, Any]) -> Any:
    return tuple(tree.structure(dict(tensors)).items()) if tensors else ()


def fingerprint(value: Any) -> Any:
    """Return the part of a key that identifies a function: its code, and the values that a trace makes constant (bound or closed over).

    Bound methods, lambdas and partial functions are new objects each time they are created, so their identity cannot be used as a key. All
    other objects are their own key.
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
        """Return whether to test a replay now: once, after `TRIALS` steps, if the fastest of these steps took less than `longest_s`."""
        self._left -= 1
        self._best = min(self._best, seconds)
        return self._left == 0 and self._best < self._longest


class ReplayRules(NamedTuple):
    """How steps are replayed on a device."""

    make: Callable[[Step, Tree], Step]  # (a step, its inputs) -> its replay
    longest_s: float  # steps that take longer are not tried
    most: float  # maximum number of replays in one cache


def replay_rules(device: torch.device, stateful: bool) -> ReplayRules | None:
    """Return how steps are replayed on a device, or None if they are not. `stateful` states whether nets have buffers."""
    if device.type == "cuda":
        return ReplayRules(lambda step, inputs: Recording(step, inputs, record_graph), float("inf"), MOST_RECORDINGS)
    return ReplayRules(trace, SHORT_S, float("inf")) if device == HOST and not stateful else None


def step_cache_for(device: torch.device, stateful: bool) -> StepCache | None:
    """Return a cache for steps on a device; see `replay_rules`."""
    rules = replay_rules(device, stateful)
    return None if rules is None else StepCache(device, rules)


def faster_replay(
    step: Step,
    inputs: Tree,
    make: Callable[[Step, Tree], Step],
    device: torch.device,
) -> Step | None:
    """Return a replay of `step` that gives the same bits in less time, or None. For the test, every leaf of the inputs gets new values."""
    inputs = tree.map_tree(_varied, inputs)
    try:
        replay = make(step, inputs)
        other = tree.map_tree(_varied, inputs)
        mine, theirs = tree.map_tree(twin, other), tree.map_tree(twin, other)  # a step changes buffers
        found = zip((*replay(mine), mine["buffers"]), (*_with_grad(step, theirs), theirs["buffers"]), strict=True)
        same = all(a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in found)
        slow = shortest_s(lambda: _with_grad(step, other), device, REPEATS)
        fast = shortest_s(lambda: replay(other), device, REPEATS)
    except Exception as error:  # steps that cannot be replayed (for example, because they read a value) run as written
        _say(device, f"{type(error).__name__}: {error}")
        return None
    if not same:
        _say(device, "a replay gave different bits")
    return replay if same and fast < 0.95 * slow else None


def _say(device: torch.device, why: str) -> None:
    """Log one line on a CUDA device. Log nothing on the CPU, on which a replay saves less time."""
    if device != HOST:
        log.warning("one kind of step runs as written, without a CUDA graph: %s", why.splitlines()[0])


def _varied(leaf: Tensor) -> Tensor:
    """Return a copy with slightly different numbers.

    Integers (labels) are drawn from those of the batch. The copies are separate tensors. If one tensor occurred twice in the inputs (for
    example, received weights are both parameters and part of the downlink), both occurrences would be traced as one.
    """
    other = twin(leaf)
    if leaf.is_floating_point():
        return other.mul_(1 + 0.01 * torch.rand_like(leaf))
    if not leaf.numel():
        return other
    return other.copy_(leaf.flatten()[torch.randint(leaf.numel(), leaf.shape, device=leaf.device)])


def _indices(device: torch.device) -> list[int]:
    """Return the device in the form that `fork_rng` requires."""
    return [device.index] if device.type == "cuda" else []


def _with_grad(step: Step, inputs: Tree) -> StepResult:
    with torch.enable_grad():
        return step(inputs)
