"""Nets bound to one client's tensors, and the naming of those tensors.

Weights are two flat dictionaries, `{"params": {...}, "buffers": {...}}`. A tensor's name is its net's name followed by its name in the
module: `model.body.0.weight`, `gfe.1.running_mean`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor, nn
from torch.func import functional_call, grad

from fedloom.errors import MethodError, suggest
from fedloom.inputs import call_arguments, unwrapped
from fedloom.models.layers import refuse_tied
from fedloom.objectives import Classification, Objective
from fedloom.tree import Weights

Unit = Literal["layer", "tensor", "block"]
CLASSES = Classification()
"""The learning task of nets if no task is specified."""


class Net:
    """A module bound to the tensors with which it computes. Calling the net calls the module."""

    def __init__(
        self, module: nn.Module, params: dict[str, Tensor], buffers: dict[str, Tensor], training: bool
    ) -> None:
        self.module, self.training, self._buffers = module, training, buffers
        self._tensors = {**params, **buffers}

    def __call__(self, *inputs: Any) -> Any:
        """Call the module with one tensor, several tensors, or one dictionary of tensors (see `fedloom.inputs`)."""
        tensors = dict(self._tensors)
        named: dict[str, Any] = {}
        if len(inputs) == 1:
            inputs, named = call_arguments(self.module, inputs[0])
        with _in_mode(self.module, self.training):
            outputs = unwrapped(functional_call(self.module, tensors, inputs, named, tie_weights=False))
        for name, buffer in self._buffers.items():
            if tensors[name] is not buffer:  # the module assigned to this buffer
                self._assign(name, buffer, tensors[name])
        return outputs

    def __getattr__(self, name: str) -> Net:
        """Return a part of the module, such as `nets.model.body`. It is bound to the same tensors and has the same mode."""
        part = self.__dict__["module"]._modules.get(name) if "module" in self.__dict__ else None
        if part is None:
            raise AttributeError(f"the net has no part '{name}'")
        buffers, start = self._buffers, len(name) + 1
        tensors = {key[start:]: value for key, value in self._tensors.items() if key.startswith(name + ".")}
        own = {key[start:]: buffers[key] for key in buffers if key.startswith(name + ".")}
        net = Net(part, {key: value for key, value in tensors.items() if key not in own}, own, self.training)
        self.__dict__[name] = net
        return net

    def _assign(self, name: str, buffer: Tensor, value: Tensor) -> None:
        """Copy what the module assigned to a buffer (`self.centre = ...`) into the client's tensor."""
        kind = type(self.module).__name__
        if not self.training:
            raise MethodError(
                f"{kind} changes its buffer '{name}' in evaluation mode, so scoring would change the client"
            )
        if value.shape != buffer.shape:
            raise MethodError(
                f"{kind} assigns a tensor of shape {tuple(value.shape)} to buffer '{name}', whose shape is {tuple(buffer.shape)}"
            )
        buffer.copy_(value.detach())


