"""Lazy imports: names are imported at their first use, so a command loads only what it needs."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

T_co = TypeVar("T_co", covariant=True)


def resolve(origin: str) -> Any:
    """Import and return the object `module:name`."""
    module, _, name = origin.partition(":")
    return getattr(importlib.import_module(module), name)


def export(package: str) -> dict[str, str]:
    """Make `package` import the names in its `if TYPE_CHECKING:` block, and its submodules, when they are first used.

    That block is the only list of exports; type checkers and editors also read it. `from package.other import *` exports the names in the
    block of that package. If a submodule and an exported object have the same name, the name refers to the object.

    Returns:
        The module of each name.
    """
    module = sys.modules[package]
    origins = _origins(Path(module.__file__ or ""))

    class Lazy(ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name in origins:
                value = _object(origins[name], name)
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

        def __reduce__(self) -> tuple[Any, ...]:  # a pickled function may refer to the module
            return importlib.import_module, (package,)

    module.__class__ = Lazy
    return origins


def _object(module: str, name: str) -> Any:
    """Return the object `name` of a module, or the submodule with that name (`from fedloom import tree`)."""
    submodule = f"{module}.{name}"
    if module == __package__ and importlib.util.find_spec(submodule):
        return importlib.import_module(submodule)
    return getattr(importlib.import_module(module), name)


def _origins(file: Path) -> dict[str, str]:
    """Return the names that a package's `if TYPE_CHECKING:` block imports, each with its module."""
    found: dict[str, str] = {}
    for block in ast.parse(file.read_text(encoding="utf-8")).body:
        if not (isinstance(block, ast.If) and isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING"):
            continue
        for statement in block.body:
            assert isinstance(statement, ast.ImportFrom)
            assert statement.module
            for alias in statement.names:
                if alias.name == "*":
                    inside = statement.module.split(".")[1:]
                    found |= _origins(Path(__file__).parent.joinpath(*inside, "__init__.py"))
                else:
                    found[alias.name] = statement.module
    return found


class Registry(Mapping[str, T_co], Generic[T_co]):
    """A read-only table of objects by name. Each object is imported from its origin, `module:name`, when it is looked up."""

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


def classes_in(file: Path) -> list[str]:
    """Return the names of the derived classes in a Python file without running it; return an empty list if the file cannot be read."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return []
    return [node.name for node in tree.body if isinstance(node, ast.ClassDef) and node.bases]
