"""Every setting with its type, default and meaning, for `--help`; all of it read off `fedloom.config`."""

from __future__ import annotations

import textwrap
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from fedloom.config import Named, Section, Settings

PLAIN = {"int": "whole number", "float": "number", "bool": "true|false", "str": "text", "Path": "path"}
LIMITS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


class Key(NamedTuple):
    """One setting."""

    name: str
    type: str
    default: str
    meaning: str


def keys(section: type[Section] = Settings, prefix: str = "") -> Iterator[Key]:
    """The settings in the order of the file, those of tables by their dotted names."""
    for name, field in section.model_fields.items():
        if isinstance(field.default, Named):
            yield Key(prefix + name, "name", field.default.name, field.description or "")
        elif isinstance(field.default, Section):
            yield from keys(type(field.default), f"{prefix}{name}.")
        else:
            key = (prefix + name).removesuffix(".name")
            yield Key(key, type_words(field.annotation, field), default_words(field.default), field.description or "")


def type_words(annotation: Any, field: FieldInfo | None = None) -> str:
    """A type in words: `whole number ≥ 1`, `half|standard|none`."""
    limits = list(field.metadata) if field else []
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *notes = get_args(annotation)
        limits += [limit for note in notes for limit in (note.metadata if isinstance(note, FieldInfo) else [note])]
        return " ".join([type_words(inner), *_limits(limits)])
    if origin is Literal:
        return "|".join(map(str, get_args(annotation)))
    if origin in (Union, types.UnionType):
        return " or ".join(type_words(part) for part in get_args(annotation) if part is not type(None))
    if origin is tuple:
        return f"list of {type_words(get_args(annotation)[0])}"
    return " ".join([PLAIN.get(getattr(annotation, "__name__", ""), str(annotation)), *_limits(limits)])


def _limits(notes: list[Any]) -> list[str]:
    found = [f"{sign} {getattr(note, name)}" for note in notes for name, sign in LIMITS.items() if hasattr(note, name)]
    return [", ".join(found)] if found else []


def default_words(value: Any) -> str:
    """A default as one would type it; "" where there is none."""
    if value is None or value == ():
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def key_help(skip: tuple[str, ...] = ()) -> str:
    """The settings as text for `--help`."""
    lines = ["keys (on the command line key=value; in a config file the part before the dot is a table):"]
    for key in keys():
        if key.name in skip:
            continue
        default = f" [{key.default}]" if key.default else ""
        lines.append(f"  {key.name}={default}  {key.type}")
        lines.append(textwrap.fill(key.meaning, 100, initial_indent="      ", subsequent_indent="      "))
    return "\n".join(lines)
