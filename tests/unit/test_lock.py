"""One process at a time writes to a folder; a lock ends with its process."""

import errno
import json
import os
import platform
import signal
import subprocess
import sys
import time

import pytest

from fedloom.errors import RunFolderError
from fedloom.experiment import lock
from fedloom.experiment.lock import FolderLock

HOLD = """
import sys, time
from pathlib import Path
from fedloom.experiment.lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(60)
"""


def held(folder):
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "locked\n"
    return child


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
    with held(tmp_path) as child:
        with pytest.raises(RunFolderError, match=rf"is being written by pid {child.pid} on .*\(since .*\); wait until"):
            FolderLock(tmp_path)
        child.send_signal(signal.SIGKILL)
        child.wait()
    with FolderLock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_forked_process_neither_holds_nor_releases_the_lock(tmp_path):
    first = FolderLock(tmp_path)
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        first.release()
        os.write(writer, b"released")
        time.sleep(60)
        os._exit(0)
    try:
        os.read(reader, 8)
        assert (tmp_path / ".lock").exists()
        with pytest.raises(RunFolderError, match="already being written by this process"):
            FolderLock(tmp_path)
        first.release()
        FolderLock(tmp_path).release()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
        os.close(writer)


def no_locks(handle):
    raise OSError(errno.ENOLCK, "no locks available")


def test_without_locks_a_file_is_the_lock(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(lock, "_lock", no_locks)
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    for folder in (mine, theirs):
        folder.mkdir()
    with FolderLock(mine):
        assert "the file system has no locks" in caplog.text
        assert json.loads((mine / ".lock.exclusive").read_text())["host"] == platform.node()
    assert list(mine.iterdir()) == []
    file = theirs / ".lock.exclusive"
    file.write_text(json.dumps({"pid": 1, "host": "elsewhere", "since": "2026"}))
    with pytest.raises(
        RunFolderError, match=r"written by pid 1 on elsewhere \(since 2026\); if that process no longer"
    ):
        FolderLock(theirs)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    file.write_text(json.dumps({"pid": dead.pid, "host": platform.node(), "since": "2026"}))
    FolderLock(theirs).release()
