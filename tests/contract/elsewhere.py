"""A simulated device. Its tensors report another device, but their numbers are stored on the CPU.

An operation that mixes tensors of both devices fails, as on a GPU. Code that runs here has therefore moved every tensor that it must move,
and gives the same bits as on the CPU. (The device is called `meta`, which is the only device besides the CPU that every build of torch
knows.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

ELSEWHERE, HERE = torch.device("meta"), torch.device("cpu")
aten = torch.ops.aten
MIXING = {
    aten.copy_.default,
    aten._to_copy.default,
    aten.index.Tensor,
    aten.index_put_.default,
    aten._foreach_copy_.default,
}
"""Operations that accept tensors of both devices, also on a GPU."""


class Far(Tensor):
    """A tensor on the simulated device."""

    @staticmethod
    def __new__(cls, near: Tensor) -> Far:
        form = near.shape, near.stride(), near.storage_offset()
        with torch.inference_mode(False):  # wrapped inference tensors have no views
            return Tensor._make_wrapper_subclass(cls, *form, dtype=near.dtype, layout=near.layout, device=ELSEWHERE)

    def __init__(self, near: Tensor) -> None:
        self.near = near

    def __repr__(self) -> str:
        return f"Far({self.near})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        return _done(func, args, kwargs or {})


class Elsewhere(TorchDispatchMode):
    """A context in which the simulated device exists. `copies` counts the tensors that are copied in each direction."""

    copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._to_copy.default and kwargs.get("device", args[0].device) != args[0].device:
            self.copies += 1
        return _done(func, args, kwargs)


def _done(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """Run one operation on the CPU."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    far = [isinstance(tensor, Far) for tensor in tensors]
    lost = [
        tensor for tensor in tensors if tensor.ndim and not isinstance(tensor, Far)
    ]  # a number may come from the host
    if any(far) and lost and func not in MIXING:
        raise RuntimeError(
            f"expected all tensors to be on the same device; {func} got {tuple(lost[0].shape)} of the host"
        )
    wanted = kwargs.get("device")
    goes_far = any(far) if wanted is None else wanted == ELSEWHERE
    near = {**tree_map(_near, kwargs), **({} if wanted is None else {"device": HERE})}
    found = func(*tree_map(_near, args), **near)
    if func is aten.copy_.default:
        return args[0]
    if goes_far:
        found = tree_map(lambda leaf: Far(leaf) if isinstance(leaf, Tensor) else leaf, found)
    return return_and_correct_aliasing(func, args, kwargs, found) if any(far) else found


def _near(value: Any) -> Any:
    return value.near if isinstance(value, Far) else value
