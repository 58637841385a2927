"""Folders of memory-mapped files, which are removed together with their owner.

The folders of a killed run are removed at the next start.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import weakref
from pathlib import Path

PREFIX = "fedloom-"
LOCK = "owner"  # locked while the owner, or a process that it forked, is alive


def new_folder(owner: object, parent: Path) -> Path:
    """Remove the folders of dead processes from `parent`, and create a folder that is removed together with `owner`.

    The name of the new folder contains the ID of this process.
    """
    import fcntl  # not available on every system on which this module can be imported

    remove_stale(parent)
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=parent))
    lock = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    weakref.finalize(owner, _release, folder, lock)
    return folder


def remove_stale(parent: Path) -> None:
    """Remove this user's folders in `parent` whose process is dead, unless a worker holds their lock."""
    for folder in parent.glob(f"{PREFIX}*-*"):
        number = folder.name.removeprefix(PREFIX).partition("-")[0]
        if number.isdecimal() and _is_ours(folder) and not _is_alive(int(number)) and not _is_held(folder / LOCK):
            shutil.rmtree(folder, ignore_errors=True)


def _release(folder: Path, lock: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)


def _is_ours(folder: Path) -> bool:
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's process, or not a valid process ID
        return True
    return True


def _is_held(lock: Path) -> bool:
    """Return whether a process holds the lock: a worker, or a process in another container, where it has another ID."""
    import fcntl

    try:
        handle = os.open(lock, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False
