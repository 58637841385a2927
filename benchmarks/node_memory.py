"""Measure the memory of a federation's processes on this machine (Linux), before the first local update and after four rounds.

    python benchmarks/node_memory.py

Sizes are proportional set sizes, in which pages shared by several processes count once. There is one node with two clients, and FedRIR
trains an MLP on digits.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from fedloom.deploy.grid import GridLink
from fedloom.deploy.local import local_federation
from fedloom.deploy.running import prepare
from workloads import pss_and_children

VALUES: dict[str, Any] = {
    "method": {"name": "fedrir"}, "model": {"name": "mlp"}, "data": {"name": "digits"}, "clients": 2, "rounds": 4, "checkpoint_every": 1,
}  # fmt: skip
# All other processes belong to fedloom: a node's agent and its worker, and the server's guard.
PARTS = ("superlink", "proxy", "supernode")


def by_part(pid: int, role: str) -> Counter[str]:
    """Return the memory in megabytes of a process and its descendants, by program."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().replace("\0", " ")
    part = next(
        (name for name in PARTS if any(f"{word}{name}" in words for word in ("deploy/", "deploy.", "flower-"))), role
    )
    size, children = pss_and_children(pid)
    return sum((by_part(child, role) for child in children), Counter({part: size // 1_000_000}))


def show(when: str, processes: dict[str, Any]) -> None:
    """Print one line for the server, and one for the node."""
    for role, process in processes.items():
        print(f"{when:16} {role}: {dict(by_part(process.pid, f'fedloom ({role})'))} MB")


def main() -> None:
    """Measure the memory and print it."""
    with tempfile.TemporaryDirectory() as folder, local_federation(VALUES, 1, Path(folder) / "f") as federation:
        link = GridLink(federation.deployment, print)
        run = prepare(federation.deployment, VALUES | {"out": f"{folder}/run"}, link, print)
        show("before turns", federation.processes)

        def look(done: int, rounds: int, row: Any) -> None:
            if done == rounds:
                show(f"after {done} rounds", federation.processes)

        run.run(look)


if __name__ == "__main__":
    main()
