"""Transfer of trees between host and device, in one copy per tree instead of one per tensor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fedloom import tree
from fedloom.accelerator import HOST
from fedloom.engines.stores import MemoryStore, layout_of, views
from fedloom.method import Client
from fedloom.tree import Tree


class Mover:
    """Copies trees to one device. A tensor that was copied before is not copied again, so that clients continue to share it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known: dict[int, tuple[Tensor, Tensor]] = {}  # the original and its copy, by the identity of the original

    def __call__(self, value: Tree) -> Tree:
        """Return the tree on the device. Tensors that are already there are not copied."""
        away = {id(leaf): leaf for leaf in tree.leaves(value) if leaf.device != self._device}
        if not away:
            return value
        new = {key: leaf for key, leaf in away.items() if key not in self._known}
        if new:
            copies = zip(new.items(), _copied(list(new.values()), self._device), strict=True)
            self._known |= {key: (leaf, copy) for (key, leaf), copy in copies}
        return tree.map_tree(lambda leaf: leaf if leaf.device == self._device else self._known[id(leaf)][1], value)


def moved(value: Tree, device: torch.device) -> Tree:
    """Return the tree on the device, or the tree itself if it is already there."""
    return Mover(device)(value)


def _copied(leaves: list[Tensor], device: torch.device) -> list[Tensor]:
    """Copy tensors of one device to another, in one block."""
    named: Tree = {str(place): leaf for place, leaf in enumerate(leaves)}
    layout, source = layout_of(named), leaves[0].device
    pinned = source == HOST and device.type == "cuda"
    block = torch.empty(layout.n_bytes, dtype=torch.uint8, device=source, pin_memory=pinned)
    tree.map_tree(Tensor.copy_, views(block, layout), named)
    return tree.leaves(views(block.to(device, non_blocking=pinned), layout))


class DeviceStore(MemoryStore):
    """Clients on the device as long as there is room for them, and all other clients on the host."""

    def __init__(self, blank: Callable[[int], Client], device: torch.device, budget: int) -> None:
        """Create an empty store. `budget` is the number of bytes of device memory that clients may use."""
        super().__init__(blank)
        self._device, self._room = device, budget
        self._sizes: dict[int, int] = {}  # bytes of the clients on the device

    def put(self, i: int, client: Client) -> None:
        """See `Store.put`."""
        kept = client._asdict()
        size = tree.n_bytes(kept)
        self._room += self._sizes.pop(i, 0)
        target = HOST
        if size <= self._room:
            target, self._sizes[i] = self._device, size
            self._room -= size
        super().put(i, Client(**moved(kept, target)))
