"""Processes that are kept running: started in a group of their own, restarted with a growing pause, ended as a whole."""

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

PAUSES_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)  # before a restart; the last one for all that follow
STEADY_S = 90.0  # a process that ran so long starts with the first pause again
GRACE_S = 10.0  # between asking a group to end and ending it


def flower_environment(home: Path | None = None) -> dict[str, str]:
    """The environment for Flower's programs: found beside this Python, and silent (nothing is reported or looked up elsewhere)."""
    own = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }
    return {**os.environ, **own} | ({"FLWR_HOME": str(home)} if home else {})


def free_ports(n: int) -> list[int]:
    """Ports on the loopback that nobody uses now, all different."""
    sockets = [socket.socket() for _ in range(n)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()


def require_free(port: int, hint: str) -> None:
    """Raise ConfigError where somebody uses a port on the loopback."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise ConfigError(f"port {port} is in use; {hint}") from None


def leashed(command: Sequence[str]) -> list[str]:
    """The command, so that it ends when this process does."""
    return [*script("leash"), *command]


def script(name: str) -> list[str]:
    """The start of a command that runs a module of this package by its path, without importing fedloom."""
    return [sys.executable, "-P", str(Path(__file__).with_name(f"{name}.py"))]


def end_group(process: subprocess.Popen[bytes], grace_s: float = GRACE_S) -> None:
    """End a process that leads a group, and all that is left of the group."""
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
        os.killpg(process.pid, signal.SIGKILL)  # whoever outlived the leader
    except (ProcessLookupError, PermissionError, subprocess.TimeoutExpired):
        pass


class Service:
    """One program that is kept running, its output in a file."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.name, self._command, self._environment, self._log = name, leashed(command), dict(environment), log
        self.process: subprocess.Popen[bytes] | None = None
        self._failures = 0
        self._started = self._next = 0.0

    def start(self) -> None:
        """Start the program in a group of its own."""
        self._log.parent.mkdir(parents=True, exist_ok=True)
        out: IO[bytes]
        with self._log.open("ab") as out:
            self.process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started = time.monotonic()

    def tend(self) -> str | None:
        """Restart the program when it has ended and its pause is over; a line when it has just ended."""
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
        return f"{self.name} ended (exit code {code}, see {self._log}); it starts again in {pause:g} s"

    def end(self) -> None:
        """End the program, and its group."""
        if self.process is not None:
            end_group(self.process)
            self.process = None


@contextmanager
def ended_by_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM, SIGINT and SIGHUP set, so that whoever runs services can end them in order."""
    over = threading.Event()

    def finish(number: int, frame: FrameType | None) -> None:
        over.set()

    before = {number: signal.signal(number, finish) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        yield over
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
