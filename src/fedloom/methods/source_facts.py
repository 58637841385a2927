"""Facts about classes and functions, read from their source files without importing them (or torch)."""

from __future__ import annotations

import ast
import builtins
import importlib.util
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal, get_origin

from fedloom import ranges

Definition = ast.ClassDef | ast.FunctionDef
WORDS: Mapping[str, Any] = {
    **{name: getattr(builtins, name) for name in ("bool", "dict", "float", "int", "str", "tuple")},
    **{name: value for name, value in vars(ranges).items() if get_origin(value) is not None or name[0].isupper()},
    "ClassVar": ClassVar,
    "Literal": Literal,
}
"""Names with the same meaning in every file. All other names are looked up in the files."""


@dataclass(kw_only=True)
class ClassFacts:
    """Facts from the source code of a class and its bases."""

    doc: str = ""
    types: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    docs: dict[str, str] = field(default_factory=dict)
    """The string below each field."""
    constants: dict[str, Any] = field(default_factory=dict)
    """The class variables annotated with `ClassVar`. If a value is a call, such as `Paper(...)`, the list of its arguments is stored."""


def class_facts(origin: str) -> ClassFacts:
    """Return facts about a dataclass, `module:name`, and its bases: its fields with their types, defaults and
    docs, and its class variables.
    """
    module, name = _split(origin)
    node, imported = _definition(module, name), _imports(module)
    assert isinstance(node, ast.ClassDef)
    found = ClassFacts()
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id in imported:
            parent = class_facts(imported[base.id])
            found.types |= parent.types
            found.values |= parent.values
            found.docs |= parent.docs
            found.constants |= parent.constants
    found.doc = inspect.cleandoc(ast.get_docstring(node) or "")
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value:
            _add(found, statement, statement.target.id, module)
    found.docs |= field_docs(node)
    return found


def _add(found: ClassFacts, statement: ast.AnnAssign, name: str, module: str) -> None:
    assert statement.value
    if ast.unparse(statement.annotation).startswith("ClassVar"):
        found.constants[name] = _value(statement.value, module)
    else:
        found.types[name] = _value(statement.annotation, module)
        found.values[name] = _value(statement.value, module)


def function_facts(origin: str) -> tuple[str, dict[str, Any]]:
    """Return the docstring of a function, `module:name`, and its keyword-only parameters with their defaults."""
    module, name = _split(origin)
    node = _definition(module, name)
    assert isinstance(node, ast.FunctionDef)
    pairs = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    return docstring(origin), {arg.arg: _value(default, module) for arg, default in pairs if default}


def docstring(origin: str) -> str:
    """Return the docstring of a class or function, `module:name`."""
    return inspect.cleandoc(ast.get_docstring(_definition(*_split(origin))) or "")


def calls(origin: str, method: str) -> Iterator[tuple[list[Any], dict[str, Any]]]:
    """Yield the constant arguments of the calls `x.method(...)` in a function, and in the functions of the command line that it calls."""
    module, name = _split(origin)
    local = {node.name for node in _body(module) if isinstance(node, ast.FunctionDef)}
    imported = _imports(module)
    for node in ast.walk(_definition(module, name)):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Attribute) and node.func.attr == method:
            words = {k.arg: k.value.value for k in node.keywords if k.arg and isinstance(k.value, ast.Constant)}
            yield [arg.value for arg in node.args if isinstance(arg, ast.Constant)], words
        elif isinstance(node.func, ast.Name) and node.func.id != name:
            called = node.func.id
            if called in local:
                yield from calls(f"{module}:{called}", method)
            elif imported.get(called, "").startswith("fedloom.cli."):
                yield from calls(imported[called], method)


def field_docs(node: ast.ClassDef) -> dict[str, str]:
    """Return the string below each annotated field of a class."""
    return dict(_field_docs(node.body))


def _field_docs(body: Sequence[ast.stmt]) -> Iterator[tuple[str, str]]:
    for statement, text in zip(body, body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            if (
                isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
                and isinstance(text.value.value, str)
            ):
                yield statement.target.id, " ".join(text.value.value.split())


def _split(origin: str) -> tuple[str, str]:
    module, _, name = origin.partition(":")
    return module, name


def _file(module: str) -> Path:
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    assert spec
    assert spec.origin
    folder = Path(spec.origin).parent
    return folder.joinpath(*rest).with_suffix(".py") if rest else folder / "__init__.py"


@cache
def _body(module: str) -> list[ast.stmt]:
    return ast.parse(_file(module).read_text(encoding="utf-8")).body


def _definition(module: str, name: str) -> Definition:
    return next(node for node in _body(module) if isinstance(node, Definition) and node.name == name)


@cache
def _imports(module: str) -> dict[str, str]:
    """Return the origins of the names that a module imports at its top level, as `{name: "module:name"}`."""
    return {
        alias.asname or alias.name: f"{node.module}:{alias.name}"
        for node in _body(module)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


class _Names(dict[str, Any]):
    """The values of a module's top-level names, as keys and as attributes. A class is represented by its class variables."""

    def __init__(self, module: str) -> None:
        super().__init__(WORDS)
        self._module = module

    def __missing__(self, name: str) -> Any:
        if name in (imported := _imports(self._module)):
            module, original = _split(imported[name])
            is_module = _file(f"{module}.{original}").is_file()
            return _Names(f"{module}.{original}") if is_module else _Names(module)[original]
        for node in _body(self._module):
            if isinstance(node, ast.ClassDef) and node.name == name:
                return SimpleNamespace(**class_facts(f"{self._module}:{name}").constants)
            if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
                return _value(node.value, self._module)
        raise KeyError(name)

    def __getattr__(self, name: str) -> Any:
        return self[name]


def _value(node: ast.expr, module: str) -> Any:
    """Return the value of an expression in a module's class body. A call is represented by its arguments."""
    if isinstance(node, ast.Call):
        return [_value(argument, module) for argument in node.args]
    code = compile(ast.Expression(node), f"<{module}>", "eval")
    return eval(code, {"__builtins__": {}}, _Names(module))
