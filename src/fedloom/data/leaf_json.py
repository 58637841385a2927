"""Read one of LEAF's JSON files user by user, because the numbers in a whole file would occupy about 1 GB as Python objects."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from fedloom.errors import DataError

MOST_BYTES: Final = 4 * 2**30
_BLANK = re.compile(r"[ \t\n\r]*")


def users_of(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield the name and the examples of each user. Raise DataError if the file is malformed or contains wrong numbers of examples."""
    try:
        if file.stat().st_size > MOST_BYTES:
            raise DataError(f"{file} is larger than {MOST_BYTES // 2**30} GiB; divide it into several files")
        text = file.read_text(encoding="utf-8")
        counts, found = dict[str, Any](), dict[str, int]()
        for key, value in _items(text, "user_data"):
            if isinstance(key, tuple):
                found[key[1]] = len(value["y"]) if isinstance(value, dict) and isinstance(value.get("y"), list) else -1
                yield key[1], value
            else:
                counts[key] = value
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{file} cannot be read as LEAF's JSON ({error})") from error
    users, numbers = counts.get("users"), counts.get("num_samples")
    if not isinstance(users, list) or not isinstance(numbers, list) or not found:
        raise DataError(f"{file} must contain 'users', 'num_samples' and 'user_data'")
    if dict(zip(users, numbers, strict=False)) != found or len(users) != len(numbers):
        raise DataError(f"{file}: 'users' and 'num_samples' do not match the examples in 'user_data'; write it again")


def _items(text: str, nested: str) -> Iterator[tuple[Any, Any]]:
    """Yield the keys and values of a JSON object.

    For the object under the key `nested`, yield ((nested, key), value) for each of its entries.
    """
    decoder, at = json.JSONDecoder(), _after(text, 0, "{")
    while True:
        key, at = decoder.raw_decode(text, _skipped(text, at))
        at = _skipped(text, _after(text, at, ":"))
        if key == nested and text[at : at + 1] == "{":
            at = _after(text, at, "{")
            at = _skipped(text, at)
            while text[at : at + 1] != "}":
                name, at = decoder.raw_decode(text, _skipped(text, at))
                value, at = decoder.raw_decode(text, _skipped(text, _after(text, at, ":")))
                yield (nested, str(name)), value
                at = _skipped(text, at)
                at = at if text[at : at + 1] == "}" else _after(text, at, ",")
            at = _after(text, at, "}")
        else:
            value, at = decoder.raw_decode(text, at)
            yield key, value
        at = _skipped(text, at)
        if text[at : at + 1] == "}":
            return
        at = _after(text, at, ",")


def _skipped(text: str, at: int) -> int:
    found = _BLANK.match(text, at)
    return at if found is None else found.end()


def _after(text: str, at: int, mark: str) -> int:
    """Return the position after the next character, which must be `mark`."""
    at = _skipped(text, at)
    if text[at : at + 1] != mark:
        raise json.JSONDecodeError(f"expected '{mark}'", text, at)
    return at + 1
