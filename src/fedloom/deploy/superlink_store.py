"""The database of the SuperLink, which stores messages until they are fetched: its location, and the removal of messages from it.

SQLite keeps deleted messages in its write-ahead log until the log is truncated, and the file itself remains after the SuperLink ends. The
database is therefore in memory if the system has a runtime folder, its log is truncated regularly, and it is deleted when the server
stops.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

RUNTIME = ("RUNTIME_DIRECTORY", "XDG_RUNTIME_DIR")  # set by systemd for a service and for a user's session
NAME = "superlink.db"
TRUNCATE_S = 60.0  # interval between two truncations of the log


def database(server: Path, *, keep: bool = False, environment: Mapping[str, str] = os.environ) -> Path:
    """Return the path of the database of the SuperLink whose folder is `server`.

    It is in the system's runtime folder if there is one and `keep` is not set, and otherwise in `server`. A subfolder of the runtime
    folder is created.
    """
    bases = [environment.get(name, "").partition(":")[0] for name in RUNTIME]
    base = next((Path(base) for base in bases if base and os.access(base, os.W_OK)), None)
    if keep or base is None:
        return (server / NAME).resolve()
    folder = base / f"fedloom-{hashlib.blake2b(str(server.resolve()).encode(), digest_size=6).hexdigest()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user")
    return folder / NAME


def truncate(file: Path) -> None:
    """Move the write-ahead log to the database, and truncate the log. Do nothing if the SuperLink is currently using the database."""
    if not file.is_file():
        return
    try:
        with closing(sqlite3.connect(file, timeout=1.0)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    except sqlite3.OperationalError:  # the database is locked; a later truncation follows
        return


def delete(file: Path) -> None:
    """Delete the database and its logs."""
    for suffix in ("", "-wal", "-shm"):
        file.with_name(f"{file.name}{suffix}").unlink(missing_ok=True)
