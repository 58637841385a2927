"""The programs of the server: Flower's SuperLink on the loopback interface, and the proxy in front of it.

They are restarted if they exit.
"""

from __future__ import annotations

import logging
import socket
import ssl
import threading
import time
from pathlib import Path

import httpx

from fedloom.deploy import superlink_store
from fedloom.deploy.folder import Deployment
from fedloom.deploy.grid import LinkError
from fedloom.deploy.roster import Roster
from fedloom.deploy.services import Service, ended_by_signals, flower_environment, keep_private, module, require_free

log = logging.getLogger("fedloom.server")
START_S = 60.0  # maximum time in which the SuperLink must start


def superlink_command(deployment: Deployment, database: Path) -> list[str]:
    """Return the command line of the SuperLink."""
    own = deployment.server
    return [
        "flower-superlink", "--host", "127.0.0.1", "--port", str(deployment.file.superlink_port), "--enable-supernode-auth",
        "--isolation", "process", "--superexec-auth-secret-file", str(own / "runtime.secret"), "--database",
        str(database), "--disable-runtime-dependency-installation", "--ssl-ca-certfile", str(own / "ca.crt"),
        "--ssl-certfile", str(own / "server.crt"), "--ssl-keyfile", str(own / "server.key"),
    ]  # fmt: skip


def proxy_command(deployment: Deployment) -> list[str]:
    """Return the command line of the proxy."""
    listens, _, port = deployment.door
    return [*module("proxy"), listens, str(port), str(deployment.file.superlink_port), str(deployment.server)]


def run_server(deployment: Deployment, *, keep_store: bool = False) -> None:
    """Run the SuperLink and the proxy until SIGTERM or Ctrl-C. With `keep_store`, the SuperLink's database is on disk and is kept."""
    warnings = [keep_private(deployment.path), *deployment.expiring()]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    for warning in filter(None, warnings):
        log.warning(warning)
    for port in (deployment.file.superlink_port, deployment.door[2]):
        require_free(port, "is the server already running? To change ports, edit federation.toml")
    deployment.write_flwr_config()  # ports may have changed, and the folder may have moved
    home = (deployment.server / "flwr").resolve()
    store = superlink_store.database(deployment.server, keep=keep_store)
    command = superlink_command(deployment, store)
    superlink = Service("flower-superlink", command, flower_environment(home), deployment.server / "superlink.log")
    proxy = Service("proxy", proxy_command(deployment), flower_environment(home), deployment.server / "proxy.log")
    with ended_by_signals() as over:
        superlink.start()
        proxy.start()
        try:
            _wait(deployment, superlink, over)
            roster = Roster(deployment)
            if not over.is_set():
                _update(roster)
                log.info("the federation is ready at %s; messages are in %s", deployment.file.address, store.parent)
            _tend(superlink, proxy, store, roster, over)
        finally:
            if not keep_store:  # delete it first, because this process may be killed while it waits for the others
                superlink_store.delete(store)
            proxy.end()
            superlink.end()
            if not keep_store:
                superlink_store.delete(store)


def _tend(superlink: Service, proxy: Service, store: Path, roster: Roster, over: threading.Event) -> None:
    """Restart the programs if they exit, truncate the log of the database, and register changed keys until `over` is set."""
    truncated = time.monotonic()
    while not over.wait(0.5):
        for service in (superlink, proxy):
            if line := service.tend():
                log.error(line)
        if superlink.process is not None:
            _update(roster)
        if time.monotonic() - truncated > superlink_store.TRUNCATE_S:
            superlink_store.truncate(store)
            truncated = time.monotonic()


def _update(roster: Roster) -> None:
    """Register changed keys. If the SuperLink does not answer, register them at the next call."""
    try:
        for line in roster.update():
            log.info(line)
    except httpx.HTTPError as error:
        log.warning("the SuperLink does not answer yet (%s)", type(error).__name__)


def is_open(deployment: Deployment) -> bool:
    """Return whether the SuperLink and the proxy both answer with a valid certificate."""
    context = ssl.create_default_context(cafile=str(deployment.server / "ca.crt"))
    try:
        for place in (("127.0.0.1", deployment.file.superlink_port), deployment.door[1:]):
            with (
                socket.create_connection(place, 2) as raw,
                context.wrap_socket(raw, server_hostname="127.0.0.1"),
            ):
                pass
    except OSError:
        return False
    return True


def _wait(deployment: Deployment, superlink: Service, over: threading.Event) -> None:
    until = time.monotonic() + START_S
    while not over.is_set() and not is_open(deployment):
        ended = superlink.process is None or superlink.process.poll() is not None
        if ended or time.monotonic() > until:
            raise LinkError(f"the server did not start; see superlink.log and proxy.log in {deployment.server}")
        over.wait(0.3)
