"""Trees from the host to a device and back, one copy per tree rather than one per tensor."""

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
    """Brings trees to one device; a tensor that came before is not copied again, so what clients share stays shared."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known: dict[int, tuple[Tensor, Tensor]] = {}  # by the original's identity: the original, the copy

    def __call__(self, value: Tree) -> Tree:
        """The tree on the device; tensors that are there already are taken as they are."""
        away = {id(leaf): leaf for leaf in tree.leaves(value) if leaf.device != self._device}
        if not away:
            return value
        new = {key: leaf for key, leaf in away.items() if key not in self._known}
        if new:
            copies = zip(new.items(), _copied(list(new.values()), self._device), strict=True)
            self._known |= {key: (leaf, copy) for (key, leaf), copy in copies}
        return tree.map_tree(lambda leaf: leaf if leaf.device == self._device else self._known[id(leaf)][1], value)


def moved(value: Tree, device: torch.device) -> Tree:
    """The tree on the device; itself, if it is there already."""
    return Mover(device)(value)


def _copied(leaves: list[Tensor], device: torch.device) -> list[Tensor]:
    """Copies of tensors of one device; they lie in one block, which travels whole."""
    named: Tree = {str(place): leaf for place, leaf in enumerate(leaves)}
    layout, source = layout_of(named), leaves[0].device
    pinned = source == HOST and device.type == "cuda"
    block = torch.empty(layout.n_bytes, dtype=torch.uint8, device=source, pin_memory=pinned)
    tree.map_tree(Tensor.copy_, views(block, layout), named)
    return tree.leaves(views(block.to(device, non_blocking=pinned), layout))


class DeviceStore(MemoryStore):
    """Clients on the device as long as there is room for them, the others on the host."""

    def __init__(self, blank: Callable[[int], Client], device: torch.device, budget: int) -> None:
        """`budget`: bytes of the device's memory."""
        super().__init__(blank)
        self._device, self._room = device, budget
        self._sizes: dict[int, int] = {}  # of those on the device

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
