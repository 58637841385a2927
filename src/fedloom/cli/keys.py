"""All settings with their type, default and meaning, read from `fedloom.config.settings` for `--help`."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import NamedTuple

from fedloom.cli.words import default_words
from fedloom.config.settings import Named, Section, Settings
from fedloom.ranges import type_words


class Key(NamedTuple):
    """One setting."""

    name: str
    type: str
    default: str
    meaning: str


def keys(section: type[Section] = Settings, prefix: str = "") -> Iterator[Key]:
    """Yield the settings in the order of the source file. Settings in tables have dotted names."""
    for name, field in section.model_fields.items():
        if isinstance(field.default, Named):
            yield Key(prefix + name, "name", field.default.name, field.description or "")
        elif isinstance(field.default, Section):
            yield from keys(type(field.default), f"{prefix}{name}.")
        else:
            key = (prefix + name).removesuffix(".name")
            yield Key(key, type_words(field.annotation, field), default_words(field.default), field.description or "")


def key_help(skip: tuple[str, ...] = ()) -> str:
    """Return all settings of a run as text for `--help`."""
    about = "keys (key=value on the command line; in a config file, the part before the dot is a table):"
    return "\n".join([about, *(key_text(key) for key in keys() if key.name not in skip)])


def key_text(key: Key) -> str:
    """Return a setting as text for `--help`."""
    default = f" [{key.default}]" if key.default else ""
    meaning = textwrap.fill(key.meaning, 100, initial_indent="      ", subsequent_indent="      ")
    return f"  {key.name}={default}  {key.type}\n{meaning}"
