"""Locks of folders to which a run or a comparison is being written. Readers do not need a lock.

The operating system releases a lock when its process exits for any reason. Forked processes do not inherit the lock, so a worker that
outlives its experiment does not keep the folder locked.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import platform
import sys
import weakref
from datetime import UTC, datetime
from pathlib import Path

from fedloom.errors import RunFolderError

log = logging.getLogger(__name__)

LOCK = ".lock"
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # errors of file systems without locks
_HELD: dict[Path, int] = {}  # files locked by this process; closing a second handle would release the lock


class FolderLock:
    """The right to write to a folder. It ends with `release`, with the deletion of this object, or with the process."""

    def __init__(self, folder: Path) -> None:
        """Lock the folder.

        Raises:
            RunFolderError: another process, or another object in this process, is writing to the folder.
        """
        self._file = (folder / LOCK).resolve()
        if _HELD.get(self._file) == os.getpid():
            raise RunFolderError(f"{folder} is already being written by this process (pid {os.getpid()})")
        handle = _acquire(self._file, folder)
        _HELD[self._file] = os.getpid()  # forked workers inherit this table, but not the locks
        self.release = weakref.finalize(self, _release, self._file, handle, os.getpid())

    def __enter__(self) -> FolderLock:
        """Return the lock. It is released at the end of the context."""
        return self

    def __exit__(self, *_: object) -> None:
        """Release the lock."""
        self.release()


def _acquire(file: Path, folder: Path) -> int | None:
    """Return the locked handle of the file. Return None if the file system has no locks; a second file is then the lock."""
    while True:
        try:
            handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise RunFolderError(f"{folder} cannot be written: {error.strerror}") from None
        try:
            _lock(handle)
        except OSError as error:
            os.close(handle)
            if error.errno in WITHOUT_LOCKS:
                _create(file.with_name(f"{LOCK}.exclusive"), folder)
                return None
            raise RunFolderError(f"{folder}: {_busy(file)}; wait until it ends, or stop it") from None
        if _is_same(handle, file):
            os.truncate(handle, 0)
            os.write(handle, _owner())
            return handle
        os.close(handle)  # the previous owner has removed the file in the meantime


def _lock(handle: int) -> None:
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_same(handle: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), file.stat())
    except FileNotFoundError:
        return False


def _create(file: Path, folder: Path) -> None:
    """Lock by creating a file. Replace a file left behind by a process of this machine that no longer exists."""
    log.warning("%s: the file system has no locks; %s marks the folder as being written", folder, file.name)
    for _ in range(2):
        try:
            handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            if not _is_stale(file):
                break
            file.unlink(missing_ok=True)
        else:
            os.write(handle, _owner())
            os.close(handle)
            return
    raise RunFolderError(f"{folder}: {_busy(file)}; if that process no longer exists, delete {file}")


def _release(file: Path, handle: int | None, pid: int) -> None:
    if os.getpid() != pid:  # a forked process
        return
    _HELD.pop(file, None)
    if handle is None:
        file.with_name(f"{LOCK}.exclusive").unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # Windows does not remove an open file
        file.unlink(missing_ok=True)
    if handle is not None:
        os.close(handle)


def _owner() -> bytes:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return json.dumps({"pid": os.getpid(), "host": platform.node(), "since": now}).encode()


def _read(file: Path) -> dict[str, object]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _busy(file: Path) -> str:
    found = _read(file)
    if not found:
        return "is being written by another process"
    return f"is being written by pid {found.get('pid')} on {found.get('host')} (since {found.get('since')})"


def _is_stale(file: Path) -> bool:
    found = _read(file)
    if found.get("host") != platform.node() or not isinstance(pid := found.get("pid"), int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
