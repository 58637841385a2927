"""One-line reports of exceptions in a user's method, which name the error, the line in the user's file, client, round and phase."""

from __future__ import annotations

import re
import traceback
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import NamedTuple

from fedloom.errors import FedloomError, is_own_code

REMEDIES: dict[type[BaseException], str] = {
    KeyError: " is missing; a hook must return every key that other hooks read, from init_memory and init_server on",
    FrozenInstanceError: "; a method holds hyper-parameters only, so keep state in memory (client) or in the server's tree",
    TypeError: "; docs/contract.md describes all hooks",
}
"""Remedies for errors that mistakes in a method's hooks often cause."""


class CodeLocation(NamedTuple):
    """A line of code in a traceback."""

    file: str
    line: int
    function: str
    code: str

    def __str__(self) -> str:
        """Return `my.py:12`, relative to the current folder if the file is inside it."""
        file = Path(self.file)
        inside = file.is_relative_to(Path.cwd())
        return f"{file.relative_to(Path.cwd()) if inside else file}:{self.line}"


def one_line(error: BaseException) -> str:
    """Return a line such as `ZeroDivisionError: division by zero (my.py:12, in loss; in phase 'train' ...; client 0, round 1)`."""
    known = isinstance(error, FedloomError)
    what = str(error) if known else f"{type(error).__name__}: {error}{REMEDIES.get(type(error), '')}"
    own = own_place(error)
    places = [own] if own else [] if known else _places(error)[-1:]
    rest = "; ".join([*(f"{place}, in {place.function}" for place in places), *notes(error)])
    return " ".join(f"{what} ({rest})".removesuffix(" ()").split())


def notes(error: BaseException) -> list[str]:
    """Return the engine's notes, the innermost first: the phase, followed by client and round."""
    return [note for note in getattr(error, "__notes__", []) if "\n" not in note]


def own_place(error: BaseException) -> CodeLocation | None:
    """Return the innermost line of code outside fedloom and installed packages."""
    own = [place for place in _places(error) if is_own_code(place.file)]
    return own[-1] if own else None


def _places(error: BaseException) -> list[CodeLocation]:
    """Return the lines of the traceback in this process and in the worker process, whose traceback is a note with several lines."""
    frames = traceback.extract_tb(error.__traceback__)
    here = [CodeLocation(frame.filename, frame.lineno or 0, frame.name, frame.line or "") for frame in frames]
    texts = "\n".join(note for note in getattr(error, "__notes__", []) if "\n" in note)
    found = re.findall(r'^ *File "(.+)", line (\d+), in (\S+)\n *(.*)$', texts, re.MULTILINE)
    return here + [CodeLocation(file, int(line), function, code) for file, line, function, code in found]
