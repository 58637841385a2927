"""Methods by name, objects from users' files, and descriptions of method classes."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.metadata
import importlib.util
import inspect
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, get_type_hints

from fedloom.errors import ConfigError, normal, suggest
from fedloom.lazy import Registry, classes_in
from fedloom.methods import CLASSES, source_facts
from fedloom.ranges import type_words

if TYPE_CHECKING:
    from fedloom.method import Method

METHODS: Registry[type[Method]] = Registry({name: f"fedloom.methods.{name}:{cls}" for name, cls in CLASSES.items()})
"""The registered methods. Each method is imported when it is looked up."""


ELSEWHERE = (
    "APFL", "CCVR", "ClusteredSampling", "FD", "FedAdagrad", "FedAdam", "FedALA", "FedAMP", "FedAS",
    "FedAvgM", "FedBuff", "FedCP", "FedCross", "FedDBE", "FedDyn", "FedExP", "FedFomo", "FedGen", "FedGH",
    "FedKD", "FedKTL", "FedLC", "FedMut", "FedNova", "FedNTD", "FedOpt", "FedPAC", "FedPHP", "FedRoD", "FedTGP",
    "FedType", "FedYogi", "FML", "GPFL", "IFCA", "LG-FedAvg", "MOON", "Per-FedAvg", "pFedMe",
)  # fmt: skip
"""Methods from other papers, so that a request for one is not taken for a misspelt name. Names of registered methods have no effect."""


def load_object(where: str, key: str) -> Any:
    """Return the object `NAME` of a user's Python file, from `path/to/file.py:NAME`.

    Raises:
        ConfigError: there is no such file or name, or the file cannot be imported; the message names the setting `key`.
    """
    path, _, name = where.rpartition(":")
    module = load_module(Path(path), f"{key}={where}")
    if not hasattr(module, name):
        raise ConfigError(f"{key}={where}: {path} defines no '{name}'{suggest(name, vars(module))}")
    return getattr(module, name)


def load_module(file: Path, setting: str) -> ModuleType:
    """Import a user's Python file; error messages begin with `setting`.

    Raises:
        ConfigError: there is no such file, or it cannot be imported.
    """
    if not file.is_file():
        raise ConfigError(f"{setting}: there is no file {file}")
    module_name = f"fedloom_user_{file.stem}"
    spec = importlib.util.spec_from_file_location(module_name, file.resolve())
    if spec is None or spec.loader is None:
        raise ConfigError(f"{setting}: {file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look up their module here
    try:
        spec.loader.exec_module(module)
    except SystemExit as leaving:  # uncaught, it would end the program
        raise ConfigError(
            f'{setting}: {file} exits Python when it is imported; put the code that does so under `if __name__ == "__main__":`'
        ) from leaving
    except Exception as error:
        raise ConfigError(f"{setting}: {file} cannot be imported: {type(error).__name__}: {error}") from error
    return module


def method_class(name: str) -> type[Method]:
    """Return a method's class.

    `name` is the name of a registered or installed method, `path/to/file.py:Class`, `package.module:Class`, or two of these as
    `server+client`.
    """
    from fedloom.method import Method

    server, client = halves(name)
    if client:
        from fedloom.methods.composition import composed

        return composed(method_class(server), method_class(client))
    if name in METHODS:
        return METHODS[name]
    where = installed_methods().get(name, name)
    if ":" not in where:
        raise ConfigError(no_such_method(name))
    path = where.rpartition(":")[0]
    found = load_object(where, "method") if "/" in path or path.endswith(".py") else _imported(where, f"method={name}")
    if not (inspect.isclass(found) and issubclass(found, Method) and dataclasses.is_dataclass(found)):
        raise ConfigError(f"method={name}: must be a dataclass derived from fedloom.Method")
    return found


def halves(name: str) -> tuple[str, str]:
    """Split `server+client`. The second half is empty if `name` names one method. The path of a file may contain `+`."""
    for place in (i for i, letter in enumerate(name) if letter == "+"):
        server, client = name[:place], name[place + 1 :]
        if ":" in server or "/" not in server:
            return server, client
    return name, ""


@functools.cache
def installed_methods() -> dict[str, str]:
    """Return the methods that installed packages provide (entry points `fedloom.methods`), by name, as `package.module:Class`."""
    return {entry.name: entry.value for entry in importlib.metadata.entry_points(group="fedloom.methods")}


def _imported(where: str, setting: str) -> Any:
    """Return the object of an installed module, from `package.module:NAME`."""
    path, _, name = where.rpartition(":")
    try:
        module = importlib.import_module(path)
    except Exception as error:
        raise ConfigError(
            f"{setting}: the module {path} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if not hasattr(module, name):
        raise ConfigError(f"{setting}: {path} defines no '{name}'{suggest(name, vars(module))}")
    return getattr(module, name)


def no_such_method(name: str, others: Iterable[str] = ()) -> str:
    """Return a message that a method's name is unknown, with suggestions. `others` are the names of a comparison's variants."""
    own = "write your own method as my.py:Mine"
    known = {normal(each) for each in METHODS}
    file = Path(name if name.endswith(".py") else f"{name}.py")
    found = [] if normal(name) in known else classes_in(file)
    if found or name.endswith(".py"):
        return f"method={name}: must name a class of the file, as method={file}:{found[0] if found else 'Mine'}"
    if normal(name) in {normal(each) for each in ELSEWHERE} - known:
        return f"method={name}: not available; available: {', '.join(METHODS)}; or {own}"
    variants = list(others)
    what = "method or variant" if variants else "method"
    return f"method={name}: there is no such {what}{suggest(name, [*METHODS, *variants])}; {own}"


def method_name(method: type[Method]) -> str:
    """Return the registered name of a method's class, or else the class's own name."""
    return next((name for name, known in METHODS.items() if known is method), method.__name__)


def describe_method(name: str, method: type[Method]) -> dict[str, Any]:
    """Return a description of a method: its paper, what it sends, and its hyper-parameters with their defaults and meanings."""
    docs, types = _field_docs(method), get_type_hints(method, include_extras=True)
    paper = getattr(method, "paper", None)
    return {
        "name": name,
        "summary": (inspect.getdoc(method) or "").splitlines()[0] if method.__doc__ else "",
        "paper": paper.title if paper else "",
        "authors": paper.authors if paper else "",
        "venue": paper.venue if paper else "",
        "url": paper.url if paper else "",
        "sent": [*method.shared, *method.also_travels],
        "needs": list(method.needs),
        "hyper_parameters": {
            field.name: {
                "default": field.default,
                "type": type_words(types[field.name]),
                "doc": docs.get(field.name, ""),
            }
            for field in dataclasses.fields(method)
        },
        "description": inspect.getdoc(method) or "",
    }


def describe_registered(name: str) -> dict[str, Any]:
    """Return the same description of a registered method as `describe_method`, without importing the method."""
    facts = source_facts.class_facts(METHODS.origins[name])
    title, authors, venue, *url = facts.constants["paper"]
    return {
        "name": name,
        "summary": facts.doc.splitlines()[0],
        "paper": title,
        "authors": authors,
        "venue": venue,
        "url": url[0] if url else "",
        "sent": [*facts.constants["shared"], *facts.constants["also_travels"]],
        "needs": list(facts.constants["needs"]),
        "hyper_parameters": {
            key: {"default": default, "type": type_words(facts.types[key]), "doc": facts.docs.get(key, "")}
            for key, default in facts.values.items()
        },
        "description": facts.doc,
    }


def _field_docs(method: type) -> dict[str, str]:
    """Return the string below each field, from the source of the class and its bases."""
    docs: dict[str, str] = {}
    for cls in reversed(method.__mro__[:-1]):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
        except (OSError, TypeError):  # a class without source code (defined in an interactive session)
            continue
        docs |= source_facts.field_docs(tree.body[0])  # type: ignore[arg-type]
    return docs
