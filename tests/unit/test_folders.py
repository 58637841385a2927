"""Folders of mapped files. They are removed with their process, even a killed one, but never if they belong to another user."""

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedloom.engines.shared_folders import new_folder, remove_stale

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the engine of worker processes needs Linux")

OWNER = """
import os, sys, time
from pathlib import Path
from fedloom.engines.shared_folders import new_folder
class Owner: pass
owner = Owner()
print(new_folder(owner, Path(sys.argv[1])), flush=True)
if sys.argv[2] == "forks" and os.fork() == 0:
    print(os.getpid(), flush=True)
    time.sleep(60)
time.sleep(60)
"""


class Owner:
    """An object that owns a folder."""


def start(parent, kind="alone"):
    child = subprocess.Popen([sys.executable, "-c", OWNER, str(parent), kind], stdout=subprocess.PIPE, text=True)
    return child, Path(child.stdout.readline().strip())


def killed(child):
    child.kill()
    child.wait()
    child.stdout.close()


def test_a_folder_goes_with_its_owner(tmp_path):
    owner = Owner()
    folder = new_folder(owner, tmp_path)
    assert folder.is_dir()
    remove_stale(tmp_path)
    assert folder.is_dir()
    del owner
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_folders_of_killed_processes_are_removed_at_the_next_start(tmp_path):
    child, left = start(tmp_path)
    (left / "client-0").write_bytes(b"rows")
    remove_stale(tmp_path)
    assert left.is_dir()  # its owner is alive
    killed(child)
    assert left.is_dir()
    owner = Owner()
    folder = new_folder(owner, tmp_path)
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_that_a_worker_holds_stays(tmp_path):
    child, left = start(tmp_path, "forks")
    worker = int(child.stdout.readline())
    killed(child)
    remove_stale(tmp_path)
    assert left.is_dir()
    os.kill(worker, signal.SIGKILL)
    patience = time.monotonic() + 20
    while left.is_dir() and time.monotonic() < patience:  # the kernel releases the lock a moment later
        remove_stale(tmp_path)
    assert not left.is_dir()


def test_other_folders_stay(tmp_path):
    child, dead = start(tmp_path)
    killed(child)
    number = dead.name.split("-")[1]
    elsewhere = tmp_path / "elsewhere"
    others = [elsewhere, tmp_path / "fedloom-notes-1", tmp_path / f"other-{number}-x", tmp_path / f"fedloom-{10**30}-x"]
    for folder in others:
        folder.mkdir()
    link = tmp_path / f"fedloom-{number}-link"
    link.symlink_to(elsewhere)
    file = tmp_path / f"fedloom-{number}-file"
    file.touch()
    remove_stale(tmp_path)
    assert set(tmp_path.iterdir()) == {*others, link, file}


def test_a_run_that_is_killed_with_its_workers_leaves_nothing_behind_for_long(tmp_path):
    words = (
        "import sys, fedloom; engine = {'name': 'processes', 'workers': 2}\n"
        "fedloom.run(clients=2, rounds=500, model='mlp', progress=False, out=sys.argv[1], engine=engine)"
    )
    child = subprocess.Popen([sys.executable, "-c", words, str(tmp_path / "run")], start_new_session=True)

    def left():
        places = (Path("/dev/shm"), Path("/tmp"))
        return [folder for place in places for folder in place.glob(f"fedloom-{child.pid}-*")]

    patience = time.monotonic() + 60
    while not (tmp_path / "run" / "metrics.jsonl").is_file() and time.monotonic() < patience:
        time.sleep(0.01)
    assert len(left()) == 1
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    (folder,) = left()
    patience = time.monotonic() + 20
    while folder.is_dir() and time.monotonic() < patience:
        new_folder(Owner(), folder.parent)
    assert not folder.is_dir()
