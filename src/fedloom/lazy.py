"""Lazy imports: names are imported at their first use, so a command loads only what it needs."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any, Generic, TypeVar

T_co = TypeVar("T_co", covariant=True)


def resolve(origin: str) -> Any:
    """Import and return the object `module:name`."""
    module, _, name = origin.partition(":")
    return getattr(importlib.import_module(module), name)


def export(package: str, origins: Mapping[str, str]) -> None:
    """Make `package` import the names in `origins` (name: module), and its submodules, at their first use.

    If a submodule has the same name as an exported object, the name refers to the object.
    """

    class Lazy(ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name in origins:
                value = getattr(importlib.import_module(origins[name]), name)
            elif not name.startswith("_") and importlib.util.find_spec(f"{package}.{name}"):
                value = importlib.import_module(f"{package}.{name}")
            else:
                raise AttributeError(f"module {package!r} has no attribute {name!r}")
            setattr(self, name, value)
            return value

        def __setattr__(self, name: str, value: Any) -> None:
            hides = isinstance(value, ModuleType) and origins.get(name) == value.__name__
            super().__setattr__(name, getattr(value, name) if hides else value)

        def __dir__(self) -> list[str]:
            return sorted({*super().__dir__(), *origins})

        def __reduce__(self) -> tuple[Any, ...]:  # pickled functions may refer to the module
            return importlib.import_module, (package,)

    sys.modules[package].__class__ = Lazy


class Registry(Mapping[str, T_co], Generic[T_co]):
    """A read-only table of objects by name. Each is imported from its origin, `module:name`, at lookup."""

    def __init__(self, origins: Mapping[str, str]) -> None:
        self.origins = origins

    def __getitem__(self, name: str) -> T_co:
        found: T_co = resolve(self.origins[name])
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.origins)

    def __len__(self) -> int:
        return len(self.origins)

    def __contains__(self, name: object) -> bool:
        return name in self.origins
