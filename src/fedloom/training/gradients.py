"""The gradient of a `Train`'s loss, the fast way.

As written, by autograd; mapped over the lanes of several clients; or replayed (`fast/step_cache.py`), where that is faster and gives
the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedloom import tree
from fedloom.accelerator import HOST
from fedloom.errors import MethodError
from fedloom.method import Batch, Interleave, Train
from fedloom.nets import Nets
from fedloom.training.fast.convolutions import Convolutions
from fedloom.training.fast.cuda_graph import Found, Params
from fedloom.training.fast.gram_layer import Outputs, accepted, linear_layers
from fedloom.training.fast.step_cache import MOST_KINDS, fingerprint, replayed_on
from fedloom.tree import Tree, Weights

Find = Callable[[Params, Params, Params, Batch], Found]
"""(parameters wanted, all parameters, buffers, batch) -> gradients, logs."""


class Once(NamedTuple):
    """What an `Interleave`'s `once` made of a batch (of several lanes, stacked), and the way back through it."""

    values: Params  # with their graph
    live: Params  # the parameters that gradients flow into

    @property
    def numbers(self) -> Params:
        """The values alone."""
        return {name: value.detach() for name, value in self.values.items()}

    @property
    def through(self) -> Params:
        """The values that depend on a live parameter."""
        return {name: value.detach() for name, value in self.values.items() if value.requires_grad}

    def back(self, grads: Params) -> Params:
        """Gradients by live parameters and by the values `through`, as gradients by live parameters alone."""
        ends = [value for value in self.values.values() if value.requires_grad]
        if not ends:
            return grads
        try:
            found = torch.autograd.grad(
                ends, list(self.live.values()), [grads[name] for name in self.through], allow_unused=True
            )
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            raise MethodError("only the last member may train what its phase's `once` passes through") from None
        return {
            name: grads[name] if more is None else grads[name] + more
            for name, more in zip(self.live, found, strict=True)
        }


