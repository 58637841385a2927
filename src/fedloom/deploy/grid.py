"""A `Link` to the nodes over Flower's grid, for the process of the server."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TypeVar

import httpx
from flwr.app import Message
from flwr.common.serde import run_from_proto
from flwr.proto.runtime_pb2 import PullTaskInputRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from fedloom.deploy.agent import as_record, content_of
from fedloom.deploy.engine import LostNode
from fedloom.deploy.folder import Deployment
from fedloom.deploy.node_keys import KeyRing
from fedloom.deploy.runtime import finish_task, patient, read_place, take_task
from fedloom.deploy.services import flower_environment
from fedloom.errors import UsageError, WireError

REJOIN_S = 60.0  # maximum wait for nodes to reconnect after the SuperLink was unreachable
POLL_S = 0.3  # interval between checks for answers
REOPEN_S = 180.0  # maximum wait for a SuperLink that is not reachable
T = TypeVar("T")
TASK_S = 30.0  # maximum time in which Flower must create the task of a run
GONE = (httpx.HTTPError, RunNotRunningException)


class LinkError(UsageError):
    """The SuperLink cannot be reached, or refuses a request."""


class GridLink:
    """A link over Flower runs. If the SuperLink was unreachable, a new Flower run is started, and the exchange is repeated.

    It is safe to repeat an exchange, because every request names the states from which it starts.
    """

    def __init__(self, deployment: Deployment, tell: Callable[[str], None]) -> None:
        """Start a Flower run. Raise LinkError if no SuperLink answers."""
        self._deployment, self._tell = deployment, tell
        self._ring = KeyRing(deployment.server / "keys")
        self._ids: dict[str, int] = {}
        # Late nodes and their time limits, by message.
        self._overdue: dict[str, tuple[str, float]] = {}
        self._gone: dict[str, LostNode] = {}  # late nodes whose answer will never arrive
        self._grid: HttpGrid
        self._heart: HeartbeatSender
        self._open()

    def nodes(self) -> Sequence[str]:
        """Return the online nodes of this federation (see `Link.nodes`)."""
        return self._with_retries(self._online)

    def _online(self) -> Sequence[str]:
        self._ring.refresh()
        now, keys = time.time(), self._ring.keys
        here = [info for info in self._grid.get_nodes() if info.online_until > now and info.public_key in keys]
        here.sort(key=lambda info: not keys[info.public_key].is_previous)  # prefer new keys
        ids = {keys[info.public_key].node: info.node_id for info in here}
        self._ids = {node: number for node, number in ids.items() if node in self._deployment.file.nodes}
        return sorted(self._ids)

    def exchange(
        self, requests: Mapping[str, bytes], deadline_s: float, late_s: float = 0.0
    ) -> Mapping[str, bytes | LostNode]:
        """See `Link.exchange`."""
        return self._with_retries(lambda: self._exchange(requests, deadline_s, late_s))

    def late(self) -> Mapping[str, bytes | LostNode]:
        """See `Link.late`."""
        found = self._with_retries(self._late)
        lost, self._gone = self._gone, {}
        return {**found, **lost}

    def _late(self) -> Mapping[str, bytes | LostNode]:
        found: dict[str, bytes | LostNode] = {}
        for reply in self._grid.pull_messages(list(self._overdue)) if self._overdue else ():
            node, _ = self._overdue.pop(reply.metadata.reply_to_message_id)
            found[node] = _answer(reply)
        for message, (node, until) in list(self._overdue.items()):
            if time.monotonic() > until:
                del self._overdue[message]
                found[node] = LostNode("no answer within the extra time for late answers")
        return found

    def _exchange(
        self, requests: Mapping[str, bytes], deadline_s: float, late_s: float
    ) -> Mapping[str, bytes | LostNode]:
        here = self._online() if requests.keys() - self._ids.keys() else self._ids
        answers: dict[str, bytes | LostNode] = {
            node: LostNode("is not online") for node in requests if node not in here
        }
        asked = [node for node in requests if node in here]
        ttl = deadline_s + late_s
        messages = [Message(as_record(requests[node]), self._ids[node], "train", ttl=ttl) for node in asked]
        waiting = dict(zip(self._grid.push_messages(messages), asked, strict=True))  # nodes by message
        none, until = LostNode(f"no answer within {deadline_s:g} s"), time.monotonic() + deadline_s
        while waiting and time.monotonic() < until:
            for reply in self._grid.pull_messages(list(waiting)):
                node = waiting.pop(reply.metadata.reply_to_message_id)
                late = (
                    not late_s and time.monotonic() > until - 2
                )  # Flower has dropped the message; report fedloom's own reason
                answers[node] = none if late and reply.has_error() else _answer(reply)
            if waiting:
                time.sleep(POLL_S)
        if late_s:
            self._overdue |= {message: (node, until + late_s) for message, node in waiting.items()}
            return answers
        return answers | dict.fromkeys(waiting.values(), none)

    def _with_retries(self, work: Callable[[], T]) -> T:
        """Call `work`. If the SuperLink is unreachable, wait for it, start a new Flower run, and call `work` again."""
        until = time.monotonic() + REOPEN_S
        while True:
            try:
                return work()
            except GONE as error:
                self._tell(f"the SuperLink is not reachable ({_short(error)}); waiting for it")
                self._drop()
                self._reopen(until)

    def _reopen(self, until: float) -> None:
        before = set(self._ids)
        while True:
            try:
                self._open()
                again = time.monotonic() + REJOIN_S
                while not before <= set(self._online()) and time.monotonic() < again:
                    time.sleep(1)
                return
            except (LinkError, *GONE) as error:
                if time.monotonic() > until:
                    raise LinkError(str(error)) from None
                time.sleep(2)

    def _open(self) -> None:
        """Start a Flower run, take its task, and connect."""
        place = read_place(self._deployment.server, self._deployment.superlink, "flwr-serverapp", tls=True)
        run = _start_run(self._deployment)
        with place.client() as tasks:
            until = time.monotonic() + TASK_S
            while not (task := take_task(tasks, TaskType.SERVER_APP)) or task.run != run:
                if task:  # the task of a run that was killed before it started
                    with place.client(task.token) as old:
                        finish_task(old, "this run was abandoned")
                if time.monotonic() > until:
                    raise LinkError(
                        f"the SuperLink at {self._deployment.superlink} did not start the run; another run may be active"
                    )
                time.sleep(POLL_S)
        self._grid = HttpGrid(self._deployment.superlink, False, place.ca, token=task.token)
        self._grid._retry_invoker = patient()
        given = self._grid._runtime_client.PullTaskInput(PullTaskInputRequest())
        self._grid.set_run(run_from_proto(given.run))
        TaskIdentity.task_id, TaskIdentity.run_id = given.task_id, given.run.run_id
        TaskIdentity.node_id = given.context.node_id
        self._heart = HeartbeatSender(make_task_heartbeat_fn_http(self._grid._runtime_client))
        self._heart.start()

    def _drop(self) -> None:
        """Remove the Flower run in any state, and its messages in flight."""
        self._gone |= {
            node: LostNode("its late answer was lost when the SuperLink stopped") for node, _ in self._overdue.values()
        }
        self._overdue = {}
        if self._heart.is_running:
            self._heart.stop()
        self._grid.close()

    def close(self) -> None:
        """Complete the Flower run (see `Link.close`)."""
        with suppress(*GONE):
            finish_task(self._grid._runtime_client)
        self._drop()


def _start_run(deployment: Deployment) -> int:
    """Ask the SuperLink to start a run, and return its number."""
    command = ["flwr", "run", str(deployment.server / "app"), "fedloom", "--format", "json"]
    environment = flower_environment((deployment.server / "flwr").resolve())
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        return int(json.loads(done.stdout)["run-id"])
    except (OSError, ValueError, KeyError, TypeError, subprocess.TimeoutExpired):
        where = deployment.superlink
        raise LinkError(
            f"no SuperLink answers at {where}; start it with: fedloom deploy server {deployment.path}"
        ) from None


def _answer(reply: Message) -> bytes | LostNode:
    if reply.has_error():
        return LostNode(
            f"no answer (Flower's code {reply.error.code}: {' '.join(str(reply.error.reason).split())[:200]})"
        )
    try:
        return content_of(reply)
    except WireError as error:
        return LostNode(str(error))


def _short(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__} {error}".split())[:120]
