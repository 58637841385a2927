"""The gradient of a `Train`'s loss, the fast way.

A step of a small model costs more in Python and autograd than in arithmetic. So when a kind of step turns out to be short, it
is traced into a flat list of tensor operations; if replaying the list is faster and gives the same bits, it is replayed from
then on. Whatever cannot be traced, and nets with buffers (BatchNorm changes them on the way), is computed as written.
"""

from __future__ import annotations

import functools
import operator
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fedloom import tree
from fedloom.errors import MethodError
from fedloom.method import Batch, Train
from fedloom.nets import Nets
from fedloom.tree import Tree

Params = dict[str, Tensor]
Found = tuple[Params, Params]  # gradients by parameter; logs, `loss` among them

SHORT_S = 0.002  # a step that takes longer is mostly arithmetic, which a replay does not shorten
TRIALS = 30  # steps of a kind before it is judged
REPEATS = 5  # timings of each way


class Gradients:
    """Computes gradients with one architecture's modules; remembers which kinds of step to replay."""

    def __init__(self, modules: Mapping[str, nn.Module], bf16: bool = False) -> None:
        """With `bf16`, matrix products and convolutions run in bfloat16 (autocast); weights and updates stay as they are."""
        self.modules, self.bf16 = modules, bf16
        self._kinds: dict[Any, _Kind] = {}
        self._stateful = any(True for module in modules.values() for _ in module.buffers())

    def __call__(
        self, train: Train, wanted: Params, params: Params, buffers: Params, batch: Batch, down: Tree, memory: Tree
    ) -> Found:
        """The gradients of the parameters `wanted`, and the step's logs."""
        if self._stateful:
            return self._written(train, buffers, wanted, params, batch, down, memory)

        def written(i: Tree) -> Found:
            same = Batch(i["batch"]["x"], i["batch"]["y"], i["batch"]["draws"])
            return self._written(train, buffers, i["wanted"], i["params"], same, i["down"], i["memory"])

        key = _kind_of(train, wanted, batch, down, memory)
        return self._fastest(key, written, _inputs(wanted, params, batch, down, memory))

    def mapped(self, train: Train, inputs: Tree, dims: Tree) -> Found:
        """The gradients of several lanes at once, stacked.

        Args:
            inputs: wanted, others, fixed (parameters), buffers (written into), batch, down, memory.
            dims: for each leaf 0 if it is stacked over lanes, None if all lanes share it.
        """
        if self._stateful:
            return self._mapped(train, inputs, dims)
        rows = Batch(inputs["batch"]["x"], inputs["batch"]["y"], inputs["batch"]["draws"])
        kind = _kind_of(train, inputs["wanted"], rows, inputs["down"], inputs["memory"])
        key = kind, tuple(tree.flatten(dims))
        return self._fastest(key, lambda i: self._mapped(train, i, dims), inputs, n_lanes=len(rows.y))

    def _fastest(self, key: Any, written: Callable[[Tree], Found], inputs: Tree, n_lanes: int = 1) -> Found:
        """A step as written, or its replay once that has proved itself; `key` tells kinds of step apart."""
        kind = self._kinds.get(key)
        if kind is None:
            kind = self._kinds[key] = _Kind()
        if kind.replay is not None:
            return kind.replay(inputs)
        started = time.perf_counter()
        found = written(inputs)
        if kind.is_worth_a_trial((time.perf_counter() - started) / n_lanes):
            with torch.random.fork_rng(devices=[]):  # the trial must not move the phase's generator
                kind.replay = faster_replay(written, inputs)
        return found

    def _mapped(self, train: Train, inputs: Tree, dims: Tree) -> Found:
        def lane(*leaves: Tensor) -> Any:
            in_order = iter(leaves)
            i = tree.map_tree(lambda _: next(in_order), inputs)

            def loss(wanted: Params) -> tuple[Tensor, tuple[Params, Params]]:
                buffers = {name: buffer.clone() for name, buffer in i["buffers"].items()}
                nets = Nets(self.modules, {**i["fixed"], **i["others"], **wanted}, buffers, train.modes)
                batch = Batch(i["batch"]["x"], i["batch"]["y"], i["batch"]["draws"])
                with autocast(batch.x.device, self.bf16):
                    value, logs = with_logs(train.loss(nets, batch, i["down"], i["memory"]))
                return value, (logs, buffers)

            grads, (value, (logs, buffers)) = torch.func.grad_and_value(loss, has_aux=True)(i["wanted"])
            return grads, {"loss": value, **logs}, buffers

        ordered = tree.leaves(tree.map_tree(lambda _, dim: dim, inputs, dims))
        grads, logs, buffers = torch.func.vmap(lane, in_dims=tuple(ordered))(*tree.leaves(inputs))
        tree.map_tree(Tensor.copy_, inputs["buffers"], buffers)
        return grads, logs

    def _written(
        self, train: Train, buffers: Params, wanted: Params, params: Params, batch: Batch, down: Tree, memory: Tree
    ) -> Found:
        live = {name: tensor.detach().requires_grad_() for name, tensor in wanted.items()}
        nets = Nets(self.modules, {**params, **live}, buffers, train.modes)
        with autocast(batch.x.device, self.bf16):
            loss, logs = with_logs(train.loss(nets, batch, down, memory))
        grads = torch.autograd.grad(loss, list(live.values()), materialize_grads=True)
        return dict(zip(live, grads, strict=True)), {"loss": loss.detach()} | {k: v.detach() for k, v in logs.items()}


