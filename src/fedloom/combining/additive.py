"""The tensors that a method only adds up over uplinks, and the one uplink that represents all uplinks of a round."""

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
    """The additive tensors of a round's uplinks (`Method.sums`), in float64, with weights as differences from the downlink.

    Tensors are converted when they are read, one path at a time, so that memory never contains a second copy of all uplinks.
    """

    def __init__(self, method: Method, uplinks: Sequence[Tree], received: Tree, like: Tree | None = None) -> None:
        """Store the uplinks. `received` is the decoded downlink, which is the same for all clients.

        If there may be no uplinks, `like` is an uplink with the right structure.
        """
        self._method, self.n = method, len(uplinks)
        self._like = uplinks[0] if like is None else like
        self._structure = dict(tree.flatten(method.sums(self._like)))
        self._base = {f"weights/{path}": leaf for path, leaf in tree.flatten(received.get("weights", {}))}
        self._parts = [dict(tree.flatten(method.sums(uplink))) for uplink in uplinks]

    @cached_property
    def vectors(self) -> list[str]:
        """The paths of the floating-point tensors. Together, these tensors form a client's vector."""
        return [path for path, leaf in self._structure.items() if leaf.is_floating_point()]

    @cached_property
    def counters(self) -> list[str]:
        """The paths of the integer tensors."""
        return [path for path in self._structure if path not in self.vectors]

    def rows(self, path: str) -> Tensor:
        """Return all clients' values of one tensor, with shape (n, d)."""
        values = [part[path].double().flatten() for part in self._parts]
        rows = torch.stack(values) if values else torch.zeros(0, self._structure[path].numel(), dtype=torch.float64)
        if path in self._base:
            rows -= self._base[path].double().flatten()
        return rows.clamp(-LARGEST, LARGEST)

    def stand_in(self, mean: Mapping[str, Tensor], n: int | None = None) -> Tree:
        """Return the uplink that represents `n` uplinks (default: all stored uplinks).

        `mean` contains the mean of their additive tensors by path (d,).
        """
        n = self.n if n is None else n
        total = {}
        for path, leaf in self._structure.items():
            value = mean[path].view(leaf.shape)
            total[path] = n * (value + self._base[path].double() if path in self._base else value)
        sums = tree.merge(self._method.sums(self._like), tree.unflatten(total))  # including branches without tensors
        one = self._method.from_sums(sums, n)
        kinds = {path: leaf.dtype for path, leaf in tree.flatten(self._like)}
        leaves = {path: _converted(leaf, kinds[path]) for path, leaf in tree.flatten(one)}
        found = tree.merge(self._like, tree.unflatten(leaves))
        if "buffers" in found.get("weights", {}):
            found["weights"] = without_negative_variances(found["weights"])
        return found


def _converted(leaf: Tensor, dtype: torch.dtype) -> Tensor:
    return leaf.to(dtype) if dtype.is_floating_point else leaf.round().to(dtype)
