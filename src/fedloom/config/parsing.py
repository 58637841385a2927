"""Nested tables of values from TOML files and `key=value` arguments, before validation."""

from __future__ import annotations

import datetime
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fedloom.config.settings import Section, Settings, Values
from fedloom.errors import ConfigError

SECTIONS = tuple(
    name
    for name, field in Settings.model_fields.items()
    if isinstance(field.default, Section) and "name" in type(field.default).model_fields
)
LASTING: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "data": (
            "path",
            "owner",
            "label",
            "columns",
            "drop",
            "split",
            "missing",
            "missing_values",
            "decimal",
            "encoding",
            "preprocess",
        ),
        "partition": ("path", "column"),
        "schedule": ("at", "every", "factor", "floor"),
    }
)
"""Tables whose keys stay valid when another name is chosen, except for the keys listed here."""


def _texts(model: type[Section], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        if isinstance(field.default, Section):
            yield from _texts(type(field.default), f"{prefix}{name}.")
        elif field.annotation in (str | None, Path | None):
            yield prefix + name


TEXTS = tuple(_texts(Settings))
"""Keys whose values are names or paths. Their values stay text even if they look like numbers or dates: `label=7`, `out=2026-01-31`."""


def parse_value(text: str, key: str = "") -> Any:
    """Parse a value from the command line as TOML (a number, boolean, list or quoted text), or as plain text if it is not valid TOML.

    `key` is the key of the value. The values of the keys in `TEXTS` stay text.
    """
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    is_text = key in TEXTS or isinstance(value, datetime.date | datetime.time)
    return text if is_text and not isinstance(value, str) else value


def set_dotted(values: Values, key: str, value: Any) -> None:
    """Set a dotted key in nested tables. `data=digits` is short for `data.name=digits`.

    Choosing another name removes the keys that belong to the previous choice: all keys or, for tables in `LASTING`, those listed there.
    `models` replaces `model`.
    """
    *tables, last = key.split(".")
    node = values
    for table in tables:
        child = node.get(table, {})
        node[table] = child if isinstance(child, dict) else {"name": child}
        node = node[table]
    if not tables and last in SECTIONS and not isinstance(value, Mapping):
        old = node.get(last)
        old = old if isinstance(old, dict) else {}
        other = old.get("name", value) != value
        node[last] = {k: v for k, v in old.items() if not other or k not in LASTING.get(last, old)} | {"name": value}
    else:
        node[last] = value
    if key == "models" and value:
        values.pop("model", None)


def read_toml(path: str | Path) -> Values:
    """Read the tables of a TOML file. `data = "digits"` becomes a table with that name."""
    file = Path(path)
    try:
        loaded = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"config file {file} does not exist") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        hint = (
            "; if the file has a table of that name, set `name = ...` inside the table" if "twice" in str(error) else ""
        )
        raise ConfigError(f"{file} cannot be read as a TOML file: {reason}{hint}") from None
    values: Values = {}
    for key, value in loaded.items():
        set_dotted(values, key, value)
    return values


def from_words(words: Iterable[str], values: Values | None = None) -> Values:
    """Apply `key=value` arguments to `values` and return them."""
    values = {} if values is None else values
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"'{word}': expected key=value, such as rounds=20")
        set_dotted(values, key, parse_value(text, key))
    return values