def _inputs(wanted: Params, params: Params, batch: Batch, down: Tree, memory: Tree) -> Tree:
    """All that a step depends on, as one tree."""
    x, y, draws = batch
    return {
        "wanted": wanted,
        "params": params,
        "batch": {"x": x, "y": y, "draws": draws},
        "down": down,
        "memory": memory,
    }


def _kind_of(train: Train, wanted: Params, batch: Batch, down: Tree, memory: Tree) -> Any:
    """What one trace can stand for: a loss, what it is derived by, and the structure of all that it may read.

    A downlink may gain a branch in a later round, and phases of training and of adaptation may share a name.
    """
    loss = getattr(train.loss, "__func__", train.loss)  # a bound method is another object at every access
    forms = tuple(tuple(tree.structure(t).items()) for t in (dict(batch.draws), down, memory))
    return (
        train.name,
        getattr(loss, "__code__", loss),
        tuple(wanted),
        train.modes,
        batch.x.shape,
        batch.x.stride(),
        forms,
    )


class _Kind:
    """Steps of one `Train` on batches of one shape."""

    def __init__(self) -> None:
        self.replay: Callable[[Tree], Found] | None = None
        self._left, self._best = TRIALS, float("inf")

    def is_worth_a_trial(self, seconds: float) -> bool:
        """Whether now is the time to try a replay: once, after some steps, if the shortest was short."""
        self._left -= 1
        self._best = min(self._best, seconds)
        return self._left == 0 and self._best < SHORT_S


def faster_replay(step: Callable[[Tree], Found], inputs: Tree) -> Callable[[Tree], Found] | None:
    """A trace of `step` that gives the same bits in less time, or None; judged on inputs of its own, different in every leaf."""
    inputs = tree.map_tree(_varied, inputs)
    try:
        replay = _trace(step, inputs)
        other = tree.map_tree(_varied, inputs)
        same = all(
            a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
            for a, b in zip(replay(other), _with_grad(step, other), strict=True)
        )
        slow, fast = _shortest(lambda: _with_grad(step, other)), _shortest(lambda: replay(other))
    except Exception:  # whatever tracing cannot do (a value read out of a tensor, ...) runs as written
        return None
    return replay if same and fast < 0.95 * slow else None


def _varied(leaf: Tensor) -> Tensor:
    """A copy with slightly other numbers.

    A tensor that stands in two places (the received weights are both parameters and part of the downlink) would be traced as one.
    """
    return leaf * (1 + 0.01 * torch.rand_like(leaf)) if leaf.is_floating_point() else leaf.clone()


def _trace(step: Callable[[Tree], Found], inputs: Tree) -> Callable[[Tree], Found]:
    from torch.fx.experimental.proxy_tensor import make_fx  # takes a second to import

    paths = [path for path, _ in tree.flatten(inputs)]
    names: list[list[str]] = []

    def flat_step(*tensors: Tensor) -> list[Tensor]:
        in_order = iter(tensors)
        grads, logs = step(tree.map_tree(lambda _: next(in_order), inputs))
        names[:] = [list(grads), list(logs)]
        return [*grads.values(), *logs.values()]

    with torch.enable_grad():
        traced = make_fx(flat_step)(*tree.leaves(inputs))
    used = []
    for node, path in zip(traced.graph.find_nodes(op="placeholder"), paths, strict=True):
        if node.users:
            used.append(path.split("/"))
        else:
            traced.graph.erase_node(node)
    traced.recompile()

    def replay(now: Tree) -> Found:
        with torch.no_grad():
            found = traced(*[functools.reduce(operator.getitem, path, now) for path in used])
        grads, logs = names
        return dict(zip(grads, found, strict=False)), dict(zip(logs, found[len(grads) :], strict=True))

    return replay


def _with_grad(step: Callable[[Tree], Found], inputs: Tree) -> Found:
    with torch.enable_grad():
        return step(inputs)


def _shortest(work: Callable[[], Any]) -> float:
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def autocast(device: torch.device, bf16: bool) -> AbstractContextManager[object]:
    """bfloat16 for matrix products and convolutions, or nothing."""
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()


def with_logs(result: Tensor | tuple[Tensor, dict[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
    """What a loss returned, as the loss and its logs.

    Raises:
        MethodError: it is not a 0-d tensor.
    """
    loss, logs = result if isinstance(result, tuple) else (result, {})
    if not isinstance(loss, Tensor) or loss.ndim:
        found = f"of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise MethodError(f"a loss must be a 0-d tensor, not {found}")
    return loss, logs