@contextmanager
def _in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Set a module to training or evaluation mode during the block, and restore its mode afterwards.

    Otherwise, a part of a module could keep a mode that differs from that of the whole module.
    """
    before = module.training
    if before == training:
        yield
        return
    module.train(training)
    try:
        yield
    finally:
        module.train(before)


class Nets:
    """A client's nets: `nets.gfe(x)` calls module `gfe` with this client's tensors.

    In training mode, BatchNorm updates the running statistics in `buffers` *in place*. The code that creates a `Nets` must therefore own
    those tensors.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        params: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        training: Iterable[str] = (),
        *,
        objective: Objective = CLASSES,
    ) -> None:
        self.modules, self.params, self.buffers, self.objective = modules, params, buffers, objective
        self.training = frozenset(training)

    def __getattr__(self, name: str) -> Net:
        modules: Mapping[str, nn.Module] = self.__dict__["modules"]
        if name not in modules:
            raise AttributeError(f"there is no net '{name}'{suggest(name, modules)}")
        start = len(name) + 1
        params, buffers = (
            {key[start:]: value for key, value in part.items() if key.startswith(name + ".")}
            for part in (self.params, self.buffers)
        )
        net = Net(modules[name], params, buffers, name in self.training)
        self.__dict__[name] = net
        return net

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of the learning task, such as cross-entropy for classes; see `fedloom.objectives`."""
        return self.objective.loss(outputs, targets)

    def at(self, weights: Weights) -> Nets:
        """Return the same nets in evaluation mode, with the tensors in `weights` instead of their own (as for MOON's previous model)."""
        params = {**self.params, **weights["params"]}
        return self._like(params, {**self.buffers, **weights["buffers"]}, ())

    def with_params(self, params: Mapping[str, Tensor]) -> Nets:
        """Return the same nets in the same mode, with the parameters in `params` instead of their own."""
        return self._like({**self.params, **params}, self.buffers, self.training)

    def renamed(self, net: str, other: str) -> dict[str, Tensor]:
        """Return the parameters of `net` under the names of the net `other`, which has the same structure."""
        start = net + "."
        return {other + name[len(net) :]: p for name, p in self.params.items() if name.startswith(start)}

    def gradient(self, error: Callable[[Nets], Tensor], patterns: Sequence[str]) -> dict[str, Tensor]:
        """Return the gradient of `error(nets)` with respect to the parameters that the patterns match (see `select`).

        If `error` changes running statistics, it changes a copy of them. The gradient is differentiable; for a constant gradient, use
        `nets.frozen.gradient(...)`.
        """

        def value(params: dict[str, Tensor]) -> Tensor:
            buffers = {name: buffer.clone() for name, buffer in self.buffers.items()}
            return error(self._like({**self.params, **params}, buffers, self.training))

        found: dict[str, Tensor] = grad(value)(select({"params": dict(self.params)}, patterns)["params"])
        return found

    @functools.cached_property
    def frozen(self) -> Nets:
        """The same nets with detached parameters: gradients flow through the nets to their inputs, but not into the parameters."""
        params = {name: value.detach() for name, value in self.params.items()}
        return self._like(params, self.buffers, self.training)

    def _like(self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], training: Iterable[str]) -> Nets:
        return Nets(self.modules, params, buffers, training, objective=self.objective)


def read_weights(modules: Mapping[str, nn.Module]) -> Weights:
    """Return copies of the modules' current weights. Raise ConfigError if one tensor has two names.

    Frozen parameters (`requires_grad=False`) are not weights: they stay in the modules and are never trained, sent or stored.
    """
    refuse_tied(modules)
    kept = {net: m.state_dict() for net, m in modules.items()}  # without non-persistent buffers
    return {
        kind: {
            f"{net}.{name}": tensor.detach().clone()
            for net, module in modules.items()
            for name, tensor in (module.named_parameters() if kind == "params" else module.named_buffers())
            if name in kept[net] and (kind == "buffers" or tensor.requires_grad)
        }
        for kind in ("params", "buffers")
    }


def frozen_parameters(modules: Mapping[str, nn.Module]) -> list[Tensor]:
    """Return the parameters that are never trained (`requires_grad=False`)."""
    return [p for module in modules.values() for p in module.parameters() if not p.requires_grad]


def without_negative_variances(weights: Weights) -> Weights:
    """Return the weights with negative running variances set to 0.

    Adding a difference to a base can make a variance negative because of rounding, or if the base is newer than the difference.
    """
    buffers = {n: b.clamp(min=0) if n.endswith(".running_var") else b for n, b in weights["buffers"].items()}
    return {**weights, "buffers": buffers}


def write_weights(modules: Mapping[str, nn.Module], weights: Weights) -> None:
    """Copy `weights` into the modules, so that a user gets a plain module. Frozen parameters do not change."""
    tensors = {**weights["params"], **weights["buffers"]}
    for net, module in modules.items():
        start = len(net) + 1
        mine = {k[start:]: v for k, v in tensors.items() if k.startswith(net + ".")}
        frozen = {name: p for name, p in module.named_parameters() if not p.requires_grad}
        module.load_state_dict({**frozen, **mine})


