"""A node on its device.

It consists of Flower's SuperNode (which is restarted if it exits), a worker process (which is replaced if it hangs or dies), and the agent
that connects them.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import re
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.constant import TaskType
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message

from fedloom.deploy.budget import Patience, check_size, overdraft, patience
from fedloom.deploy.certificates import expiry
from fedloom.deploy.files import Budget, NodeFile, read_file
from fedloom.deploy.limits import request_limits
from fedloom.deploy.messages import NodeFailure, open_envelope, seal
from fedloom.deploy.runtime import beating, finish_task, read_place, take_task
from fedloom.deploy.services import Service, ended_by_signals, flower_environment, keep_private, require_free, script
from fedloom.deploy.worker import serve
from fedloom.errors import ConfigError, WireError

log = logging.getLogger("fedloom.node")
POLL_S = 0.25  # interval between checks for a task
SETTLE_S = 0.4  # Flower announces a task before the whole message has arrived; a request too early costs a second
MESSAGE = "fedloom"  # name of the record that contains the envelope
WHOLE = 4 * 2**20  # size in bytes of the largest envelope that is sent in one piece
DEFAULT_DEADLINE_S = 600.0
LAST_BYTES = 2000  # number of bytes at the end of the SuperNode's log, which state why it ended


class WorkerProcess:
    """The agent's handle to the worker process. Client states are on disk, so the process can be replaced at any time."""

    def __init__(self, folder: Path, over: threading.Event, budget: Budget) -> None:
        """Prepare the handle. `over` is set when the node must stop, even while the worker is busy."""
        self._folder, self._over, self._budget = folder, over, budget
        self._process: Any = None
        self._pipe: Connection | None = None

    def tend(self) -> None:
        """Start a worker process if none is running. Call this method while the agent has only one thread.

        On Linux, the process is forked, so that a small device has Python, torch and fedloom in memory only once.
        """
        if self._process is None or not self._process.is_alive():
            self.end()
            context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=serve, args=(self._folder, theirs), daemon=True)
            self._process.start()
            theirs.close()

    def answer(self, data: bytes, allowed: Patience) -> bytes:
        """Send a request to the worker and return its answer.

        If the worker dies, exceeds the deadline or uses too much memory, it is stopped, and a failure is returned.
        """
        assert self._pipe is not None
        try:
            self._pipe.send_bytes(data)
            until, reason = time.monotonic() + allowed.seconds, ""
            while not self._over.is_set() and time.monotonic() < until:
                if reason := overdraft(self._budget, self._process.pid):
                    break
                if self._pipe.poll(POLL_S):
                    return self._pipe.recv_bytes()
            reason = reason or f"the worker did not answer within {allowed.seconds:g} s and was replaced{allowed.limit}"
        except (EOFError, OSError):
            self._process.join(5)
            reason = f"the worker ended during the request (exit code {self._process.exitcode}) and was replaced"
        log.error(reason)
        self.end()
        return seal(NodeFailure(reason=reason), {})

    def end(self) -> None:
        """Stop the worker process."""
        if self._pipe is not None:
            self._pipe.close()
        if self._process is not None:
            self._process.kill()
            self._process.join(5)


def run_node(folder: Path) -> None:
    """Run a node until SIGTERM or Ctrl-C.

    Raises:
        ConfigError: the folder is not a node's folder.
    """
    node = read_file(folder / "node.toml", NodeFile, "a node's folder")
    for name in ("node.key", "ca.crt", "runtime.secret"):
        if not (folder / name).is_file():
            raise ConfigError(f"{folder} is not a node's folder: {name} is missing")
    _check_owner(folder, node)
    warnings = [keep_private(folder)]
    if (folder / "node.crt").is_file():  # the node joined by a request
        warnings.append(expiry(folder / "node.crt", f"fedloom deploy rotate {folder}"))
    require_free(node.runtime_port, "is this node already running? To change the port, set runtime_port in node.toml")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    for warning in filter(None, warnings):
        log.warning(warning)
    home = (folder / "flwr").resolve()  # a systemd unit may write only to this folder
    supernode = Service(
        "flower-supernode", supernode_command(folder, node), flower_environment(home), folder / "supernode.log"
    )
    with ended_by_signals() as over:
        supernode.start()
        worker = WorkerProcess(folder, over, node.budget)
        gc.freeze()  # otherwise the next garbage collection would copy memory shared with the worker
        log.info("%s: clients %s; server %s", node.name, ", ".join(map(str, node.clients)), node.server)
        try:
            _attend(folder, node, supernode, worker, over)
        finally:
            worker.end()
            supernode.end()