class Gradients:
    """Computes gradients with one architecture's modules; remembers which kinds of step to replay."""

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        bf16: bool = False,
        device: torch.device = HOST,
        convolutions: Convolutions | None = None,
        as_written: bool = False,
    ) -> None:
        """With `bf16`, matrix products and convolutions run in bfloat16 (autocast); weights and updates stay as they are.

        Args:
            device: where the modules and all tensors are.
            convolutions: how those of several lanes are computed; default: as vmap does.
            as_written: whether steps must do what losses say, operation by operation, because these are counted.
        """
        self.modules, self.bf16, self.device, self._convolutions = modules, bf16, device, convolutions
        stateful = any(True for module in modules.values() for _ in module.buffers())
        self._replayed = None if as_written else replayed_on(device, stateful)
        self._linear = frozenset() if as_written or bf16 or device != HOST else linear_layers(modules)
        self._duals: dict[Any, tuple[str, ...]] = {}

    def once(
        self,
        phase: Interleave,
        members: Iterable[Train],
        wanted: Params,
        params: Params,
        buffers: Params,
        batch: Batch,
        down: Tree,
        memory: Tree,
    ) -> Once:
        """What the members that are at work share on a batch; gradients will flow into the parameters `wanted`."""
        assert phase.once is not None
        live = _live(wanted)
        nets = Nets(self.modules, {**params, **live}, buffers, _modes(members))
        with autocast(batch.x.device, self.bf16):
            return Once(dict(phase.once(nets, batch, down, memory)), live)

    def mapped_once(self, phase: Interleave, members: Iterable[Train], inputs: Tree, dims: Tree) -> Once:
        """`once` for several lanes; see `mapped`."""
        live, modes = _live(inputs["wanted"]), _modes(members)

        def lane(i: Tree) -> tuple[Params, Params]:
            assert phase.once is not None
            buffers = {name: buffer.clone() for name, buffer in i["buffers"].items()}
            nets = Nets(self.modules, {**i["fixed"], **i["others"], **i["wanted"]}, buffers, modes)
            with autocast(i["batch"]["x"].device, self.bf16):
                return dict(phase.once(nets, _batch(i), i["down"], i["memory"])), buffers

        values, buffers = self._over_lanes(lane, {**inputs, "wanted": live}, dims)
        tree.map_tree(Tensor.copy_, inputs["buffers"], buffers)
        return Once(values, live)

    def duals(
        self, train: Train, names: Iterable[str], weights: Weights, batch: Callable[[], Batch], down: Tree, memory: Tree
    ) -> tuple[str, ...]:
        """Those of the weights `names` that a loss uses as nothing but linear layers on the rows; it is tried on a batch, once."""
        candidates = tuple(name for name in names if name in self._linear)
        if not candidates:
            return ()
        key = _kind(train, down, memory), candidates
        try:
            if key in self._duals:
                return self._duals[key]
        except TypeError:  # something in it cannot be told from its like: a loss with a list, say
            return ()
        if len(self._duals) == MOST_KINDS:
            self._duals.clear()
        buffers, rows = tree.clone(weights["buffers"]), batch()

        def run(name: str) -> Found:
            weight = weights["params"][name]
            wanted = {name: weight.new_zeros(len(rows.y), len(weight))}
            return self._written(train, buffers, wanted, weights["params"], rows, down, memory, (name,))

        with torch.random.fork_rng([]):  # the trial must not move the phase's generator
            self._duals[key] = accepted(candidates, run)
        return self._duals[key]

    def of(self, train: Train, down: Tree, memory: Tree, duals: tuple[str, ...] = ()) -> Find:
        """What finds the gradients of the parameters `wanted`, and of the entries of `batch.once` among them, and the step's logs.

        Of layers in `duals`, wanted are gradients of their outputs for the batch, which stand in the place of their weights.
        """

        def written(i: Tree) -> Found:
            rows = _batch(i)
            return self._written(train, i["buffers"], i["wanted"], i["params"], rows, i["down"], i["memory"], duals)

        def find(wanted: Params, params: Params, buffers: Params, batch: Batch) -> Found:
            if runner is None or number is None:
                return self._written(train, buffers, wanted, params, batch, down, memory, duals)
            key = number, tuple(wanted), _form_of(batch)
            return runner(key, written, _inputs(wanted, params, buffers, batch, down, memory))

        runner = self._replayed
        number = runner.number((_kind(train, down, memory), duals)) if runner else None
        return find

    def mapped(self, train: Train, inputs: Tree, dims: Tree, duals: tuple[str, ...] = ()) -> Found:
        """The gradients of several lanes at once, stacked; `duals` as in `of`.

        Args:
            inputs: wanted, others, fixed (parameters), buffers (written into), batch, down, memory.
            dims: for each leaf 0 if it is stacked over lanes, None if all lanes share it.
        """
        if self._replayed is None:
            return self._mapped(train, inputs, dims, duals)
        kind = _kind(train, inputs["down"], inputs["memory"]), tuple(tree.flatten(dims)), duals
        number = self._replayed.number(kind)
        if number is None:
            return self._mapped(train, inputs, dims, duals)
        rows = _batch(inputs)
        key = number, tuple(inputs["wanted"]), _form_of(rows)
        return self._replayed(key, lambda i: self._mapped(train, i, dims, duals), inputs, len(rows.y))

    def _mapped(self, train: Train, inputs: Tree, dims: Tree, duals: tuple[str, ...]) -> Found:
        def lane(i: Tree) -> Any:
            def loss(wanted: Params) -> tuple[Tensor, tuple[Params, Params]]:
                buffers = {name: buffer.clone() for name, buffer in i["buffers"].items()}
                params, batch = _placed(wanted, _batch(i))
                params = {**params, **{name: Outputs.of(wanted[name]) for name in duals}}
                nets = Nets(self.modules, {**i["fixed"], **i["others"], **params}, buffers, train.modes)
                with autocast(batch.x.device, self.bf16):
                    value, logs = with_logs(train.loss(nets, batch, i["down"], i["memory"]))
                return value, (logs, buffers)

            grads, (value, (logs, buffers)) = torch.func.grad_and_value(loss, has_aux=True)(i["wanted"])
            return grads, {"loss": value, **logs}, buffers

        grads, logs, buffers = self._over_lanes(lane, inputs, dims)
        tree.map_tree(Tensor.copy_, inputs["buffers"], buffers)
        return grads, logs

    def _over_lanes(self, lane: Callable[[Tree], Any], inputs: Tree, dims: Tree) -> Any:
        """`lane` mapped over the stacked leaves of `inputs`."""

        def flat(*leaves: Tensor) -> Any:
            in_order = iter(leaves)
            return lane(tree.map_tree(lambda _: next(in_order), inputs))

        ordered, n_lanes = tree.leaves(tree.map_tree(lambda _, dim: dim, inputs, dims)), len(inputs["batch"]["y"])
        with self._convolutions.of(n_lanes) if self._convolutions else nullcontext():
            return torch.func.vmap(flat, in_dims=tuple(ordered))(*tree.leaves(inputs))

    def _written(
        self,
        train: Train,
        buffers: Params,
        wanted: Params,
        params: Params,
        batch: Batch,
        down: Tree,
        memory: Tree,
        duals: tuple[str, ...] = (),
    ) -> Found:
        live = _live(wanted)
        own, batch = _placed(live, batch)
        own = {**own, **{name: Outputs.of(live[name], batch.x) for name in duals}}
        nets = Nets(self.modules, {**params, **own}, buffers, train.modes)
        with autocast(batch.x.device, self.bf16):
            loss, logs = with_logs(train.loss(nets, batch, down, memory))
        grads = torch.autograd.grad(loss, list(live.values()), materialize_grads=True)
        return dict(zip(live, grads, strict=True)), {"loss": loss.detach()} | {k: v.detach() for k, v in logs.items()}


