"""Input layers in dual form: what SGD does to a linear layer on a client's rows, without touching its weight until the end.

A linear layer on the rows X (n, F) themselves, with a weight W (D, F), gets gradients that are sums of outer products, S^T X: each row
times the loss's slopes S at the layer's outputs for it. After any number of steps of plain SGD it is therefore W = W_0 + C^T X, where row
i of C (n, D) is the sum of -lr times row i's slopes, and its outputs are X W_0^T + (X X^T) C. So a turn needs one product with
W_0 before its first step and one for W after the last; what a step reads and writes is of the size of the outputs, not of the weight.
Nothing is approximated: the numbers are those of the steps as written, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TOUCHED = 30  # multiplications that take as long as a step's reading and writing of one number of a weight (measured, as is the next)
AROUND = 1_000_000  # multiplications that take as long as what a step in dual form does beside them


class NotDualError(RuntimeError):
    """A loss does more with an input layer's weight than to multiply rows by it."""


class Work(NamedTuple):
    """A phase's work: the client's rows, rows over all steps, steps."""

    n_rows: int
    visited: int
    steps: int

    def is_less_in_dual_form(self, weight: Tensor) -> bool:
        """Whether the dual form saves time with this weight (D, F). No clock is asked: it rounds otherwise."""
        (outputs, _), size = weight.shape, weight.numel()
        written = 2 * self.visited * size + self.steps * TOUCHED * size
        products = 2 * self.n_rows * size + self.n_rows**2 * (size // outputs) + self.visited * self.n_rows * outputs
        return products + self.steps * AROUND < written


class Dual:
    """An input layer in the turns of one or several clients (lanes), which may have different numbers of rows."""

    def __init__(self, weights: Sequence[Tensor], rows: Sequence[Tensor], lr: float) -> None:
        """Every lane's weight (D, F) and rows, of F numbers each; the learning rate."""
        self._weights, self._rows, self._lr = weights, [x.flatten(1) for x in rows], lr
        lanes, self._most = len(rows), max(map(len, rows))
        self._first = weights[0].new_zeros(lanes * self._most, len(weights[0]))
        self._gram = weights[0].new_zeros(lanes * self._most, self._most)
        self._moves = torch.zeros_like(self._first)
        for lane, (weight, x) in enumerate(zip(weights, self._rows, strict=True)):
            start = lane * self._most
            torch.mm(x, weight.T, out=self._first[start : start + len(x)])
            self._gram[start : start + len(x), : len(x)] = x @ x.T

    def places(self, index: Tensor, lanes: Tensor | None = None) -> Tensor:
        """Where rows lie here: numbers (lanes, B) within each of some lanes, or of the only one."""
        return index if lanes is None else (index + self._most * lanes[:, None]).view(-1)

    def outputs(self, places: Tensor, lanes: Tensor | None = None) -> Tensor:
        """What the layer gives now, but for its bias, for some rows of every lane, or of some: (lanes, B, D)."""
        moves = self._moves.view(-1, self._most, self._moves.shape[1])
        moves = moves if lanes is None else moves.index_select(0, lanes)
        first, gram = (table.index_select(0, places) for table in (self._first, self._gram))
        shape = len(moves), len(places) // len(moves), -1
        return torch.baddbmm(first.view(shape), gram.view(shape), moves)

    def step(self, places: Tensor, slopes: Tensor, scale: float = 1.0) -> None:
        """A step of SGD from the loss's slopes (..., D) at the outputs for some rows; `scale` multiplies the learning rate."""
        self._moves.index_add_(0, places, slopes.view(-1, slopes.shape[-1]), alpha=-self._lr * scale)

    def weight(self, lane: int = 0) -> Tensor:
        """A lane's weight after all steps."""
        x, start = self._rows[lane], lane * self._most
        return torch.addmm(self._weights[lane], self._moves[start : start + len(x)].T, x)


class Outputs(Tensor):
    """A layer's outputs for a batch, in its weight's place: a linear function of the batch's rows gives them, all else fails."""

    plain: Tensor
    rows: Tensor | None

    @staticmethod
    def of(plain: Tensor, rows: Tensor | None = None) -> Outputs:
        """The outputs (B, D) for `rows`; without them, nobody looks what a layer is given (where losses are mapped, nobody can)."""
        outputs = plain.as_subclass(Outputs)
        outputs.plain, outputs.rows = plain, rows
        return outputs

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Tensor:
        """One function of tensors."""
        if func is not F.linear:
            raise NotDualError
        return cls._linear(*args, **(kwargs or {}))

    @staticmethod
    def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not isinstance(weight, Outputs) or not (weight.rows is None or _are_same(input, weight.rows)):
            raise NotDualError
        return weight.plain if bias is None else weight.plain + bias


def _are_same(input: Tensor, rows: Tensor) -> bool:
    """Whether a layer's input (B, F) is the very memory of the batch's rows."""
    return (
        input.shape == (len(rows), rows[0].numel())
        and input.data_ptr() == rows.data_ptr()
        and input.is_contiguous()
        and rows.is_contiguous()
    )


def linear_layers(modules: Mapping[str, nn.Module]) -> dict[str, int]:
    """The names of linear layers' weights, each with its layer's number of inputs."""
    return {
        ".".join(part for part in (net, name, "weight") if part): layer.in_features
        for net, module in modules.items()
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
    }


def accepted(names: tuple[str, ...], run: Callable[[str], Any]) -> tuple[str, ...]:
    """Those layers whose outputs a loss takes for their weight; `run` runs it so with one layer.

    A loss that is wrong otherwise fails again when it runs as written.
    """
    found = []
    for name in names:
        try:
            run(name)
        except Exception:
            continue
        found.append(name)
    return tuple(found)
