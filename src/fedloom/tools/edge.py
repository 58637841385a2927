"""The cost of one client's local update on a device: sizes, operations, seconds and memory, without a full run.

Seconds and memory are measured in a new process that contains the examples of only one client, as on a device. `python -m
fedloom.tools.edge FOLDER` runs that process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from fedloom import tree
from fedloom.config.parsing import read_toml
from fedloom.config.settings import Settings, make_method, make_settings, to_toml
from fedloom.engines import Problem
from fedloom.engines.base import client_data
from fedloom.engines.process_memory import peak_process_bytes
from fedloom.errors import FedloomError
from fedloom.experiment.build import arithmetic, make_archs, make_federation, make_problem
from fedloom.experiment.costs import Costs, pieces, shortened
from fedloom.inputs import Field, Inputs, InputSpec, map_inputs
from fedloom.method import Client, Method, Set, Sweep, Task, Turn, init_opts
from fedloom.nets import read_weights
from fedloom.objectives import from_content
from fedloom.rng import Stream
from fedloom.training.batches import Plan, Rows, laid_out_inputs
from fedloom.training.context import ClientContext
from fedloom.training.gradients import Gradients
from fedloom.training.turn import fresh_modules, run_phases
from fedloom.tree import Tree
from fedloom.wire.messages import Meter, decode, encode

FOUND = "found.json"
TIMED_STEPS = 10  # number of steps of a phase that are timed, after one warm-up step; the time is scaled to all steps


@dataclass(frozen=True, kw_only=True)
class PhaseCost:
    """The cost of one phase of a local update."""

    name: str
    steps: int  # number of batches, or of pieces of a sweep
    flops: float
    seconds: float  # CPU time on this machine with one thread
    tensor_bytes: int  # peak memory of the tensors


@dataclass(frozen=True, kw_only=True)
class TurnCost:
    """The cost of a local update of the client with the most training examples of one architecture."""

    method: str
    model: str
    data: str
    client: int
    rows: int
    parameters: int
    parameters_sent: int
    kept_bytes: int  # private weights, memory and optimiser states, which are kept between rounds
    uplink_bytes: int
    downlink_bytes: int
    phases: tuple[PhaseCost, ...]
    process_bytes: int  # peak memory of the client's process
    program_bytes: int  # the part of it for Python, torch and fedloom, before the model is created


class MeasureError(FedloomError):
    """The client's process failed."""


def turn_costs(settings: Settings) -> list[TurnCost]:
    """Return the cost of a local update for each architecture of an experiment.

    Raises:
        UsageError: settings contradict each other, or data are missing.
        MeasureError: the client's process failed, perhaps because it ran out of memory.
    """
    with arithmetic(settings):
        method, federation = make_method(settings.method), make_federation(settings)
        federation = federation.pooled() if method.pooled else federation
        problem = make_problem(settings, method, federation)
        costs = Costs(problem)
        clients = (costs.largest(place) for place in range(len(problem.archs)))
        return [_turn_cost(settings, costs, i) for i in clients if i is not None]


def _turn_cost(settings: Settings, costs: Costs, i: int) -> TurnCost:
    problem, method = costs.problem, costs.problem.method
    turn, client, down = costs.busiest(i), costs.received(i), costs.downlink.to(0)
    measured = _measured(settings, problem, i=i, turn=turn, client=client, down=down)
    flops, tensor_bytes = costs.flops(i, turn.number), costs.peak_bytes(i)
    travelling = method.travelling(client.weights)["params"]
    phases = tuple(
        PhaseCost(
            name=phase.name,
            steps=sum(pieces(phase, problem.plan, turn.examples).values()),
            flops=flops[phase.name],
            seconds=measured["seconds"][phase.name],
            tensor_bytes=tensor_bytes[phase.name],
        )
        for phase in method.phases()
    )
    return TurnCost(
        method=settings.method.name,
        model=problem.archs[problem.arch_of[i]].name,
        data=problem.data.name,
        client=i,
        rows=turn.examples,
        parameters=sum(p.numel() for p in client.weights["params"].values()),
        parameters_sent=sum(p.numel() for p in travelling.values()),
        kept_bytes=tree.n_bytes(client._replace(weights=problem.kept(client.weights))._asdict()),
        uplink_bytes=measured["uplink_bytes"],
        downlink_bytes=sum(Meter().sizes(down).values()),
        phases=phases,
        process_bytes=measured["process_bytes"],
        program_bytes=measured["program_bytes"],
    )


