"""Numeric types with limits, for fields of settings and methods. One function checks the limits; help pages describe them."""

from __future__ import annotations

import dataclasses
import math
import operator
import re
import types
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Lt(1)]
Share = Annotated[float, Gt(0), Le(1)]
Proportion = Annotated[float, Ge(0), Le(1)]
Count = Annotated[int, Ge(1)]
Whole = Annotated[int, Ge(0)]

RAY_ADDRESS: Final = re.compile(r"(ray://)?(\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]]+):(\d{1,5})")
"""HOST:PORT or ray://HOST:PORT, with scheme, host and port as groups."""

LIMITS: Final[Mapping[str, tuple[Callable[[Any, Any], bool], str, str]]] = MappingProxyType(
    {
        "ge": (operator.ge, "at least", "≥"),
        "gt": (operator.gt, "above", ">"),
        "le": (operator.le, "at most", "≤"),
        "lt": (operator.lt, "below", "<"),
    }
)
"""For each limit, its test, its wording in messages, and its symbol on help pages."""
_PLAIN: Final = MappingProxyType(
    {"int": "integer", "float": "number", "bool": "true|false", "str": "text", "Path": "path"}
)


def check_limits(settings: Any) -> None:
    """Raise ValueError if a number in a dataclass is outside the limits of its field or not finite.

    If a subclass changes the default of a field, the limits remain, even if the subclass annotates the field as plain `float`.
    """
    bases = [
        get_type_hints(cls, include_extras=True) for cls in type(settings).__mro__ if dataclasses.is_dataclass(cls)
    ]
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        limits = dict.fromkeys(limit for hints in bases for limit in _limits(hints.get(field.name)))
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{field.name}={value}: must be a finite number")
        if not all(LIMITS[name][0](value, limit) for name, limit in limits):
            allowed = " and ".join(f"{LIMITS[name][1]} {limit:g}" for name, limit in limits)
            raise ValueError(f"{field.name}={value}: must be {allowed}")


def at_limit(annotation: Any, value: Any) -> bool:
    """Return whether a number is the smallest or the largest that an annotated type allows."""
    return any(name in ("ge", "le") and value == limit for name, limit in _limits(annotation))


def type_words(annotation: Any, field: FieldInfo | None = None) -> str:
    """Return a type in words, such as `integer ≥ 1` or `half|standard|none`. `field` may have further limits."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "|".join(map(str, args))
    if origin in (Union, types.UnionType):
        return " or ".join(type_words(part) for part in args if part is not type(None))
    if origin is tuple:
        return f"list of {type_words(args[0])}"
    if origin is dict:
        return f"table of {type_words(args[1])}"
    plain = args[0] if origin is Annotated else annotation
    words = _PLAIN.get(getattr(plain, "__name__", ""), str(plain)) if get_origin(plain) is None else type_words(plain)
    limits = [*_limits(annotation), *(_named(field.metadata) if field else ())]
    signs = ", ".join(f"{LIMITS[name][2]} {limit}" for name, limit in limits)
    return f"{words} {signs}" if signs else words


def _limits(annotation: Any) -> Iterator[tuple[str, Any]]:
    """Yield the limits of an annotated type as (name, value)."""
    if get_origin(annotation) is Annotated:
        for note in get_args(annotation)[1:]:
            yield from _named(getattr(note, "metadata", [note]))  # pydantic's Field contains several


def _named(notes: list[Any]) -> Iterator[tuple[str, Any]]:
    return ((name, getattr(note, name)) for note in notes for name in LIMITS if hasattr(note, name))
