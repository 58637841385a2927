"""What the uplinks of a round add up to, and the one uplink that stands for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from fedloom import tree
from fedloom.method import Method
from fedloom.nets import without_negative_variances
from fedloom.tree import Tree

LARGEST = 1e100  # larger numbers are reduced to this size, because the squares of distances must stay finite in float64


class Additive:
    """The additive tensors of the uplinks of one round (`Method.sums`): weights as differences from the downlink, in float64.

    Tensors are converted when they are read, one path at a time, so no second copy of all uplinks is in memory.
    """

    def __init__(self, method: Method, uplinks: Sequence[Tree], received: Tree, like: Tree | None = None) -> None:
        """`received`: the decoded downlink, the same for all clients. `like`: an uplink with the right structure, if there may be none."""
        self._method, self.n = method, len(uplinks)
        self._like = uplinks[0] if like is None else like
        self._structure = dict(tree.flatten(method.sums(self._like)))
        self._base = {f"weights/{path}": leaf for path, leaf in tree.flatten(received.get("weights", {}))}
        self._parts = [dict(tree.flatten(method.sums(uplink))) for uplink in uplinks]

    @cached_property
    def vectors(self) -> list[str]:
        """The paths of the floating-point tensors. Together they are a client's vector."""
        return [path for path, leaf in self._structure.items() if leaf.is_floating_point()]

    @cached_property
    def counters(self) -> list[str]:
        """The paths of the integer tensors."""
        return [path for path in self._structure if path not in self.vectors]

    def rows(self, path: str) -> Tensor:
        """Return all clients' values of one tensor: (n, d)."""
        values = [part[path].double().flatten() for part in self._parts]
        rows = torch.stack(values) if values else torch.zeros(0, self._structure[path].numel(), dtype=torch.float64)
        if path in self._base:
            rows -= self._base[path].double().flatten()
        return rows.clamp(-LARGEST, LARGEST)

    def stand_in(self, mean: Mapping[str, Tensor], n: int | None = None) -> Tree:
        """Return the uplink that stands for `n` uplinks (default: those given); `mean`: that of their additive tensors, by path (d,)."""
        n = self.n if n is None else n
        total = {}
        for path, leaf in self._structure.items():
            value = mean[path].view(leaf.shape)
            total[path] = n * (value + self._base[path].double() if path in self._base else value)
        sums = tree.merge(self._method.sums(self._like), tree.unflatten(total))  # with branches that have no tensors
        one = self._method.from_sums(sums, n)
        kinds = {path: leaf.dtype for path, leaf in tree.flatten(self._like)}
        leaves = {path: _converted(leaf, kinds[path]) for path, leaf in tree.flatten(one)}
        found = tree.merge(self._like, tree.unflatten(leaves))
        if "buffers" in found.get("weights", {}):
            found["weights"] = without_negative_variances(found["weights"])
        return found


def _converted(leaf: Tensor, dtype: torch.dtype) -> Tensor:
    return leaf.to(dtype) if dtype.is_floating_point else leaf.round().to(dtype)
