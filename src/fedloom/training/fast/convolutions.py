"""Convolutions of several lanes, each with its own kernels.

By default, vmap combines the lanes' convolutions into one grouped convolution (`grouped`). The other form (`columns`) copies the
neighbourhood of every pixel into a column and computes one batched matrix product for all lanes. Which form is faster depends on the
device, the shapes and the precision, so `tuned` times both, once per layer. The two forms round differently. With `tuned`, the last bits
of results may therefore differ between runs; with `grouped` or `columns`, they do not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fedloom.accelerator import HOST, shortest_s

ConvolutionForm = Literal["grouped", "columns", "tuned"]
REPEATS = 5  # number of timings of each form

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ConvolutionShape:
    """The shapes in one lane's convolution, excluding the number of examples."""

    image: tuple[int, ...]  # shape (C, H, W) of its input
    weight: tuple[int, ...]
    dtype: torch.dtype
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]


class Convolutions:
    """Selects how the convolutions of lanes are computed, and stores which form was faster."""

    def __init__(self, form: ConvolutionForm, device: torch.device = HOST, bf16: bool = False) -> None:
        self._form, self._device, self._bf16 = form, device, bf16
        self.columns_faster: dict[ConvolutionShape, bool] = {}  # results of the timings, with `tuned`

    def of(self, n_lanes: int) -> TorchFunctionMode:
        """Return a context in which 2D convolutions inside vmap use the selected form. Grouped convolutions do not change."""
        return _Chosen(self, n_lanes)

    def by_columns(self, layer: ConvolutionShape) -> bool | None:
        """Return whether to compute a layer with the `columns` form, or None if it has not been timed yet."""
        return self.columns_faster.get(layer) if self._form == "tuned" else self._form == "columns"

    def time(self, layer: ConvolutionShape, n_rows: int, n_lanes: int) -> None:
        """Time both forms, forward and backward, for `n_lanes` lanes of `n_rows` examples, and store which one is faster."""
        x = torch.ones((n_lanes, n_rows, *layer.image), dtype=layer.dtype, device=self._device)
        weight = torch.ones((n_lanes, *layer.weight), dtype=layer.dtype, device=self._device)
        geometry = layer.stride, layer.padding, layer.dilation
        forms = {
            "grouped": lambda w, x: torch.conv2d(x, w, None, *geometry).sum(),
            "columns": lambda w, x: columns(x, w, None, layer).sum(),
        }
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
            seconds = {name: self._seconds(loss, weight, x) for name, loss in forms.items()}
        self.columns_faster[layer] = seconds["columns"] < seconds["grouped"]
        found = ", ".join(f"{name} {1000 * s:.3g} ms" for name, s in seconds.items())
        shapes = f"{n_lanes} lanes of {n_rows} examples {layer.image}, kernels {layer.weight}"
        log.info("%s: %s", shapes, found)

    def _seconds(self, loss: Callable[..., Tensor], weight: Tensor, x: Tensor) -> float:
        work = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)))
        return shortest_s(lambda: work(weight, x), self._device, REPEATS)


class _Chosen(TorchFunctionMode):
    """A context as described in `Convolutions.of`.

    New layers are first computed as vmap does, and are timed at the end of the context, outside vmap and outside recordings.
    """

    def __init__(self, book: Convolutions, n_lanes: int) -> None:
        super().__init__()
        self._book, self._n_lanes = book, n_lanes
        self._new: dict[ConvolutionShape, int] = {}  # number of rows of each new layer

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Intercept one function call."""
        given = dict(zip(("input", "weight", "bias", "stride", "padding", "dilation", "groups"), args, strict=False))
        given |= kwargs or {}
        plain = given.get("groups", 1) == 1 and not isinstance(given.get("padding"), str)
        if func is not torch.conv2d or not plain or given["input"].ndim != 4:
            return func(*args, **(kwargs or {}))
        x, weight = given["input"], given["weight"]
        layer = ConvolutionShape(
            image=tuple(x.shape[1:]),
            weight=tuple(weight.shape),
            dtype=x.dtype,
            stride=_pair(given.get("stride", 1)),
            padding=_pair(given.get("padding", 0)),
            dilation=_pair(given.get("dilation", 1)),
        )
        by_columns = self._book.by_columns(layer)
        if by_columns is None:
            self._new.setdefault(layer, len(x))
        return columns(x, weight, given.get("bias"), layer) if by_columns else func(*args, **(kwargs or {}))

    def __exit__(self, *error: Any) -> None:
        """Time the new layers."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for layer, n_rows in self._new.items():
            self._book.time(layer, n_rows, self._n_lanes)


def columns(x: Tensor, weight: Tensor, bias: Tensor | None, layer: ConvolutionShape) -> Tensor:
    """Return the result of `torch.conv2d` without groups, computed as one matrix product.

    The shapes are x (B, C, H, W), weight (O, C, h, w) and bias (O,); the result is (B, O, H', W').
    """
    kernel = weight.shape[2:]
    axes = zip(x.shape[2:], kernel, layer.stride, layer.padding, layer.dilation, strict=True)
    sides = [(side + 2 * p - d * (k - 1) - 1) // s + 1 for side, k, s, p, d in axes]
    pixels = F.unfold(x, tuple(kernel), layer.dilation, layer.padding, layer.stride)  # (B, C h w, H' W')
    out = weight.flatten(1) @ pixels.transpose(0, 1).flatten(1)  # one product for the whole batch, not one per example
    if bias is not None:
        out = out + bias[:, None]
    return out.view(-1, len(x), *sides).transpose(0, 1)


def _pair(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value) * (2 // len(value))
