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

# In multiplications that take as long (docs/performance.md says how they were measured):
TOUCHED = 30  # one number of a weight that a step reads and writes
TOUCHED_IN_LANES = 60  # the same where several clients' weights outgrow the cache
AROUND = 4_000_000  # what a step in dual form does beside its products, for all lanes together
CHUNK = 5  # lanes whose rows are multiplied at once: they stay in the cache for both products
GAIN = 0.8  # the dual form must take at most this part of the time


class NotDualError(RuntimeError):
    """A loss does more with an input layer's weight than to multiply rows by it."""


class Work(NamedTuple):
    """A client's work in a phase: its rows, rows over all steps, steps, and how many clients do such work side by side."""

    n_rows: int
    visited: int
    steps: int
    lanes: int = 1

    def is_less_in_dual_form(self, weight: Tensor) -> bool:
        """Whether the dual form saves time with this weight (D, F). No clock is asked: it rounds otherwise."""
        (outputs, _), size = weight.shape, weight.numel()
        touched = TOUCHED if self.lanes == 1 else TOUCHED_IN_LANES
        written = 2 * self.visited * size + self.steps * touched * size
        products = 2 * self.n_rows * size + self.n_rows**2 * (size // outputs) + self.visited * self.n_rows * outputs
        return products + self.steps * AROUND / self.lanes < GAIN * written


class Dual:
    """An input layer in the turns of one or several clients (lanes)."""

    def __init__(self, weights: Sequence[Tensor], rows: Tensor, lr: float) -> None:
        """Every lane's weight (D, F); all lanes' rows (lanes, n, ...) of F numbers, zeros where one has fewer; the learning rate."""
        self._weights, self._rows, self._lr = weights, rows.flatten(2), lr
        lanes, most, outputs = *rows.shape[:2], len(weights[0])
        self._first, self._gram = rows.new_empty(lanes * most, outputs), rows.new_empty(lanes, most, most)
        self._moves = rows.new_zeros(lanes, most, outputs)
        some = CHUNK if all(weight is weights[0] for weight in weights) else 1
        for start in range(0, lanes, some):
            x, end = self._rows[start : start + some], min(start + some, lanes)
            torch.mm(x.flatten(0, 1), weights[start].T, out=self._first[start * most : end * most])
            torch.bmm(x, x.transpose(1, 2), out=self._gram[start:end])

    def outputs(self, places: Tensor, lanes: Tensor | None = None) -> Tensor:
        """What the layer gives now, but for its bias, for rows of every lane, or of some: (lanes, B, D).

        `places` are the rows' numbers among all rows, lane after lane.
        """
        moves = self._moves if lanes is None else self._moves.index_select(0, lanes)
        first, gram = (table.index_select(0, places) for table in (self._first, self._gram.flatten(0, 1)))
        shape = len(moves), len(places) // len(moves), -1
        return torch.baddbmm(first.view(shape), gram.view(shape), moves)

    def step(self, places: Tensor, slopes: Tensor, scale: float = 1.0) -> None:
        """A step of SGD from the loss's slopes (..., D) at the outputs for some rows; `scale` multiplies the learning rate."""
        flat = slopes.reshape(-1, slopes.shape[-1])
        self._moves.flatten(0, 1).index_add_(0, places, flat, alpha=-self._lr * scale)

    def weight(self, lane: int = 0) -> Tensor:
        """A lane's weight after all steps."""
        return torch.addmm(self._weights[lane], self._moves[lane].T, self._rows[lane])


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


def linear_layers(modules: Mapping[str, nn.Module]) -> frozenset[str]:
    """The names of linear layers' weights."""
    return frozenset(
        ".".join(part for part in (net, name, "weight") if part)
        for net, module in modules.items()
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
    )


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
