"""Folders of mapped files that do not outlive their processes for long: what a killed run left behind goes at the next start."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import weakref
from pathlib import Path

PREFIX = "fedloom-"
LOCK = "owner"  # a file that is locked while the owner, or a process that it forked, lives


def new_folder(owner: object, parent: Path) -> Path:
    """A folder in `parent` that goes with `owner`, named for this process; what dead processes left there is removed first."""
    import fcntl  # not on every system that can import this module

    remove_stale(parent)
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=parent))
    lock = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    weakref.finalize(owner, _let_go, folder, lock)
    return folder


def remove_stale(parent: Path) -> None:
    """Remove this user's folders in `parent` whose process is dead and which none of its workers holds either."""
    for folder in parent.glob(f"{PREFIX}*-*"):
        number = folder.name.removeprefix(PREFIX).partition("-")[0]
        if number.isdecimal() and _is_ours(folder) and not _is_alive(int(number)) and not _is_held(folder / LOCK):
            shutil.rmtree(folder, ignore_errors=True)


def _let_go(folder: Path, lock: int) -> None:
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
    except (OSError, OverflowError):  # somebody else's, or no number of a process
        return True
    return True


def _is_held(lock: Path) -> bool:
    """Whether somebody has the lock: a worker, or a process that another container sees under another number."""
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
