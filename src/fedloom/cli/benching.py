"""The command `fedloom bench`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from fedloom.accelerator import find
from fedloom.cli.tables import show
from fedloom.cli.words import Parser, output, refuse_empty
from fedloom.config.parsing import parse_value
from fedloom.config.settings import make_settings
from fedloom.engines import ENGINES
from fedloom.engines.processes import cores
from fedloom.errors import ConfigError, suggest
from fedloom.experiment.environment import environment
from fedloom.methods.registry import load_object
from fedloom.tools.bench import WORKLOADS, check, machine_roof, measure, workload

EXAMPLES = """\
  fedloom bench                                        all workloads at a small scale, on the engines that suit this machine
  fedloom bench w4-mlp engine=sequential,processes,vectorised scale=0.2
  fedloom bench w4-mlp engine=processes,processes:8    workers that train 8 clients side by side (engine.lanes)
  fedloom bench w1 w3 rounds=10 precision=bf16 --json
  fedloom bench device=cuda                            on a GPU; device=cuda precision=tf32 or bf16
  fedloom bench w1 rival=benchmarks/pfllib_style.py:make

workloads (at scale=1):
"""
COLUMNS = (
    "train s",
    "(quartiles)",
    "score s",
    "other s",
    "GFLOP/s",
    "of roof",
    "train",
    "equal work",
    "full evaluation",
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the command, which are written as `key=value`, with their defaults."""

    engine: str = ""
    scale: float = 0.05
    rounds: int = 5
    precision: str = "fp32"
    device: str = "cpu"
    rival: str = ""


KEYS: Mapping[str, str | int | float] = asdict(Options())


def bench_command(words: Sequence[str]) -> int:
    """Run `fedloom bench` and return its exit code."""
    known = "\n".join(f"  {name:<8}  {work.title}" for name, work in WORKLOADS.items())
    parser = Parser("bench", "Compare the speed of the engines on this machine.", EXAMPLES + known, KEYS)
    parser.add_argument("words", nargs="*", metavar="WORKLOAD|key=value", help=f"keys: {', '.join(KEYS)}")
    parser.add_argument("--json", action="store_true", help="print JSON, with versions and hardware")
    given = parser.read(words)
    options = _options([word for word in given.words if "=" in word])
    chosen = {name: workload(name) for name in given.words if "=" not in name} or WORKLOADS
    device = make_settings({"engine": {"device": options.device}}).engine.device
    engines = options.engine.split(",") if options.engine else _default_engines(device)
    rivals = _rivals(options.rival)
    sizes: dict[str, Any] = {
        "scale": options.scale,
        "rounds": options.rounds,
        "precision": options.precision,
        "device": device,
    }
    for work in chosen.values():
        check(work, engines, **sizes)
    roof = machine_roof(device=find(device))
    found = {}
    for name, work in chosen.items():
        found[name] = measure(work, engines, **sizes, rivals=rivals, roof=roof)
        if not given.json:
            _show(name, found[name])
    if given.json:
        print(json.dumps({"environment": environment(), "workloads": found}, indent=2))
    return 0


def _options(words: Sequence[str]) -> Options:
    values: dict[str, Any] = {}
    for word in words:
        key, _, text = word.partition("=")
        if key not in KEYS:
            raise ConfigError(f"unknown key '{key}'{suggest(key, KEYS)}")
        refuse_empty({key: text})
        default = KEYS[key]
        values[key] = text if isinstance(default, str) else _number(key, text, type(default))
    return Options(**values)


def _number(key: str, text: str, kind: type[int | float]) -> int | float:
    value = parse_value(text)
    if type(value) not in (int, float) or not math.isfinite(value) or kind(value) != value:
        raise ConfigError(f"{key}={text}: must be {'an integer' if kind is int else 'a number'}")
    return kind(value)


def _default_engines(device: str) -> list[str]:
    """Return the engines to time by default. On a CPU, `vectorised` is slow for convolutions, so it is timed only on request."""
    if device != "cpu":
        return ["sequential", "vectorised"]
    return ["sequential", "processes"] if cores() > 1 and "processes" in ENGINES else ["sequential"]


def _rivals(where: str) -> Mapping[str, str]:
    if not where:
        return {}
    load_object(where, "rival")  # fails early, with a one-line error
    return {Path(where.rpartition(":")[0]).stem: where}


def _show(name: str, facts: Mapping[str, Any]) -> None:
    console = output()
    size = f"{facts['data']}, scale {facts['scale']:g}: {facts['cohort']} of {facts['clients']} clients"
    roof = f"{facts['train_flop'] / 1e9:.3g} GFLOP a round, roof {facts['roof_flop_per_s'] / 1e9:.0f} GFLOP/s"
    where = f"{facts['cores']} cores" if facts["device"] == "cpu" else facts["device"]
    console.print(f"{name}: {facts['title']}\n{size}; {where}, {facts['precision']}; {roof}")
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column(
        no_wrap=True, min_width=max(map(len, facts["contestants"]))
    )  # keep names whole in narrow terminals
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for contestant, found in facts["contestants"].items():
        table.add_row(contestant, *_row(found))
    show(console, table)
    console.print(
        "last three columns: time relative to the first row, median over interleaved rounds\n", soft_wrap=True
    )


def _row(found: Mapping[str, Any]) -> list[str]:
    train = found["train_s"]
    ratios = (f"{found['times_as_long'][key]['median']:.2f}x" for key in ("train", "equal_work", "as_it_does"))
    return [
        f"{train['median']:.3f}",
        f"{train['low']:.3f}-{train['high']:.3f}",
        f"{found['score_s']['median']:.3f}",
        f"{found['extra_s']['median']:.3f}",
        f"{found['flop_per_s'] / 1e9:.1f}",
        f"{found['share_of_roof']:.0%}",
        *ratios,
    ]
