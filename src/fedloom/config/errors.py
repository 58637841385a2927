"""Error messages for settings. Each of pydantic's reasons is rewritten as one line."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from fedloom.config.hints import as_number, near_keys
from fedloom.errors import suggest
from fedloom.methods.registry import METHODS
from fedloom.ranges import LIMITS

_WORDS = {
    "bool": "must be true or false",
    "dict": "is a table; set its keys individually, such as {key}.KEY=VALUE",
    "float": "must be a number",
    "int": "must be an integer",
    "is": "must be an integer",
    "model": "is a table; set its keys individually, such as {key}.KEY=VALUE",
    "path": "must be a path",
    "string": "must be text",
    "tuple": "must be a list",
}


def explain(error: ValidationError, prefix: str, root: Any) -> str:
    """Return one line that names the key, the value and the allowed values.

    Args:
        prefix: prefix of every key, such as `method.`.
        root: the model or dataclass that was validated.
    """
    first = error.errors()[0]
    where = [
        str(part)
        for part in first["loc"]
        if not (isinstance(part, int) or part in ("float", "str") or part.startswith("function-"))
    ]
    key = prefix + ".".join(where)
    if key in METHODS:
        return (
            f"[{key}]: tables named after a method work only with `fedloom compare`; use [method] or method.KEY=VALUE"
        )
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown key '{key}'{near_keys(key, _known(root, where[:-1]))}"
    message = _plainly(first)
    if not where:  # a check of several keys; its message names them
        return (
            prefix + message if re.match(r"[\w.]+=", message) else f"{prefix.rstrip('.')}: {message}".removeprefix(": ")
        )
    return f"{key.removesuffix('.name')}={_shown(first['input'])}: {message}{as_number(first['input'])}"


def _plainly(error: ErrorDetails) -> str:
    """Return pydantic's reason in fedloom's own words."""
    kind, context = error["type"], error.get("ctx", {})
    for limit, (_, words, _) in LIMITS.items():
        if limit in context:
            return f"must be {words} {context[limit]:g}"
    if kind == "literal_error":
        known = [word.strip("'") for word in re.split(", | or ", context["expected"])]
        return f"must be one of {', '.join(known)}{_nearest(str(error['input']), known)}"
    if kind == "finite_number":
        return "must be a finite number"
    first = kind.partition("_")[0]
    if first in _WORDS:
        return _WORDS[first].format(key=".".join(str(part) for part in error["loc"]))
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return message[0].lower() + message[1:] if message[:2].istitle() else message


def _nearest(word: str, known: list[str]) -> str:
    hint = suggest(word, known)
    return hint if "did you mean" in hint else ""


def _shown(value: Any) -> str:
    """Return a value as it is written in a file or on the command line."""
    if isinstance(value, bool | list | tuple | dict):
        return json.dumps(value, default=str)
    return str(value)


def _known(root: Any, path: list[str]) -> list[str]:
    """Return the keys of the table at `path`."""
    for part in path:
        root = root.model_fields[part].annotation
    return list(root.model_fields) if hasattr(root, "model_fields") else [f.name for f in dataclasses.fields(root)]