def _inputs(wanted: Params, params: Params, buffers: Params, batch: Batch, down: Tree, memory: Tree) -> Tree:
    """All that a step depends on, as one tree."""
    rows = batch._asdict()
    return {"wanted": wanted, "params": params, "buffers": buffers, "batch": rows, "down": down, "memory": memory}


def _batch(inputs: Tree) -> Batch:
    return Batch(**inputs["batch"])


def _live(wanted: Params) -> Params:
    return {name: tensor.detach().requires_grad_() for name, tensor in wanted.items()}


def _placed(wanted: Params, batch: Batch) -> tuple[Params, Batch]:
    """What gradients are wanted of, as parameters, and as entries of `batch.once` in their places."""
    if not batch.once:
        return wanted, batch
    # views, since torch's counter of operations fails on a module's input that is a leaf
    once = {name: v.view_as(v) for name, v in {**batch.once, **wanted}.items() if name in batch.once}
    return {name: p for name, p in wanted.items() if name not in once}, batch._replace(once=once)


def _kind(train: Train, down: Tree, memory: Tree) -> Any:
    """What one trace can stand for: a loss, and the structure of all that it may read beside batches.

    A downlink may gain a branch in a later round, and phases of training and of adaptation may share a name.
    """
    return train.name, fingerprint(train.loss), train.modes, _form(down), _form(memory)


def _form_of(batch: Batch) -> Any:
    return batch.x.shape, batch.x.stride(), _form(batch.draws), _form(batch.once)


def _form(tensors: Mapping[str, Any]) -> Any:
    return tuple(tree.structure(dict(tensors)).items()) if tensors else ()


def _modes(members: Iterable[Train]) -> set[str]:
    return {net for train in members for net in train.modes}


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
