"""Stacked tensors of several clients: their examples, subsets of lanes, and tensors that all lanes share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fedloom import tree
from fedloom.inputs import Inputs, map_inputs
from fedloom.method import Batch
from fedloom.rng import Stream
from fedloom.training.batches import Rows
from fedloom.tree import Tree


class LaneSubset:
    """A subset of the lanes. It is read from stacked tensors and written back to them."""

    def __init__(self, lanes: list[int], n_lanes: int, device: torch.device) -> None:
        self.lanes = lanes
        self.index = None if len(lanes) == n_lanes else torch.tensor(lanes, device=device)

    def take(self, value: Tensor) -> Tensor:
        """Return these lanes of a stacked tensor."""
        return value if self.index is None else value.index_select(0, self.index)

    def put(self, value: Tensor, new: Tensor) -> Tensor:
        """Return the stacked tensor with these lanes replaced by `new`."""
        return new if self.index is None else value.index_copy(0, self.index, new)


class LaneBatch(NamedTuple):
    """The next batches of some lanes, which all have the same size."""

    subset: LaneSubset
    batch: Batch  # stacked
    places: Tensor  # positions of the examples among those of all lanes


class LaneRows:
    """The examples of all lanes in one tensor, so that one operation gathers the batches of a step."""

    def __init__(self, lanes: Sequence[Rows]) -> None:
        _, _, self._augment, device = lanes[0]
        self.x = inputs_side_by_side([rows.x for rows in lanes])
        y = side_by_side([rows.y for rows in lanes])
        self._most = y.shape[1]
        self._rows = Rows(map_inputs(lambda x: x.flatten(0, 1), self.x), y.flatten(0, 1), None, device)

    def places(self, lane: int, batches: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return a lane's batches as indices among the examples of all lanes."""
        return torch.split(torch.cat(list(batches)) + lane * self._most, [len(batch) for batch in batches])

    def batch(self, places: Tensor, streams: Sequence[Stream]) -> Batch:
        """Return stacked batches of equal size, one per stream: x (lanes, B, ...) and y (lanes, B, ...). Each stream belongs to a lane."""
        flat = self._rows.batch(places, streams[0])
        x = map_inputs(lambda v: v.view(len(streams), -1, *v.shape[1:]), flat.x)
        y = flat.y.view(len(streams), -1, *flat.y.shape[1:])
        if self._augment and isinstance(x, Tensor):
            x = torch.stack([self._augment(own, stream) for own, stream in zip(x, streams, strict=True)])
        return Batch(x, y)


def inputs_side_by_side(parts: Sequence[Inputs]) -> Inputs:
    """Return `side_by_side` of every input tensor."""
    first = parts[0]
    if isinstance(first, Tensor):
        return side_by_side([part for part in parts if isinstance(part, Tensor)])
    return {name: side_by_side([part[name] for part in parts if isinstance(part, dict)]) for name in first}


def side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Return stacked tensors (n, ...), padded with zeros: (lanes, most, ...). If they are contiguous in memory, nothing is copied."""
    first, storage = parts[0], parts[0].untyped_storage().data_ptr()
    places = [first.storage_offset() + k * first.numel() for k in range(len(parts))]
    if all(
        part.shape == first.shape
        and part.is_contiguous()
        and part.untyped_storage().data_ptr() == storage
        and part.storage_offset() == place
        for part, place in zip(parts, places, strict=True)
    ):
        return first.as_strided((len(parts), *first.shape), (first.numel(), *first.stride()))
    return pad_sequence(list(parts), batch_first=True)


def by_size(sizes: Sequence[int]) -> list[list[int]]:
    """Group indices with equal sizes. Indices with size 0 are omitted."""
    groups: dict[int, list[int]] = {}
    for k, size in enumerate(sizes):
        if size:
            groups.setdefault(size, []).append(k)
    return list(groups.values())


def stack_differing(trees: Sequence[Tree]) -> tuple[Tree, Tree]:
    """Return one tree for all lanes, and a tree with 0 for each stacked leaf and None for each leaf that is one object in all lanes."""

    def is_shared(*leaves: Tensor) -> bool:
        return all(leaf is leaves[0] for leaf in leaves)

    value = tree.map_tree(lambda *leaves: leaves[0] if is_shared(*leaves) else torch.stack(leaves), *trees)
    dims = tree.map_tree(lambda *leaves: None if is_shared(*leaves) else 0, *trees)  # type: ignore[arg-type]
    return value, dims
