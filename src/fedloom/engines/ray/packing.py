"""Trees as plain bytes in NumPy arrays, which move between processes without being copied or looked into."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from fedloom import tree
from fedloom.engines.stores import TreeLayout, layout_of, views
from fedloom.tree import Tree


class Packed(NamedTuple):
    """A tree as bytes, (n,) uint8, of any types (bfloat16 too, which NumPy does not have)."""

    layout: TreeLayout
    data: np.ndarray[Any, Any]


class Packer:
    """Packs trees; those of one form share one layout, which a message then holds once."""

    def __init__(self) -> None:
        self._layouts: dict[Any, TreeLayout] = {}

    def pack(self, value: Tree) -> Packed:
        """A copy of the tree."""
        form = _form(value)
        layout = self._layouts.get(form) or self._layouts.setdefault(form, layout_of(value))
        data = torch.empty(layout.n_bytes, dtype=torch.uint8)
        tree.map_tree(torch.Tensor.copy_, views(data, layout), value)
        return Packed(layout, data.numpy())


def _form(value: Tree) -> tuple[Any, ...]:
    return tuple((k, _form(v) if isinstance(v, dict) else (v.shape, v.dtype)) for k, v in value.items())


def unpack(packed: Packed) -> Tree:
    """The tree, in memory of its own: what comes from the object store is read-only, and torch would not notice."""
    data = torch.empty(packed.layout.n_bytes, dtype=torch.uint8)
    np.copyto(data.numpy(), packed.data)
    return views(data, packed.layout)