def layer_of(name: str) -> str:
    """Return the layer (innermost module) to which a tensor belongs: `model.body.3` for `model.body.3.weight`.

    The tensors of a parametrised weight, such as those of a LoRA adapter, belong to the layer of the weight.
    """
    layer, parametrised, _ = name.partition(".parametrizations.")
    return layer if parametrised else name.rpartition(".")[0]


def block_of(name: str) -> str:
    """Return the block of a tensor: the path of its layer up to the first number, or the whole path if it contains no number."""
    path = layer_of(name).split(".")
    numbers = [i for i, part in enumerate(path) if part.isdigit()]
    return ".".join(path[: numbers[0] + 1] if numbers else path)


def units(weights: Weights, unit: Unit) -> list[list[tuple[str, str]]]:
    """Group the tensors by layer, tensor or block, in order of first appearance.

    A tensor is given as `(kind, name)`, where the kind is `params` or `buffers`.
    """
    owners: dict[Unit, Callable[[str], str]] = {"layer": layer_of, "block": block_of, "tensor": lambda name: name}
    groups: dict[str, list[tuple[str, str]]] = {}
    for kind in ("params", "buffers"):
        for name in weights[kind]:
            groups.setdefault(owners[unit](name), []).append((kind, name))
    return list(groups.values())


def norm_layers(weights: Weights) -> set[str]:
    """Return the normalisation layers: those with running statistics or with a one-dimensional weight."""
    return {
        layer_of(name)
        for part in weights.values()
        for name, value in part.items()
        if name.endswith(".running_mean") or (name.endswith(".weight") and value.ndim == 1)
    }


def select(weights: Weights, patterns: Sequence[str], *, buffers: bool = True, rest: bool = False) -> Weights:
    """Return the weights that match at least one pattern or, with `rest`, the weights that match no pattern.

    A pattern is a net (`model`), a part of a net (`model:body`, `model:head`), a net without a part (`model:-head`), or the full name of
    one tensor (`model.head.bias`). The part `norm` means all normalisation layers, as in `model:-norm` (FedBN).

    Args:
        buffers: whether the patterns also match buffers (running statistics).

    Raises:
        MethodError: a pattern matches nothing.
    """
    norms = norm_layers(weights) if any("norm" in pattern for pattern in patterns) else set()
    names = tuple((kind, tuple(part)) for kind, part in weights.items())
    chosen = _chosen(names, frozenset(norms), tuple(patterns), buffers, rest)
    return {kind: {name: weights[kind][name] for name in mine} for kind, mine in chosen}


Names = tuple[tuple[str, tuple[str, ...]], ...]  # by kind


@functools.lru_cache(1024)  # every client makes the same few selections in every round
def _chosen(names: Names, norms: frozenset[str], patterns: tuple[str, ...], buffers: bool, rest: bool) -> Names:
    """Return the names of the weights that `select` returns."""

    def matches(pattern: str, name: str) -> bool:
        if pattern == name:
            return True
        net, _, part = pattern.partition(":")
        if not name.startswith(net + "."):
            return False
        negated, part = part.startswith("-"), part.lstrip("-")
        inside = not part or (layer_of(name) in norms if part == "norm" else name.startswith(f"{net}.{part}."))
        return inside != negated

    every = [name for _, part in names for name in part]
    for pattern in patterns:
        if not any(matches(pattern, name) for name in every):
            nets = sorted({name.partition(".")[0] for name in every})
            raise MethodError(f"the pattern '{pattern}' matches nothing; nets: {', '.join(nets)}")

    def taken(kind: str, name: str) -> bool:
        return (buffers or kind == "params") and any(matches(pattern, name) for pattern in patterns)

    return tuple((kind, tuple(name for name in part if taken(kind, name) != rest)) for kind, part in names)
