"""Measure the cost of the Ray engine compared with the other engines: messages, rounds of small models, start-up and memory.

Results are written to benchmarks/results/.

    python benchmarks/ray_overhead.py rounds=20 out=ray-overhead                       the path of the result is printed
    python benchmarks/ray_overhead.py clients=100,1000 address=127.0.0.1:6379          on a running cluster

Engines alternate round by round, with the same cohort and the same downlink. Only `Engine.train` is timed. On a busy machine, use the
minimum time, ratios, and processor time, which is summed over this process and its descendants (including Ray's).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from fedloom import Client, Downlink, FedAvg, Round, Stream, from_arrays, tree
from fedloom.config.settings import make_settings
from fedloom.engines import Engine
from fedloom.errors import ConfigError, UsageError, suggest
from fedloom.experiment.environment import environment
from fedloom.experiment.loop import Experiment, GivenObjects
from fedloom.experiment.run_folder import RunFolder
from workloads import RESULTS, held

DEFAULTS: Mapping[str, str] = MappingProxyType(
    {"rounds": "20", "clients": "100,1000,10000", "workers": "2", "address": "", "out": "ray-overhead"}
)
COHORT, FLOATS = 100, 62_500  # 250 kB per message
ROWS, SHAPE, CLASSES = 70, (1, 28, 28), 10  # number of a client's examples, of which 60 are for training
WARM_UP = 3


@dataclass(frozen=True)
class Echo(FedAvg):
    """A method without training. Every client receives a separate message and sends a message of the same size."""

    def phases(self) -> tuple[()]:
        """Return no phases."""
        return ()

    def downlink(self, server: tree.Tree, cohort: Sequence[int], round: Round) -> Downlink:
        """Return a tensor for each member."""
        each = [{"own": torch.full((FLOATS,), float(i))} for i in cohort]
        return Downlink({"weights": server["weights"]}, each)

    def uplink(self, client: Client, received: Any, down: tree.Tree, turn: Any) -> tuple[tree.Tree, tree.Tree]:
        """Return the tensor plus one."""
        return {"own": down["own"] + 1}, client.memory


def main(words: Sequence[str]) -> int:
    """Run the measurements and write one result file."""
    options = {**DEFAULTS, **dict(word.split("=", 1) for word in words)}
    for key in options.keys() - DEFAULTS.keys():
        raise ConfigError(f"unknown key '{key}'{suggest(key, DEFAULTS)}")
    load = [os.getloadavg()[0]]
    found: dict[str, Any] = {"messages": contest(Echo(), 100, ("sequential", "ray"), options)}
    for n in map(int, options["clients"].split(",")):
        found[f"rounds, {n} clients"] = contest(FedAvg(lr=0.05), n, ("sequential", "processes", "ray"), options)
    load.append(os.getloadavg()[0])
    import ray

    facts = {"kind": "ray", "environment": environment() | {"ray": ray.__version__}, "seed": 0, "load": load}
    RESULTS.mkdir(exist_ok=True)
    RunFolder(RESULTS).write_json(f"{options['out']}.json", {**facts, "options": options, "found": found})
    print(json.dumps(found, indent=2))
    print(RESULTS / f"{options['out']}.json", file=sys.stderr)
    return 0


def contest(method: FedAvg, n_clients: int, names: Sequence[str], options: Mapping[str, str]) -> dict[str, Any]:
    """Return each engine's time in seconds per round of 100 clients and for its start, and the memory in bytes of all
    processes afterwards.
    """
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (n_clients * ROWS, *SHAPE), np.uint8)
    parts = GivenObjects(method=method, dataset=from_arrays(x, rng.integers(0, CLASSES, len(x))))
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Any] = {"before": {"held_bytes": held(os.getpid())}}
        runs: dict[str, Experiment] = {}
        try:
            for name in names:  # Ray is last, because it starts threads, and `processes` forks
                runs[name], seconds = timed(lambda name=name: make(parts, n_clients, name, Path(folder), options))
                found[name] = {"start_s": seconds, "held_bytes": held(os.getpid())}
            engines = {name: run.engine for name, run in runs.items()}
            for name, spent in in_turn(engines, runs[names[0]], options).items():
                times, busy = zip(*spent, strict=True)
                found[name] |= {"least_s": min(times), "median_s": float(np.median(times)), "rounds": len(times)}
                found[name] |= {"mean_processor_s": float(np.mean(busy))}
            found["after"] = {"held_bytes": held(os.getpid())}
        finally:
            for run in runs.values():
                run.engine.close()
    return found


def make(parts: GivenObjects, n_clients: int, name: str, folder: Path, options: Mapping[str, str]) -> Experiment:
    """Return an experiment on one engine."""
    engine: dict[str, Any] = {"name": name, "workers": int(options["workers"])}
    if name == "ray" and options["address"]:
        engine["address"] = options["address"]
    values = {"method": {"name": "fedavg"}, "data": {"name": "arrays"}, "model": {"name": "mlp", "hidden": 200}}
    size = {"clients": n_clients, "cohort": COHORT, "partition": {"name": "iid", "test_fraction": 1 / 7}}
    return Experiment(make_settings({**values, **size, "engine": engine, "out": folder / name}), parts)


def in_turn(
    engines: Mapping[str, Engine], run: Experiment, options: Mapping[str, str]
) -> dict[str, list[tuple[float, float]]]:
    """Return the seconds and processor seconds of each engine's rounds. The order of the engines changes from round to round."""
    torch.set_num_threads(1)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    for number in range(WARM_UP + int(options["rounds"])):
        chosen = Stream(0, "cohort", number).permutation(run.problem.task.n_clients)[:COHORT]
        cohort = sorted(chosen.tolist())
        down = run.hooks.downlink(run.server, 0, cohort)
        names = list(engines)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            before = processor_s(os.getpid())
            replies, seconds = timed(lambda name=name: engines[name].train(number, cohort, down))  # noqa: B023
            assert len(replies) == COHORT
            if number >= WARM_UP:
                times[name].append((seconds, processor_s(os.getpid()) - before))
    return times


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """Return the result of a call, and its duration."""
    started = time.perf_counter()
    return work(), time.perf_counter() - started


def processor_s(pid: int) -> float:
    """Return the processor seconds of a process and its descendants (Linux)."""
    root = Path(f"/proc/{pid}")
    try:
        ticks = sum(map(int, (root / "stat").read_text().rpartition(")")[2].split()[11:13]))
        below = [int(word) for task in (root / "task").iterdir() for word in (task / "children").read_text().split()]
    except OSError:  # the process has ended
        return 0.0
    return ticks / os.sysconf("SC_CLK_TCK") + sum(map(processor_s, below))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UsageError as error:
        sys.exit(f"benchmarks: error: {error}")
