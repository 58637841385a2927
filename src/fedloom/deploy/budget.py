"""The requests that a node's owner allows: the limits in `node.toml`, and the folders that the config of a run may name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fedloom.config.settings import Settings
from fedloom.deploy.files import Budget, NodeFile
from fedloom.engines.base import Problem
from fedloom.errors import ConfigError
from fedloom.method import Interleave, Phase, Train, trains_of

MIB = 2**20
REMEDY = "the owner of this node sets it in node.toml"


def most_steps(problem: Problem, client: int, n_examples: int, phases: Sequence[Phase] | None = None) -> dict[str, int]:
    """Return the maximum number of steps of each `Train` in a client's local update, by name.

    `phases` is by default the phases of the method.
    """
    plan, found = problem.plan_of(client), dict[str, int]()
    for phase in problem.method.phases() if phases is None else phases:
        if isinstance(phase, Train | Interleave):
            n_steps = plan.n_steps(n_examples, phase.epochs, phase.steps)
            found |= {train.name: n_steps * train.repeats for train in trains_of([phase])}
    return found


def check_size(budget: Budget, n_bytes: int, what: str) -> None:
    """Raise ConfigError if a message is too large. `what` is "request" or "answer"."""
    if n_bytes > budget.message_mib * MIB:
        raise ConfigError(
            f"budget.message_mib={budget.message_mib:g}: the {what} has {n_bytes / MIB:.1f} MiB; {REMEDY}"
        )


def check_settings(node: NodeFile, folder: Path, settings: Settings) -> None:
    """Raise ConfigError if a run has too many rounds, or would read files that the node's owner has not listed.

    `folder` is the node's folder. Paths in `node.toml` are relative to it.
    """
    if settings.rounds > node.budget.rounds:
        raise ConfigError(f"budget.rounds={node.budget.rounds}: the run has {settings.rounds} rounds; {REMEDY}")
    if node.data != "config":
        return
    listed = [(folder / each).resolve() for each in node.folders]
    for key, path in (("data.path", settings.data.path), ("partition.path", settings.partition.path)):
        if path and not any(path.resolve().is_relative_to(each) for each in listed):
            raise ConfigError(
                f"{key}={path}: is not in a folder that this node may read for a run; its owner can add it to folders in node.toml"
            )


def check_problem(budget: Budget, problem: Problem, clients: Sequence[int]) -> None:
    """Raise ConfigError if a client's nets have too many parameters, or if a local update or an adaptation has too many steps."""
    for arch in sorted({problem.arch_of[i] for i in clients}):
        nets = problem.modules(arch).values()
        if (n := sum(p.numel() for net in nets for p in net.parameters())) > budget.parameters:
            raise ConfigError(f"budget.parameters={budget.parameters}: the nets have {n} parameters; {REMEDY}")
    for i in clients:
        for phases in (problem.method.phases(), problem.method.adapt()):
            steps = sum(most_steps(problem, i, problem.data.n_train(i), phases).values())
            if steps > budget.steps:
                raise ConfigError(
                    f"budget.steps={budget.steps}: client {i} would take {steps} steps in a round; {REMEDY}"
                )


class Patience(NamedTuple):
    """The time that an answer may take, in seconds, and the limit that determines it."""

    seconds: float
    limit: str = ""


def patience(budget: Budget, deadline_s: float) -> Patience:
    """Return the shorter of the server's deadline and the budget of the node."""
    if deadline_s <= budget.seconds:
        return Patience(deadline_s)
    return Patience(budget.seconds, f" (budget.seconds={budget.seconds:g}; {REMEDY})")


def overdraft(budget: Budget, pid: int) -> str:
    """Return the reason why a worker must be stopped if its resident memory exceeds the budget, or ""."""
    if budget.memory_mib is None:
        return ""
    used = resident_mib(pid)
    if used <= budget.memory_mib:
        return ""
    return (
        f"the worker used {used:.0f} MiB of memory and was replaced (budget.memory_mib={budget.memory_mib}; {REMEDY})"
    )


def resident_mib(pid: int) -> float:
    """Return the resident memory of a process in MiB, including shared pages (on Linux), or 0 if the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except FileNotFoundError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:")), 0.0)