def _check_owner(folder: Path, node: NodeFile) -> None:
    """Raise ConfigError for settings by the node's owner that cannot be honoured."""
    if node.data != "config" and not (folder / node.data).exists():
        raise ConfigError(f"data={node.data}: {folder / node.data} does not exist; set data in {folder / 'node.toml'}")
    if node.budget.memory_mib is not None and sys.platform != "linux":
        raise ConfigError(f"budget.memory_mib={node.budget.memory_mib}: can be enforced only on Linux; remove it")


def supernode_command(folder: Path, node: NodeFile) -> list[str]:
    """Return the command line of the SuperNode."""
    return [
        *script("supernode"), "--superlink", node.server, "--root-certificates", str(folder / "ca.crt"),
        "--auth-supernode-private-key", str(folder / "node.key"), "--isolation", "process",
        "--superexec-auth-secret-file", str(folder / "runtime.secret"), "--host", "127.0.0.1", "--port", str(node.runtime_port),
    ]  # fmt: skip


def _attend(folder: Path, node: NodeFile, supernode: Service, worker: WorkerProcess, over: threading.Event) -> None:
    """Answer messages from the SuperNode one by one, and restart the SuperNode if it exits."""
    place = read_place(folder, f"127.0.0.1:{node.runtime_port}", "flwr-clientapp", tls=False)
    tasks = place.client()
    tasks._retry_invoker = None  # fail quickly and retry, because the SuperNode may still be starting
    while not over.is_set():
        worker.tend()
        if line := supernode.tend():
            log.error("%s%s", line, refusal(folder / "supernode.log"))
        try:
            task = take_task(tasks, TaskType.CLIENT_APP)
        except httpx.HTTPError:
            over.wait(0.5)
            continue
        if task is None:
            over.wait(POLL_S)
            continue
        try:
            with place.client(task.token) as client, beating(client):
                _work(client, worker, node)
        except Exception:  # drop the message, keep the node running
            log.exception("a message could not be answered")


def refusal(file: Path) -> str:
    """Return the reason why the server refused this node, according to the end of the SuperNode's log, or ""."""
    with file.open("rb") as log_file:
        log_file.seek(max(0, file.stat().st_size - LAST_BYTES))
        found = re.findall(r"\[code: \d+\] (.+)", log_file.read().decode(errors="replace"))
    return f"; {found[-1].strip()}" if found else ""


def _work(client: RuntimeHttpClient, worker: WorkerProcess, node: NodeFile) -> None:
    time.sleep(SETTLE_S)
    message, context, _, _ = pull_task_input(client)
    try:
        answer = answer_within(worker, content_of(message), node)
    except (WireError, ConfigError) as error:
        answer = seal(NodeFailure(reason=str(error)), {})
    push_message(client, Message(as_record(answer), reply_to=message), context)
    finish_task(client)


def answer_within(worker: WorkerProcess, data: bytes, node: NodeFile) -> bytes:
    """Return the worker's answer to a request. Raise ConfigError if the request or the answer is larger than the node's budget allows."""
    check_size(node.budget, len(data), "request")
    call = getattr(open_envelope(data, request_limits(len(node.clients))).header, "call", None)
    deadline_s = float(call.deadline_s) if call else DEFAULT_DEADLINE_S
    answer = worker.answer(data, patience(node.budget, deadline_s))
    check_size(node.budget, len(answer), "answer")
    return answer


def as_record(data: bytes) -> RecordDict:
    """Return an envelope as a Flower record, either as a config value, which is sent in one piece, or as an array, which is sent in
    chunks.

    Each chunk needs requests on each of three hops, so small envelopes are sent in one piece.
    """
    if len(data) <= WHOLE:
        return RecordDict({MESSAGE: ConfigRecord({MESSAGE: data})})
    return RecordDict({MESSAGE: ArrayRecord({MESSAGE: Array("uint8", (len(data),), MESSAGE, data)})})


def content_of(message: Message) -> bytes:
    """Return the envelope in a message. Raise WireError if there is none."""
    records = message.content.values() if message.has_content() else ()
    for record in records:
        found = record.get(MESSAGE) if isinstance(record, ConfigRecord | ArrayRecord) else None
        if isinstance(found, Array):
            return bytes(found.data)
        if isinstance(found, bytes):
            return found
    raise WireError("the message has no fedloom envelope")
