"""A complete federation on this machine, with TLS and node keys. The server and the nodes are separate processes."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedloom.deploy.folder import Deployment, create_deployment
from fedloom.deploy.grid import LinkError
from fedloom.deploy.server import is_open
from fedloom.deploy.services import end_group, flower_environment, free_ports, leashed, private_files

START_S = 90.0  # maximum time in which the server must start on a busy machine


class LocalFederation:
    """The processes of a federation on this machine."""

    def __init__(self, deployment: Deployment) -> None:
        self.deployment = deployment
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start_server(self) -> None:
        """Start the SuperLink and the proxy, and wait until they answer."""
        self._start("server", ["server", str(self.deployment.path)])
        until = time.monotonic() + START_S
        while not is_open(self.deployment):
            if self.processes["server"].poll() is not None or time.monotonic() > until:
                raise LinkError(f"the server did not start:\n{self.log('server')[-2000:]}")
            time.sleep(0.2)

    def start_node(self, node: str) -> None:
        """Start a node."""
        self._start(node, ["node", str(self.deployment.path / node)])

    def _start(self, name: str, words: Sequence[str]) -> None:
        with private_files():
            out = self._log(name).open("ab")
        with out:
            self.processes[name] = subprocess.Popen(
                leashed([sys.executable, "-P", "-m", "fedloom.cli", "deploy", *words]),
                env=flower_environment(),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def log(self, name: str) -> str:
        """Return the output of a process."""
        return self._log(name).read_text(encoding="utf-8", errors="replace")

    def _log(self, name: str) -> Path:
        return self.deployment.path / f"{name}.log"

    def end(self) -> None:
        """Stop all processes, the nodes first."""
        running = list(reversed(self.processes.values()))
        for process in running:
            process.terminate()
        for process in running:
            end_group(process)
        self.processes.clear()


@contextmanager
def local_federation(values: Mapping[str, Any], n_nodes: int, folder: Path | None = None) -> Iterator[LocalFederation]:
    """Start a federation for the duration of the context. No process remains after the context.

    Args:
        folder: folder for the federation's files, which is kept; default: a temporary folder, which is deleted after the context.
    """
    place = folder or Path(tempfile.mkdtemp(prefix="fedloom-federation-")) / "federation"
    proxy, superlink, *runtime = free_ports(2 + n_nodes)
    federation: LocalFederation | None = None
    try:
        deployment = create_deployment(
            place, values, n_nodes, ports={"proxy": proxy, "superlink": superlink}, runtime=runtime, demo=True
        )
        federation = LocalFederation(deployment)
        federation.start_server()
        for node in deployment.file.nodes:
            federation.start_node(node)
        yield federation
    finally:
        if federation:
            federation.end()
        if folder is None:
            shutil.rmtree(place.parent, ignore_errors=True)
