"""Flower's Runtime API, as far as we use it: whoever holds the secret takes tasks, and works on each with the task's own token.

Flower would start a process per task, which would run the code of the app bundle. With `--isolation process` it leaves that to others:
here the node's agent and the server's own process take the tasks, so torch is imported once, and no code that came over the network
is ever run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx
from flwr.common.constant import SubStatus
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PushTaskOutputRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.retry import RetryInvoker, exponential
from flwr.supercore.runtime import RuntimeHttpClient

RETRY_S = 20.0  # how long a call is repeated while nobody answers


class Endpoint(NamedTuple):
    """A Runtime API: its address, its certificate's authority (None: on the loopback, without TLS), the secret for taking tasks."""

    address: str
    ca: bytes | None
    secret: bytes
    component: str

    def client(self, token: str | None = None) -> RuntimeHttpClient:
        """A connection, for taking tasks or, with its token, for one task."""
        access = (
            RuntimeTokenHttpInterceptor(token)
            if token
            else SuperExecAuthHttpInterceptor(
                master_secret=self.secret, protected_methods={"/flwr.proto.Runtime/AcquireTask"}
            )
        )
        return RuntimeHttpClient.from_server_address(
            server_address=self.address,
            insecure=self.ca is None,
            root_certificates=self.ca,
            interceptors=[RuntimeVersionHttpInterceptor(component_name=self.component), access],
            retry_invoker=patient(),
        )


class TaskToken(NamedTuple):
    """A task that was taken."""

    run: int
    token: str


def patient() -> RetryInvoker:
    """Repeats calls while nobody answers, for a while; answers that refuse are final.

    (Flower's own would go on for ever, or end this process.)
    """
    return RetryInvoker(
        wait_gen_factory=lambda: exponential(max_delay=2),
        recoverable_exceptions=httpx.TransportError,
        max_tries=None,
        max_time=RETRY_S,
    )


def take_task(client: RuntimeHttpClient, kind: TaskType) -> TaskToken | None:
    """The oldest task of a kind that waits, or None."""
    found = client.AcquireTask(AcquireTaskRequest(supported_task_types=[kind]))
    return TaskToken(found.task.run_id, found.token) if found.token else None


def read_place(folder: Path, address: str, component: str, *, tls: bool) -> Endpoint:
    """The Runtime API that `runtime.secret` and `ca.crt` in a folder belong to."""
    ca = (folder / "ca.crt").read_bytes() if tls else None
    return Endpoint(address, ca, (folder / "runtime.secret").read_bytes(), component)


@contextmanager
def beating(client: RuntimeHttpClient) -> Iterator[None]:
    """Tell Flower that a task is being worked on, while it lasts."""
    sender = HeartbeatSender(make_task_heartbeat_fn_http(client))
    sender.start()
    try:
        yield
    finally:
        if sender.is_running:
            sender.stop()


def finish_task(client: RuntimeHttpClient, failure: str = "") -> None:
    """Say how a task ended."""
    status = SubStatus.FAILED if failure else SubStatus.COMPLETED
    client.PushTaskOutput(PushTaskOutputRequest(sub_status=status, details=failure))
