"""Refuse modules that keep state between calls outside their buffers.

All clients of an architecture share one module, to which each client's tensors are bound by name. Any other state that remains after a
forward pass, such as a hidden state or a counter in a Python attribute, would be passed from one client to the next, and results would
depend on the engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from fedloom.errors import ConfigError
from fedloom.inputs import Inputs, call_arguments, map_inputs
from fedloom.models.splitting import like

OF_EVERY_MODULE = frozenset(vars(nn.Module()))
REMEDY = "make it a buffer (register_buffer), or an input"


def refuse_own_state(module: nn.Module, example: Inputs, name: str) -> None:
    """Raise ConfigError if a forward pass keeps state outside persistent buffers, or changes a buffer in evaluation mode.

    The module is copied and run on two examples. A cache that is filled by the first call and not changed by later calls is accepted if it
    does not depend on the inputs.
    """
    one = like(example, module)
    other = map_inputs(lambda v: v.flip(0) * 0.5 if v.is_floating_point() else v.flip(0), one)
    for training in (False, True):
        first, second = (deepcopy(module).train(training) for _ in range(2))
        if not _ran(first, one) or not _ran(second, other):
            continue  # `split` reports modules that fail
        filled, buffers = attributes(first), _buffers(first)
        _ran(first, other)
        for changed in (changed_attribute(filled, attributes(first)), changed_attribute(filled, attributes(second))):
            if changed:
                raise ConfigError(f"model {name}: its forward keeps '{changed}' between calls; {REMEDY}")
        kept = first.state_dict().keys()
        for path, value in _buffers(first).items():
            if torch.equal(value, buffers[path]):
                continue
            if not training:
                raise ConfigError(
                    f"model {name}: its forward changes buffer '{path}' in evaluation mode, so scoring would"
                )
            if path not in kept:
                raise ConfigError(
                    f"model {name}: its forward changes buffer '{path}', which is not persistent; {REMEDY}"
                )


def attributes(module: nn.Module) -> dict[str, Any]:
    """Return copies of the submodules' Python attributes by path, except for torch's own modules, which keep no state there."""
    return {
        f"{path}.{key}".lstrip("."): _copy(value)
        for path, part in module.named_modules()
        if not type(part).__module__.startswith("torch.")
        for key, value in vars(part).items()
        if key not in OF_EVERY_MODULE
    }


def changed_attribute(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Return the first path whose value differs between two results of `attributes`, or ""."""
    missing = before.keys() ^ after.keys()
    return min(missing) if missing else next((path for path in before if not _same(before[path], after[path])), "")


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.detach().clone() for name, buffer in module.named_buffers()}


@torch.no_grad()
def _ran(module: nn.Module, inputs: Inputs) -> bool:
    try:
        with torch.random.fork_rng(devices=[]):
            args, named = call_arguments(module, inputs)
            module(*args, **named)
    except Exception:
        return False
    return True


def _copy(value: Any) -> Any:
    """Return copies of numbers, strings, tensors and containers of them. Return other objects unchanged."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copy(item) for item in value]
    return value


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, bool | int | float | str | None) or isinstance(b, bool | int | float | str | None):
        return type(a) is type(b) and bool(a == b)
    return type(a) is type(b)


def refuse_old_norms(source: object, name: str) -> None:
    """Raise ConfigError for torch's old weight_norm and spectral_norm, which store the weight in an attribute, not in a named tensor."""
    for path, part in source.named_modules() if isinstance(source, nn.Module) else ():
        if any(isinstance(hook, WeightNorm | SpectralNorm) for hook in part._forward_pre_hooks.values()):
            raise ConfigError(
                f"model {name}: '{path}' uses the old torch.nn.utils.weight_norm or spectral_norm;"
                " use torch.nn.utils.parametrizations instead"
            )
