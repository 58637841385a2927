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

    def __init__(self, method: Method, uplinks: Sequence[Tree], received: Tree) -> None:
        """`received`: the decoded downlink, which must be the same for all clients."""
        self._method, self._first, self.n = method, uplinks[0], len(uplinks)
        self._base = {f"weights/{path}": leaf for path, leaf in tree.flatten(received.get("weights", {}))}
        self._parts = [dict(tree.flatten(method.sums(uplink))) for uplink in uplinks]

    @cached_property
    def vectors(self) -> list[str]:
        """The paths of the floating-point tensors. Together they are a client's vector."""
        return [path for path, leaf in self._parts[0].items() if leaf.is_floating_point()]

    @cached_property
    def counters(self) -> list[str]:
        """The paths of the integer tensors."""
        return [path for path in self._parts[0] if path not in self.vectors]

    def rows(self, path: str) -> Tensor:
        """Return all clients' values of one tensor: (n, d)."""
        rows = torch.stack([part[path].double() for part in self._parts]).reshape(self.n, -1)
        if path in self._base:
            rows -= self._base[path].double().flatten()
        return rows.clamp(-LARGEST, LARGEST)

    def stand_in(self, mean: Mapping[str, Tensor]) -> Tree:
        """Return the uplink that stands for all, if this is the mean of the additive tensors by path (d,): n times it is aggregated."""
        total = {}
        for path, leaf in self._parts[0].items():
            value = mean[path].view(leaf.shape)
            total[path] = self.n * (value + self._base[path].double() if path in self._base else value)
        one = self._method.from_sums(tree.merge(self._first_sums, tree.unflatten(total)), self.n)
        kinds = {path: leaf.dtype for path, leaf in tree.flatten(self._first)}
        leaves = {path: _converted(leaf, kinds[path]) for path, leaf in tree.flatten(one)}
        found = tree.merge(self._first, tree.unflatten(leaves))  # with branches that have no tensors
        if "buffers" in found.get("weights", {}):
            found["weights"] = without_negative_variances(found["weights"])
        return found

    @property
    def _first_sums(self) -> Tree:
        return self._method.sums(self._first)


def _converted(leaf: Tensor, dtype: torch.dtype) -> Tensor:
    return leaf.to(dtype) if dtype.is_floating_point else leaf.round().to(dtype)
