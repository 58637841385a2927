"""Time fedloom against the PFLlib-style loop, measure its memory, and save the numbers in benchmarks/results/.

    python benchmarks/workloads.py w1 w4-mlp scale=0.1 rounds=5 out=NAME     speed; pin it: taskset -c 0 python ...
    python benchmarks/workloads.py memory w4 clients-10k scale=1 out=NAME    peak memory in a few rounds, by engine

A result contains the command, versions, hardware and seed (`environment`), the number of cores used, and the load of the machine before
and after the measurement. On a busy machine, ratios are unreliable, and absolute times are meaningless.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fedloom.engines import ENGINES
from fedloom.engines.processes import cores
from fedloom.errors import ConfigError, UsageError, suggest
from fedloom.experiment.environment import environment
from fedloom.experiment.run_folder import RunFolder
from fedloom.tools.bench import MNIST, W4, WORKLOADS, Workload, machine_roof, measure

RESULTS = Path(__file__).parent / "results"
RIVAL = Path(__file__).with_name("pfllib_style.py")
LARGE: Mapping[str, Workload] = MappingProxyType(
    {
        "clients-10k": Workload(
            title="FedPer, MLP, 100 of 10,000 clients, 60 rows each, heads kept",
            data=MNIST[0],
            input_shape=MNIST[1],
            rows=(10 * MNIST[2][0], 10 * MNIST[2][1]),  # more than the real data set has, so synthetic only
            settings=W4 | {"method": {"name": "fedper"}, "model": {"name": "mlp"}, "clients": 10_000},
            by_clients=True,
        )
    }
)
DEFAULTS: Mapping[str, str] = MappingProxyType(
    {"engine": "", "scale": "0.05", "rounds": "5", "precision": "fp32", "rival": "yes", "out": ""}
)
POLL_S = 0.05


def main(words: Sequence[str]) -> int:
    """Run the requested measurement, write one result file and print its path."""
    options = {**DEFAULTS, **dict(word.split("=", 1) for word in words if "=" in word)}
    for key in options.keys() - DEFAULTS.keys():
        raise ConfigError(f"unknown key '{key}'{suggest(key, DEFAULTS)}")
    names = [word for word in words if "=" not in word]
    of_memory = names[:1] == ["memory"]
    every = {**WORKLOADS, **LARGE}
    chosen = names[1:] if of_memory else names
    for name in chosen:
        if name not in every:
            raise ConfigError(f"no workload is called '{name}'{suggest(name, every)}")
    chosen = chosen or list(WORKLOADS)
    load = [os.getloadavg()[0]]
    found = {name: (memory if of_memory else speed)(every[name], options) for name in chosen}
    load.append(os.getloadavg()[0])
    kind = "memory" if of_memory else "speed"
    content = {"kind": kind, "environment": environment(), "cores": cores(), "load": load, "workloads": found}
    name = options["out"] or f"{kind}-{'-'.join(chosen)}"
    RESULTS.mkdir(exist_ok=True)
    RunFolder(RESULTS).write_json(f"{name}.json", content)
    print(json.dumps(found, indent=2))
    print(RESULTS / f"{name}.json", file=sys.stderr)
    return 0


def engines_of(options: Mapping[str, str]) -> list[str]:
    """Return the requested engines. By default, they are `processes` (with several cores) and `sequential`."""
    many = ["processes"] if cores() > 1 and "processes" in ENGINES else []
    return options["engine"].split(",") if options["engine"] else [*many, "sequential"]


def speed(work: Workload, options: Mapping[str, str]) -> dict[str, Any]:
    """Return the times described in `fedloom.tools.bench.measure`. `rival=no` omits the rival."""
    return measure(
        work,
        engines_of(options),
        scale=float(options["scale"]),
        rounds=int(options["rounds"]),
        precision=options["precision"],
        rivals={RIVAL.stem: f"{RIVAL}:make"} if options["rival"] == "yes" else {},
        roof=machine_roof(),
    )


def memory(work: Workload, options: Mapping[str, str]) -> dict[str, Any]:
    """Return the peak memory in bytes of all processes of an engine (proportional set size, in which shared pages count once)."""
    found: dict[str, Any] = {"title": work.title, "scale": float(options["scale"])}
    for engine in engines_of(options):
        child = get_context("spawn").Process(target=_rounds, args=(work.title, engine, dict(options)))
        child.start()
        found[engine] = {"peak_bytes": _peak(child)}
        if child.exitcode:
            sys.exit(f"benchmarks: {engine} ended with exit code {child.exitcode}")
    return found


def _rounds(title: str, engine: str, options: Mapping[str, str]) -> None:
    work = next(work for work in (*WORKLOADS.values(), *LARGE.values()) if work.title == title)
    scale, rounds = float(options["scale"]), int(options["rounds"])
    try:
        measure(work, [engine], scale=scale, rounds=rounds, precision=options["precision"])
    except UsageError as error:
        sys.exit(f"benchmarks: error: {error}")


def _peak(child: BaseProcess) -> int:
    """Poll a process and its descendants until the process ends, and return their peak memory in bytes."""
    peak = 0
    while child.is_alive():
        peak = max(peak, held(child.pid))
        time.sleep(POLL_S)
    child.join()
    return peak


def held(pid: int | None) -> int:
    """Return the memory in bytes of a process and its descendants."""
    own, below = pss_and_children(pid)
    return own + sum(held(other) for other in below)


def pss_and_children(pid: int | None) -> tuple[int, list[int]]:
    """Return a process's memory in bytes (proportional set size) and its children, or zero if it has ended (Linux)."""
    root = Path(f"/proc/{pid}")
    try:
        pss = next(line for line in (root / "smaps_rollup").read_text().splitlines() if line.startswith("Pss:"))
        below = [int(word) for task in (root / "task").iterdir() for word in (task / "children").read_text().split()]
    except (OSError, StopIteration):
        return 0, []
    return int(pss.split()[1]) * 1024, below


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UsageError as error:
        sys.exit(f"benchmarks: error: {error}")
