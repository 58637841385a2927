"""Every exception that fedloom raises on purpose.

::

    FedloomError
    ├── UsageError          the caller can mend it: one clear line, exit code 2
    │   ├── ConfigError     an unknown key, a wrong type, an impossible combination
    │   ├── DataError       data that are missing, malformed, or too few for the plan
    │   ├── RunFolderError  a run folder that is missing, in the way, or not resumable
    │   └── DivergedError   the server's numbers are not finite any more
    ├── MethodError         a method broke the contract (says which rule, and where)
    ├── WireError           bytes that are not a valid message
    └── WorkerError         a worker process ended before its work was done
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable
from pathlib import Path

HOME = str(Path(__file__).parent)


class FedloomError(Exception):
    """Base of all errors raised by fedloom."""


class UsageError(FedloomError):
    """Something that the caller can mend. The command line prints it in one line and exits with code 2."""


class ConfigError(UsageError):
    """An unknown key, a wrong type or value, or settings that contradict each other."""


class DataError(UsageError):
    """Data that are missing, malformed, or too few for what was asked."""


class RunFolderError(UsageError):
    """A run folder that is missing, that would be overwritten, or that cannot be resumed."""


class DivergedError(UsageError):
    """The server's state is not finite any more; nothing of it was written."""


class MethodError(FedloomError):
    """A method broke a rule of the contract."""


class WireError(FedloomError):
    """Bytes that cannot be read as a message, or a message that is not what was expected."""


class WorkerError(FedloomError):
    """A worker process ended before its work was done, and nobody can take its place."""


def is_own_code(file: str) -> bool:
    """Whether a source file is somebody's own: neither fedloom's nor an installed package's."""
    return not (file.startswith((HOME, sys.prefix, sys.base_prefix, "<")) or "site-packages" in file)


def suggest(word: str, known: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the nearest known word, or the list of known words when none is near."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f" (did you mean '{near[0]}'?)" if near else f"; known: {', '.join(names)}"
