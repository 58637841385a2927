"""All exceptions that fedloom raises deliberately.

::

    FedloomError
    ├── UsageError          the caller can fix it: one clear line, exit code 2
    │   ├── ConfigError     an unknown key, a wrong type, an impossible combination
    │   ├── DataError       data that are missing, malformed, or too few
    │   ├── RunFolderError  a run folder that is missing, would be overwritten, or cannot be resumed
    │   ├── DivergedError   the server's state is no longer finite
    │   └── NoValidUplinkError   no uplink in several consecutive rounds could be aggregated; exit code 4
    ├── MethodError         a method broke the contract (the message names the rule and the place)
    ├── WireError           bytes that are not a valid message
    └── WorkerError         a worker process exited before it finished its work
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

HOME = str(Path(__file__).parent)


class FedloomError(Exception):
    """Base class of all errors that fedloom raises."""


class UsageError(FedloomError):
    """An error that the caller can fix. The command line prints it in one line and exits with `exit_code`."""

    exit_code: ClassVar[int] = 2


class ConfigError(UsageError):
    """An unknown key, a wrong type or value, or settings that contradict each other."""


class DataError(UsageError):
    """Data that are missing, malformed, or too few for the request."""


class RunFolderError(UsageError):
    """A run folder that is missing, that would be overwritten, or that cannot be resumed."""


class DivergedError(UsageError):
    """The server's state is no longer finite. None of it was written to disk."""


class NoValidUplinkError(UsageError):
    """No uplink in several consecutive rounds could be aggregated. The last checkpoint is unchanged."""

    exit_code: ClassVar[int] = 4


class MethodError(FedloomError):
    """A method that broke a rule of the contract."""


class WireError(FedloomError):
    """Bytes that cannot be read as a message, or a message that differs from the expected one."""


class WorkerError(FedloomError):
    """A worker process that exited before it finished its work and could not be replaced."""


def is_own_code(file: str) -> bool:
    """Return whether a source file is the user's own, that is, part of neither fedloom nor an installed package."""
    return not (file.startswith((HOME, sys.prefix, sys.base_prefix, "<")) or "site-packages" in file)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


MOST_NEAR = 5  # maximum number of suggestions


def suggest(word: str, known: Iterable[str]) -> str:
    """Return `" (did you mean 'x'?)"` for the nearest known words, or the list of known words if none is similar."""
    names = sorted(known)
    near = _near(normal(word), {name: normal(name) for name in names})
    return did_you_mean(near) or f"; known: {', '.join(names)}"


def did_you_mean(names: Sequence[str]) -> str:
    """Return `" (did you mean 'x' or 'y'?)"`, or "" if there are no names."""
    *first, last = [f"'{name}'" for name in names] or [""]
    return f" (did you mean {', '.join(first)}{' or ' if first else ''}{last}?)" if names else ""


def normal(word: str) -> str:
    """Return a word in lower case and without `-`, `_` and spaces, which users often confuse."""
    return re.sub(r"[-_\s]", "", word.lower())


def _near(word: str, known: Mapping[str, str]) -> list[str]:
    """Return the names that equal `word`, begin with it, contain it or resemble it. `known` maps each name to its normal form."""
    short = len(word) < 3  # too many names contain such a word
    for fits in (word.__eq__, lambda other: other.startswith(word), lambda other: word in other):
        near = [name for name, other in known.items() if fits(other)]
        if 0 < len(near) <= MOST_NEAR:
            return near
        if short:
            break
    close = difflib.get_close_matches(word, list(known.values()), n=1, cutoff=0.6)
    return [name for name, other in known.items() if other in close][:1]
