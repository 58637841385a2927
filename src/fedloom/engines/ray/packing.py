"""Trees as plain bytes in NumPy arrays, which move between processes without being copied or parsed."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from fedloom import tree
from fedloom.engines.stores import TreeLayout, layout_of, views
from fedloom.tree import Tree


class Packed(NamedTuple):
    """A tree as bytes (n,), uint8. Any dtype is possible, including bfloat16, which NumPy does not support."""

    layout: TreeLayout
    data: np.ndarray[Any, Any]


class Packer:
    """Packs trees. Trees with the same structure share one layout object, so that a message contains it once."""

    def __init__(self) -> None:
        self._layouts: dict[Any, TreeLayout] = {}

    def pack(self, value: Tree) -> Packed:
        """Return a packed copy of the tree."""
        form = _form(value)
        layout = self._layouts.get(form) or self._layouts.setdefault(form, layout_of(value))
        data = torch.empty(layout.n_bytes, dtype=torch.uint8)
        tree.map_tree(torch.Tensor.copy_, views(data, layout), value)
        return Packed(layout, data.numpy())


def _form(value: Tree) -> tuple[Any, ...]:
    return tuple((k, _form(v) if isinstance(v, dict) else (v.shape, v.dtype)) for k, v in value.items())


def unpack(packed: Packed) -> Tree:
    """Return a copy of the tree in its own memory.

    Arrays from the object store are read-only, which torch would not detect.
    """
    data = torch.empty(packed.layout.n_bytes, dtype=torch.uint8)
    np.copyto(data.numpy(), packed.data)
    return views(data, packed.layout)
