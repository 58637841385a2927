"""Processes that are kept running.

Each process is started in a new process group, restarted after increasing pauses, and stopped together with its group.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO

from fedloom.errors import ConfigError

PAUSES_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)  # pauses before restarts; the last one repeats
STEADY_S = 90.0  # after a process has run for this time, the pauses start again from the first
GRACE_S = 10.0  # time between SIGTERM and SIGKILL


OWNER_ONLY = 0o077  # umask for files and folders that only their owner can read
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@contextmanager
def private_files() -> Iterator[None]:
    """Make new files and folders of this process readable only by their owner within the context."""
    before = os.umask(OWNER_ONLY)
    try:
        yield
    finally:
        os.umask(before)


def keep_private(folder: Path) -> str:
    """Make new files of this process private, and close `folder` to other users.

    Return a warning if this is not possible, or "".
    """
    os.umask(OWNER_ONLY)
    try:
        folder.chmod(0o700)
    except OSError as error:
        return f"{folder} cannot be closed to other users ({error.strerror}); make this user its owner"
    return ""


def no_loopback_proxy(environment: Mapping[str, str]) -> dict[str, str]:
    """Return environment variables with which connections to this machine bypass a proxy in the environment."""
    names = [name for key in ("NO_PROXY", "no_proxy") for name in environment.get(key, "").split(",")]
    every = ",".join(dict.fromkeys(name.strip() for name in (*names, *LOOPBACK) if name.strip()))
    return {"NO_PROXY": every, "no_proxy": every}


def flower_environment(home: Path | None = None) -> dict[str, str]:
    """Return the environment for Flower's programs.

    The path includes the folder of this Python. Telemetry, update checks and proxies for this machine's own addresses are off.
    """
    own = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }
    return {**os.environ, **no_loopback_proxy(os.environ), **own} | ({"FLWR_HOME": str(home)} if home else {})


def free_ports(n: int) -> list[int]:
    """Return `n` different free ports on the loopback interface."""
    sockets = [socket.socket() for _ in range(n)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()


def require_free(port: int, hint: str) -> None:
    """Raise ConfigError if a port on the loopback interface is in use."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise ConfigError(f"port {port} is in use; {hint}") from None


def leashed(command: Sequence[str]) -> list[str]:
    """Return `command`, wrapped so that it receives SIGTERM when this process exits (on Linux)."""
    return [*script("leash"), *command]


def module(name: str) -> list[str]:
    """Return the first words of a command that runs a module of this package, without the current folder on its path."""
    return [sys.executable, "-P", "-m", f"fedloom.deploy.{name}"]


def script(name: str) -> list[str]:
    """Return the first words of a command that runs a module of this package by its path, without importing fedloom."""
    return [sys.executable, "-P", str(Path(__file__).with_name(f"{name}.py"))]


def end_group(process: subprocess.Popen[bytes], grace_s: float = GRACE_S) -> None:
    """Stop the leader of a process group, and all other processes in the group."""
    for sign, wait_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(process.pid, sign)
        except (ProcessLookupError, PermissionError):
            break
        try:
            process.wait(wait_s)
        except subprocess.TimeoutExpired:
            continue
    try:
        process.wait(5)
        os.killpg(process.pid, signal.SIGKILL)  # processes that have outlived the leader
    except (ProcessLookupError, PermissionError, subprocess.TimeoutExpired):
        pass


class Service:
    """A program that is kept running and writes its output to a file."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.name, self._command, self._environment, self._log = name, leashed(command), dict(environment), log
        self.process: subprocess.Popen[bytes] | None = None
        self._failures = 0
        self._started = self._next = 0.0

    def start(self) -> None:
        """Start the program in a new process group."""
        out: IO[bytes]
        with private_files():
            self._log.parent.mkdir(parents=True, exist_ok=True)
            out = self._log.open("ab")
        with out:
            self.process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                umask=OWNER_ONLY,
            )
        self._started = time.monotonic()

    def tend(self) -> str | None:
        """Restart the program if it has exited and its pause is over. Return a log line if the program has just exited."""
        if self.process is None:
            if time.monotonic() >= self._next:
                self.start()
            return None
        code = self.process.poll()
        if code is None:
            return None
        end_group(self.process, 0.1)
        now = time.monotonic()
        self._failures = 1 if now - self._started > STEADY_S else self._failures + 1
        pause = PAUSES_S[min(self._failures, len(PAUSES_S)) - 1]
        self.process, self._next = None, now + pause
        return f"{self.name} ended (exit code {code}, see {self._log}); restarting in {pause:g} s"

    def end(self) -> None:
        """Stop the program and its process group."""
        if self.process is not None:
            end_group(self.process)
            self.process = None


@contextmanager
def ended_by_signals() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM, SIGINT and SIGHUP set, so that services can be stopped in the right order."""
    over = threading.Event()

    def finish(number: int, frame: FrameType | None) -> None:
        over.set()

    before = {number: signal.signal(number, finish) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        yield over
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
