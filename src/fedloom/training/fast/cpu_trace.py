"""Trace a step once into a flat list of tensor operations, which is then repeated without autograd and with little Python overhead.

`torch.fx.experimental.proxy_tensor.make_fx` does the same, but it first imports torch's compiler, which takes seconds in every worker
process.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from types import BuiltinFunctionType, MethodDescriptorType
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_map_only

from fedloom import tree
from fedloom.training.dispatch import DispatchMode
from fedloom.training.steps import Step, StepResult
from fedloom.tree import Tree

aten = torch.ops.aten


def trace(step: Step, inputs: Tree) -> Step:
    """Return a function that computes the results of `step` for other inputs of the same shapes.

    Raises:
        ValueError: the step reads values from tensors, or its shapes depend on values.
    """
    with TraceMode(tree.leaves(inputs)) as recorder, torch.enable_grad():
        grads, logs = step(inputs)
    graph = recorder.finish([*grads.values(), *logs.values()])
    paths = [path.split("/") for path, _ in tree.flatten(inputs)]
    used = []
    for node, path in zip(graph.find_nodes(op="placeholder"), paths, strict=True):
        if node.users:
            used.append(path)
        else:
            graph.erase_node(node)
    _shorten(graph)
    traced = GraphModule(recorder.constants, graph)

    def given(now: Tree) -> list[Any]:
        return [functools.reduce(operator.getitem, path, now) for path in used]

    with torch.no_grad():
        _bind(traced, given(inputs))
    run, of_grads, of_logs = traced.forward, list(grads), list(logs)  # `forward` skips the hooks of a module's call

    def replay(now: Tree) -> StepResult:
        with torch.no_grad():
            found = run(*given(now))
        logged = zip(of_logs, found[len(of_grads) :], strict=True)
        return StepResult(dict(zip(of_grads, found, strict=False)), dict(logged))

    return replay


class TraceMode(DispatchMode):  # type: ignore[no-untyped-call]
    """Records in a graph every operation that runs while the mode is active, including those of autograd."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.constants: dict[str, Tensor] = {}
        self._graph = Graph()
        self._nodes: dict[int, Node] = {}
        self._seen: list[Tensor] = []  # kept alive, so that no new tensor can get the same `id` as one of them
        for k, leaf in enumerate(inputs):
            self._know(leaf, self._graph.placeholder(f"input_{k}"))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Run one operation and record it."""
        if torch.Tag.data_dependent_output in func.tags or _has_unknown_size(func, args):
            raise ValueError(f"the result of {func} depends on the values in its inputs")
        found = func(*args, **(kwargs or {}))
        node = self._graph.call_function(func, *tree_map_only(Tensor, self._node, (args, dict(kwargs or {}))))
        if isinstance(found, Tensor):
            self._know(found, node)
        elif isinstance(found, tuple | list):
            for k, value in enumerate(found):
                if isinstance(value, Tensor):
                    self._know(value, self._graph.call_function(operator.getitem, (node, k)))
        return found

    def finish(self, results: Sequence[Tensor]) -> Graph:
        """Return the graph that computes these tensors."""
        self._graph.output([self._node(value) for value in results])
        return self._graph

    def _know(self, value: Tensor, node: Node) -> None:
        node.meta["shape"] = value.shape
        self._nodes[id(value)] = node
        self._seen.append(value)

    def _node(self, value: Tensor) -> Node:
        """Return the node that created a tensor. A tensor that is neither an input nor the result of a traced operation is a constant."""
        if id(value) not in self._nodes:
            name = f"constant_{len(self.constants)}"
            self.constants[name] = value.detach()
            self._know(value, self._graph.create_node("get_attr", name))
        return self._nodes[id(value)]


def _has_unknown_size(func: Any, args: Any) -> bool:
    """Return whether the shape of an operation's result depends on values. A trace would always reuse the first shape."""
    if torch.Tag.dynamic_output_shape not in func.tags:
        return False
    if func is not aten.index.Tensor:
        return True
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])  # a mask


def _shorten(graph: Graph) -> None:
    """Remove operations without effect, because each costs as much Python overhead as any other operation."""
    swaps = (aten.t.default, aten.transpose.int)
    reshapes = (aten.view.default, aten._unsafe_view.default, aten.expand.default)
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        inner, *how = node.args
        once = node.target == aten.mul.Scalar and how[0] == 1 and isinstance(how[0], int)
        back = node.target in swaps and inner.target == node.target and list(inner.args[1:]) == how
        same = node.target in reshapes and list(inner.meta["shape"]) == list(how[0])
        if once or same or node.target == aten.detach.default:
            node.replace_all_uses_with(inner)
        elif back:
            node.replace_all_uses_with(inner.args[0])
        elif node.target == aten.view.default and inner.target == aten.sum.dim_IntList and len(inner.args) == 3:
            value, dims, _ = inner.args  # a sum that keeps its dimensions, followed by a view that drops them
            gone = {dim % len(value.meta["shape"]) for dim in dims}
            if [n for dim, n in enumerate(value.meta["shape"]) if dim not in gone] == list(how[0]):
                node.target, node.args = aten.sum.dim_IntList, (value, dims)
    graph.eliminate_dead_code()


def _bind(traced: GraphModule, inputs: list[Tensor]) -> None:
    """Use functions such as `torch.relu`, which take half as long as `torch.ops.aten.relu`, unless their signatures differ."""
    before = {}
    for node in traced.graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        name, was = node.target.__name__.partition(".")[0], (node.op, node.target)
        if isinstance(getattr(torch, name, None), BuiltinFunctionType):
            node.target, before[node] = getattr(torch, name), was
        elif isinstance(getattr(Tensor, name, None), MethodDescriptorType):
            (node.op, node.target), before[node] = ("call_method", name), was
    traced.recompile()
    try:
        traced.forward(*inputs)
    except Exception:  # for example, if its arguments have other names
        for node, (op, target) in before.items():
            node.op, node.target = op, target
        traced.recompile()
