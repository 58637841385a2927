"""The part of Flower's Runtime API that fedloom uses. A process takes tasks with a secret, and works on a task with the task's token.

By default, Flower starts a process for each task, which runs the code of the app bundle. With `--isolation process`, other processes take
the tasks: here, the node's agent and the server's process. As a result, torch is imported only once, and code from the network is never
run.
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

RETRY_S = 20.0  # time for which an unanswered call is repeated


class Endpoint(NamedTuple):
    """A Runtime API: its address, the certificate of its authority, and the secret for taking tasks.

    The certificate is None on the loopback interface, where the API has no TLS.
    """

    address: str
    ca: bytes | None
    secret: bytes
    component: str

    def client(self, token: str | None = None) -> RuntimeHttpClient:
        """Return a connection for taking tasks or, with a token, for working on one task."""
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
    """The run and the token of a task."""

    run: int
    token: str


def patient() -> RetryInvoker:
    """Return a policy that repeats unanswered calls for a limited time. Refused calls are not repeated.

    Flower's own policy would repeat calls forever, or terminate this process.
    """
    return RetryInvoker(
        wait_gen_factory=lambda: exponential(max_delay=2),
        recoverable_exceptions=httpx.TransportError,
        max_tries=None,
        max_time=RETRY_S,
    )


def take_task(client: RuntimeHttpClient, kind: TaskType) -> TaskToken | None:
    """Take the oldest waiting task of a kind. Return None if no task is waiting."""
    found = client.AcquireTask(AcquireTaskRequest(supported_task_types=[kind]))
    return TaskToken(found.task.run_id, found.token) if found.token else None


def read_place(folder: Path, address: str, component: str, *, tls: bool) -> Endpoint:
    """Return the Runtime API at an address, with `runtime.secret` and `ca.crt` from a folder."""
    ca = (folder / "ca.crt").read_bytes() if tls else None
    return Endpoint(address, ca, (folder / "runtime.secret").read_bytes(), component)


@contextmanager
def beating(client: RuntimeHttpClient) -> Iterator[None]:
    """Send heartbeats for a task to Flower within the context."""
    sender = HeartbeatSender(make_task_heartbeat_fn_http(client))
    sender.start()
    try:
        yield
    finally:
        if sender.is_running:
            sender.stop()


def finish_task(client: RuntimeHttpClient, failure: str = "") -> None:
    """Report the end of a task to Flower."""
    status = SubStatus.FAILED if failure else SubStatus.COMPLETED
    client.PushTaskOutput(PushTaskOutputRequest(sub_status=status, details=failure))
