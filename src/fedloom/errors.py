"""Every exception that fedloom raises on purpose.

::

    FedloomError
    ├── UsageError          the caller can mend it: one clear line, exit code 2
    │   ├── ConfigError     an unknown key, a wrong type, an impossible combination
    │   ├── DataError       data that are missing, malformed, or too few for the plan
    │   ├── RunFolderError  a run folder that is missing, in the way, or not resumable
    │   └── DivergedError   the server's numbers are not finite any more
    ├── MethodError         a method broke the contract (says which rule, and where)
    └── WireError           bytes that are not a valid message
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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


def suggest(word: str, known: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the nearest known word, or the list of known words when none is near."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f" (did you mean '{near[0]}'?)" if near else f"; known: {', '.join(names)}"
