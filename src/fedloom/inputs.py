"""The inputs of a model: one tensor, or several tensors by name, and a description of each.

Several tensors are passed to `forward` by name if it has a parameter for each of them, or by position if their names are the numbers "0",
"1", ... (from a tuple). Otherwise, the dictionary is passed as one argument.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor, nn

Inputs = Tensor | dict[str, Tensor]
"""The inputs of B examples: (B, ...), or several such tensors by name."""

Kind = Literal["picture", "number", "token", "category"]
KINDS: tuple[str, ...] = get_args(Kind)


@dataclass(frozen=True, kw_only=True)
class Field:
    """A description of one input tensor.

    Attributes:
        name: the tensor's key in the dictionary of inputs, or "" if it is the only tensor.
        shape: shape of one example.
        kind: `picture` (an image's pixels, C H W), `number` (floating point), `token` (integers that index a vocabulary) or
            `category` (a row of integers, one per categorical column). Tokens and categories are int64 and are never scaled.
        levels: for tokens, (V,) with the size V of the vocabulary; for categories, the number of levels of each column, whose ids
            are 1 to that number (0 is an unknown level); otherwise empty.
    """

    name: str = ""
    shape: tuple[int, ...]
    kind: Kind
    levels: tuple[int, ...] = ()

    @property
    def is_integer(self) -> bool:
        """Whether the values are indices."""
        return self.kind in ("token", "category")

    @property
    def bounds(self) -> tuple[int, ...]:
        """The exclusive upper bounds of indices: one for all tokens, or one per column of categories, in which 0 is an unknown level."""
        return tuple(n + 1 for n in self.levels) if self.kind == "category" else self.levels


@dataclass(frozen=True)
class InputSpec:
    """A description of a model's inputs, with one field per tensor."""

    fields: tuple[Field, ...]

    @classmethod
    def plain(cls, shape: Sequence[int]) -> InputSpec:
        """Return the description of one tensor: an image if `shape` is (C, H, W), otherwise numbers."""
        return cls((Field(shape=tuple(shape), kind="picture" if len(shape) == 3 else "number"),))

    @property
    def is_single(self) -> bool:
        """Whether inputs are one tensor rather than a dictionary."""
        return len(self.fields) == 1 and not self.fields[0].name

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example, for the only tensor or the first of several."""
        return self.fields[0].shape

    @property
    def kinds(self) -> frozenset[Kind]:
        """The kinds of all fields."""
        return frozenset(field.kind for field in self.fields)

    @property
    def is_picture(self) -> bool:
        """Whether the only input is an image (C, H, W)."""
        return self.is_single and self.fields[0].kind == "picture"

    def of(self, kind: Kind) -> Field | None:
        """Return the first field of a kind, or None if there is none."""
        return next((field for field in self.fields if field.kind == kind), None)

    def __str__(self) -> str:
        shown = [f"{f.name + ': ' if f.name else ''}{f.kind} {f.shape}" for f in self.fields]
        return ", ".join(shown)


def map_inputs(fn: Callable[..., Tensor], x: Inputs, *others: Inputs) -> Inputs:
    """Apply `fn` to the tensor, or to each of several tensors."""
    if isinstance(x, Tensor):
        return fn(x, *others)
    return {name: fn(value, *(other[name] for other in others)) for name, value in x.items()}  # type: ignore[index]


def tensors_of(x: Inputs) -> list[Tensor]:
    """Return the tensors of the inputs, in order."""
    return [x] if isinstance(x, Tensor) else list(x.values())


def named_tensors(x: Inputs) -> dict[str, Tensor]:
    """Return the tensors of the inputs by name; a single tensor has the name ""."""
    return {"": x} if isinstance(x, Tensor) else x


def shapes_of(x: Inputs) -> str:
    """Return the shapes of the inputs in words, for messages."""
    if isinstance(x, Tensor):
        return str(tuple(x.shape))
    return ", ".join(f"{name} {tuple(value.shape)}" for name, value in x.items())


def unstacked(x: Inputs, n: int) -> list[Inputs]:
    """Return the n parts of inputs that are stacked along a first dimension."""
    if isinstance(x, Tensor):
        return list(x)
    return [{name: value[k] for name, value in x.items()} for k in range(n)]


def n_examples(x: Inputs) -> int:
    """Return the number of examples B."""
    return len(tensors_of(x)[0])


def call_arguments(module: nn.Module, x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and the named arguments for calling `module` on the inputs `x`."""
    if not isinstance(x, Mapping):
        return (x,), {}
    if all(name.isdigit() for name in x):
        return tuple(x.values()), {}
    inner = module
    while isinstance(entry := getattr(inner, "entry", None), nn.Module):  # see `models.layers.InputChain`
        inner = entry
    return ((), dict(x)) if _names(type(inner).forward, tuple(x)) else ((x,), {})


@functools.lru_cache(256)
def _names(forward: Callable[..., Any], names: tuple[str, ...]) -> bool:
    """Return whether the function has a parameter for every name."""
    parameters = inspect.signature(forward).parameters
    return all(name in parameters for name in names)


def unwrapped(outputs: Any) -> Any:
    """Return the `logits` of an output object (as Hugging Face models return), or the outputs themselves."""
    return outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", outputs)