def _measured(settings: Settings, problem: Problem, i: int, turn: Turn, client: Client, down: Tree) -> dict[str, Any]:
    """Run the local update in a separate process, and return the costs that the process measured."""
    x, y = problem.data.train(i)
    facts = {"task": _task_facts(problem.task), "turn": asdict(turn), "arch": problem.arch_of[i]}
    with tempfile.TemporaryDirectory(prefix="fedloom-edge-") as name:
        folder = Path(name)
        (folder / "config.toml").write_text(to_toml(settings), encoding="utf-8")
        (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
        sent = {"rows": {"x": x, "y": y}, "client": client._asdict(), "down": down}
        (folder / "turn.safetensors").write_bytes(encode(sent))
        words = [
            sys.executable,
            "-P",
            "-m",
            "fedloom.tools.edge",
            name,
        ]  # -P: do not import modules from the current folder
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or [
                f"exit code {done.returncode} (-9 means killed, usually out of memory)"
            ]
            raise MeasureError(f"the process of client {i} failed: {last[0]}")
        found: dict[str, Any] = json.loads((folder / FOUND).read_text(encoding="utf-8"))
    return found


def take_turn(folder: Path) -> dict[str, Any]:
    """Run a shortened local update in the client's process, and return its costs."""
    program = peak_process_bytes()
    settings = make_settings(read_toml(folder / "config.toml"))
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    with arithmetic(settings.model_copy(update={"engine": settings.engine.model_copy(update={"threads": 1})})):
        method = make_method(settings.method)
        task = _task_from(facts["task"])
        turn = Turn(**facts["turn"])
        sent = decode((folder / "turn.safetensors").read_bytes())
        modules = _modules(settings, method, task, facts["arch"], sent["rows"]["x"])
        gradients = Gradients(modules, objective=task.objective, bf16=settings.precision == "bf16")
        weights = read_weights(gradients.modules)
        opts = init_opts((*method.phases(), *method.adapt()), weights)
        known = client_data(sent["rows"]["y"], task.objective)
        blank = Client(weights, method.init_memory(weights, task, known), opts)
        client = Client(**tree.merge(blank._asdict(), sent["client"]))  # empty branches are not encoded
        down = sent.get("down", {})
        try:
            worked, seconds = _timed(
                method, gradients, client=client, down=down, site=_site(settings, task, sent["rows"], True), turn=turn
            )
        except RuntimeError as error:  # the model calls .view() on a convolution's output; retry, as the engines do
            if "view size is not compatible" not in str(error):
                raise
            worked, seconds = _timed(
                method, gradients, client=client, down=down, site=_site(settings, task, sent["rows"], False), turn=turn
            )
        uplink, _ = method.uplink(worked, client.weights, down, turn)
    return {
        "seconds": seconds,
        "uplink_bytes": sum(Meter().sizes(uplink).values()),
        "program_bytes": program,
        "process_bytes": peak_process_bytes(),
    }


def _task_facts(task: Task) -> dict[str, Any]:
    """Return the task as JSON values."""
    plain = {field.name: getattr(task, field.name) for field in fields(task)}
    return plain | {"objective": task.objective.content(), "spec": [asdict(part) for part in task.spec.fields]}


def _task_from(facts: Mapping[str, Any]) -> Task:
    """Return the task that `_task_facts` describes."""
    parts = (Field(**part | {"shape": tuple(part["shape"]), "levels": tuple(part["levels"])}) for part in facts["spec"])
    given = {"objective": from_content(facts["objective"]), "spec": InputSpec(tuple(parts))}
    return Task(**{**facts, **given, "lr_scales": tuple(facts["lr_scales"])})


def _modules(settings: Settings, method: Method, task: Task, place: int, x: Inputs) -> Any:
    example = map_inputs(lambda v: v[torch.arange(2) % len(v)], x)
    models = settings.models[place : place + 1]  # only this one, because other models would add to the measured memory
    one = settings.model_copy(update={"models": models})
    recipe = make_archs(one, task.spec, task.objective, example)[0]
    return fresh_modules(lambda: method.nets(recipe, task), Stream(settings.seed, "init"))


def _site(settings: Settings, task: Task, rows: Tree, channels_last: bool) -> ClientContext:
    x = laid_out_inputs(rows["x"], channels_last)
    plan = Plan(settings.batch_size, settings.drop_last)
    return ClientContext(rows=Rows(x, rows["y"]), plan=plan, task=task, rng=Stream(settings.seed, "edge"))


def _timed(
    method: Method, gradients: Gradients, client: Client, down: Tree, site: ClientContext, turn: Turn
) -> tuple[Client, dict[str, float]]:
    """Run a few steps of each phase. Return the updated client, and the CPU seconds of each phase, scaled to all of its steps."""
    seconds = {}
    for phase in method.phases():
        steps = sum(pieces(phase, site.plan, turn.examples).values())
        timed = min(steps, TIMED_STEPS)
        if not isinstance(phase, Sweep | Set):
            run_phases((shortened(phase, 1),), gradients, client, down, site, turn=turn)
        started = time.process_time()
        client = run_phases((shortened(phase, timed),), gradients, client, down, site, turn=turn)[0]
        whole = isinstance(phase, Sweep | Set)
        seconds[phase.name] = (time.process_time() - started) * (1 if whole else steps / timed)
    return client, seconds


if __name__ == "__main__":
    here = Path(sys.argv[1])  # a file, because a user's code may print to standard output
    (here / FOUND).write_text(json.dumps(take_turn(here)), encoding="utf-8")
