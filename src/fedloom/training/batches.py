"""A client's examples: their memory layout and their batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from fedloom.accelerator import HOST, staged
from fedloom.inputs import Inputs, map_inputs, tensors_of
from fedloom.method import Batch, Interleave, Train
from fedloom.rng import Stream

GATHERED_BYTES = 1 << 18  # bytes of inputs gathered at once, which stay in the processor's cache until they are used


class Rows(NamedTuple):
    """A client's examples, the optional augmentation of their batches, and the device on which they are used."""

    x: Inputs  # (n, ...), or several such tensors by name
    y: Tensor  # (n, ...) targets
    augment: Callable[[Tensor, Stream], Tensor] | None = None
    device: torch.device = HOST

    def batch(self, index: Tensor, rng: Stream) -> Batch:
        """Return the examples at the indices `index` as a training batch, with the memory layout of `x`."""
        return next(self.batches([index], rng))

    def batches(self, order: Iterable[Tensor], rng: Stream) -> Iterator[Batch]:
        """Yield the batches. Several small batches are gathered at once, because each call costs more than the copy itself."""
        room = max(GATHERED_BYTES // max(sum(t[:1].nbytes for t in tensors_of(self.x)), 1), 1)
        for some in _together(order, room):
            index, sizes = torch.cat(some).to(self.y.device), [len(mine) for mine in some]
            y = staged(self.y.index_select(0, index), self.device)
            for mine, targets in zip(self._gathered(index, sizes), torch.split(y, sizes), strict=True):
                yield Batch(self.augment(mine, rng) if self.augment and isinstance(mine, Tensor) else mine, targets)

    def _gathered(self, index: Tensor, sizes: list[int]) -> Iterable[Inputs]:
        """Return the inputs of the examples at `index`, in consecutive parts of the given sizes."""
        if isinstance(self.x, Tensor):
            return torch.split(staged(_gather(self.x, index), self.device), sizes)
        parts = {name: torch.split(staged(_gather(v, index), self.device), sizes) for name, v in self.x.items()}
        return [{name: values[k] for name, values in parts.items()} for k in range(len(sizes))]

    def part(self, start: int, stop: int | None = None) -> Batch:
        """Return the examples from `start` to `stop` without augmentation."""
        x = map_inputs(lambda values: staged(values[start:stop], self.device), self.x)
        return Batch(x, staged(self.y[start:stop], self.device))


def _gather(values: Tensor, index: Tensor) -> Tensor:
    """Return the rows at `index` in the memory layout of `values`."""
    if is_channels_last(values):
        return values.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)
    return values.index_select(0, index)


def _together(order: Iterable[Tensor], room: int) -> Iterator[list[Tensor]]:
    """Group consecutive batches, with at most `room` examples per group; a larger batch is a separate group."""
    some, left = list[Tensor](), room
    for index in order:
        if some and len(index) > left:
            yield some
            some, left = [], room
        some.append(index)
        left -= len(index)
    if some:
        yield some


def is_channels_last(x: Inputs) -> bool:
    """Return whether inputs are images stored in channels-last format."""
    return isinstance(x, Tensor) and x.ndim == 4 and x.stride() == _channels_last_stride(x)


def laid_out_inputs(x: Inputs, channels_last: bool) -> Inputs:
    """Return inputs with images in the requested memory format. The values do not change."""
    return laid_out({"x": x}, channels_last)["x"] if isinstance(x, Tensor) else x


def laid_out(tensors: Mapping[str, Tensor], channels_last: bool) -> dict[str, Tensor]:
    """Return the tensors, with four-dimensional tensors in the requested memory format. The values do not change."""
    lay = _channels_last if channels_last else torch.Tensor.contiguous
    return {name: lay(t) if t.ndim == 4 else t for name, t in tensors.items()}


def _channels_last(x: Tensor) -> Tensor:
    """Return a tensor in channels-last format.

    torch does not convert tensors with one channel or one pixel, so the strides are set explicitly.
    """
    return x.contiguous(memory_format=torch.channels_last).as_strided(x.shape, _channels_last_stride(x))


def _channels_last_stride(x: Tensor) -> tuple[int, ...]:
    _, channels, height, width = x.shape
    return height * width * channels, 1, width * channels, channels


class Plan(NamedTuple):
    """The plan that splits a client's examples into batches."""

    batch_size: int = 10
    drop_last: bool = False
    slowdown: float = 1.0  # a slow device takes 1/slowdown of its steps (at least one)

    def batches(
        self, n: int, epochs: int, steps: int | None, rng: Stream, *, classes: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Yield the indices of each batch's examples, with a new permutation per epoch. A slow device skips the last batches.

        With `classes`, the class of each example (n,), examples are drawn with replacement instead, so that every class that the client
        holds is equally likely.

        A batch is never larger than the client's set of examples. With `drop_last`, an incomplete last batch is skipped. Otherwise, a last
        batch of one example is merged into the batch before it, because BatchNorm cannot train on one example.
        """
        sizes = self._sizes(n)
        every = self._batches(n, sizes, epochs if steps is None else -(-steps // len(sizes)), rng, classes)
        if steps is None and self.slowdown == 1:
            return every
        n_steps = len(sizes) * epochs if steps is None else steps
        return islice(every, max(int(n_steps // self.slowdown), 1))

    def n_steps(self, n: int, epochs: int, steps: int | None) -> int:
        """Return the number of batches that `batches` yields for `n` examples."""
        whole = len(self._sizes(n)) * epochs if steps is None else steps
        return whole if self.slowdown == 1 else max(int(whole // self.slowdown), 1)

    def _sizes(self, n: int) -> list[int]:
        """Return the size of each batch in one pass over `n` examples."""
        size = min(self.batch_size, n)
        sizes, rest = [size] * (n // size), n % size
        if rest == 1 and not self.drop_last:
            sizes[-1] += 1
        elif rest and not self.drop_last:
            sizes.append(rest)
        return sizes

    def _batches(self, n: int, sizes: list[int], epochs: int, rng: Stream, classes: Tensor | None) -> Iterator[Tensor]:
        for _ in range(epochs):
            order = rng.permutation(n)[: sum(sizes)] if classes is None else _balanced(classes, sum(sizes), rng)
            yield from order.split_with_sizes(sizes)


def _balanced(classes: Tensor, n: int, rng: Stream) -> Tensor:
    """Draw `n` indices of examples with replacement: first a class, uniformly among those that occur, then one of its examples."""
    counts = classes.cpu().bincount()
    counts = counts[counts > 0]
    by_class, starts = classes.cpu().argsort(stable=True), counts.cumsum(0) - counts
    chosen = rng.integers(len(counts), (n,))
    return by_class[starts[chosen] + rng.integers(2**31, (n,)) % counts[chosen]]


def phase_batches(phase: Train | Interleave, plan: Plan, rows: Rows, rng: Stream) -> list[Tensor]:
    """Return the indices of the examples in each batch of a phase."""
    classes = rows.y if phase.balanced else None
    return list(plan.batches(len(rows.y), phase.epochs, phase.steps, rng.child("batches"), classes=classes))
