"""Storage of clients between rounds, and trees in memory that processes share.

A `Slab` is a memory-mapped file that contains trees; every process that opens it sees the same bytes. A `Store` keeps the state of each
client, either in the memory of this process, or in slabs, which any worker can read and which the system may move to disk.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fedloom import tree
from fedloom.method import Client
from fedloom.tree import Tree

ALIGNMENT = 64  # in bytes; every leaf starts at a multiple of this, for vector instructions


class Leaf(NamedTuple):
    """The location of one tensor in a slab."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    n_bytes: int


class TreeLayout(NamedTuple):
    """The locations of a tree's leaves in a slab: a tree of `Leaf`s, and the size of the slab in bytes."""

    leaves: Tree
    n_bytes: int


def layout_of(example: Tree) -> TreeLayout:
    """Return the layout for all trees with the structure of `example`."""
    end = 0

    def place(leaf: Tensor) -> Leaf:
        nonlocal end
        start, n_bytes = end, leaf.numel() * leaf.element_size()
        end += -(-n_bytes // ALIGNMENT) * ALIGNMENT
        return Leaf(leaf.dtype, tuple(leaf.shape), start, n_bytes)

    leaves = tree.map_tree(place, example)  # type: ignore[arg-type]
    return TreeLayout(leaves, end)


def views(data: Tensor, layout: TreeLayout) -> Tree:
    """Return the tree stored in the bytes `data` (n,), uint8. Its leaves are views of these bytes."""

    def view(leaf: Leaf) -> Tensor:
        return data[leaf.start : leaf.start + leaf.n_bytes].view(leaf.dtype).view(leaf.shape)

    return tree.map_tree(view, layout.leaves)


class Slab:
    """A memory-mapped file. `data` contains its bytes (n,), uint8."""

    def __init__(self, path: Path, n_bytes: int) -> None:
        """Open the file. Create or enlarge it if necessary."""
        self.n_bytes = max(n_bytes, 1)
        _enlarge(path, self.n_bytes)
        self.data = torch.from_file(str(path), shared=True, size=self.n_bytes, dtype=torch.uint8)


def _enlarge(path: Path, n_bytes: int) -> None:
    """Extend a file to at least this size.

    torch is not used, because it also zeroes the first byte of the file, which another process may have written.
    """
    with path.open("ab") as file:
        if file.seek(0, os.SEEK_END) < n_bytes:
            file.truncate(n_bytes)


class Store(Protocol):
    """The state of clients between rounds. A client that has never changed is created by `blank`."""

    def get(self, i: int) -> Client:
        """Return the stored state of client `i`."""

    def put(self, i: int, client: Client) -> None:
        """Replace the stored state of client `i`. A client that keeps nothing need not be stored."""

    def changed(self) -> Iterable[int]:
        """Return the stored clients, in order."""


class MemoryStore:
    """Clients in this process's memory."""

    def __init__(self, blank: Callable[[int], Client]) -> None:
        self._blank = blank
        self._clients: dict[int, Client] = {}

    def get(self, i: int) -> Client:
        """See `Store.get`."""
        return self._clients[i] if i in self._clients else self._blank(i)

    def put(self, i: int, client: Client) -> None:
        """See `Store.put`."""
        if tree.leaves(client._asdict()):
            self._clients[i] = client

    def changed(self) -> Iterable[int]:
        """See `Store.changed`."""
        return sorted(self._clients)


class MappedStore:
    """Clients in slabs that all workers share. Clients with the same structure share a slab. Only one worker at a time may use a client.

    A slab has room for all clients, but the system allocates memory or disk space only for stored clients.
    """

    def __init__(self, blank: Callable[[int], Client], folder: Path, kind_of: Sequence[int]) -> None:
        """Create the slabs. `kind_of[i]` is a number that identifies the structure of client `i`."""
        self._blank, self._folder, self._kind_of = blank, folder, kind_of
        self._slabs: dict[int, tuple[TreeLayout, Slab]] = {}
        self._stored = Slab(folder / "stored", len(kind_of)).data  # 1 for stored clients

    def get(self, i: int) -> Client:
        """Return a client as described in `Store.get`. Its tensors are views of the slab."""
        return Client(**self._views(i)) if self._stored[i] else self._blank(i)

    def put(self, i: int, client: Client) -> None:
        """See `Store.put`."""
        kept = tree.clone(client._asdict())  # its tensors may be views of this slab
        if tree.leaves(kept):
            tree.map_tree(Tensor.copy_, self._views(i), kept)
            self._stored[i] = 1

    def changed(self) -> Iterable[int]:
        """See `Store.changed`."""
        stored: list[int] = self._stored.nonzero().flatten().tolist()
        return stored

    def _views(self, i: int) -> Tree:
        kind = self._kind_of[i]
        if kind not in self._slabs:
            layout = layout_of(self._blank(i)._asdict())
            size = layout.n_bytes * len(self._kind_of)
            self._slabs[kind] = layout, Slab(self._folder / f"clients-{kind}", size)
        layout, slab = self._slabs[kind]
        start = layout.n_bytes * i
        return views(slab.data[start : start + layout.n_bytes], layout)
