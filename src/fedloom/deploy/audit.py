"""The log of nodes that were admitted to a federation, revoked or given a new key: `server/audit.jsonl`, with one JSON object per line.

Each line contains the hash of the previous line, so a line that is changed, removed or inserted later breaks the chain. If lines are
removed from the end, the log itself does not show this, but a copy of the digest of the last line, kept elsewhere, does.
"""

from __future__ import annotations

import getpass
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any

from fedloom.errors import ConfigError


class AuditLog:
    """The log in a file. The file is created with its first line."""

    def __init__(self, file: Path) -> None:
        self._file = file

    @classmethod
    def of(cls, federation: Path) -> AuditLog:
        """Return the log of the federation in a folder."""
        return cls(federation / "server" / "audit.jsonl")

    def read(self) -> list[Mapping[str, Any]]:
        """Return the lines. Raise ConfigError if a line does not continue the previous line."""
        return self._read()[0]

    def digest(self) -> str:
        """Return the hash of the last line, or "" if there is none. Raise ConfigError in the same cases as `read`."""
        return self._read()[1]

    def append(self, action: str, node: str, fingerprint: str, **more: Any) -> None:
        """Add a line. `more` contains additional values, such as the node's clients."""
        entry = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "by": f"{getpass.getuser()} ({os.getuid() if hasattr(os, 'getuid') else '-'})",
            "action": action,
            "node": node,
            "fingerprint": fingerprint,
            **more,
            "previous": self.digest(),
        }
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        with os.fdopen(os.open(self._file, flags, 0o600), "ab") as out:
            out.write(json.dumps(entry).encode() + b"\n")
            out.flush()
            os.fsync(out.fileno())

    def _read(self) -> tuple[list[Mapping[str, Any]], str]:
        lines = self._file.read_bytes().splitlines(keepends=True) if self._file.is_file() else []
        entries, last = list[Mapping[str, Any]](), ""
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                if not line.endswith(b"\n") or entry["previous"] != last:
                    raise ValueError
            except (ValueError, KeyError, TypeError):
                raise ConfigError(
                    f"{self._file}: line {number} does not follow from the line before it, so the log was changed or damaged; "
                    "find out why, then move the file away to start a new log"
                ) from None
            entries.append(entry)
            last = blake2b(line, digest_size=16).hexdigest()
        return entries, last
