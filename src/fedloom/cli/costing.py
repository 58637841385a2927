"""The command `fedloom cost`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from fedloom.cli.tables import show
from fedloom.cli.words import Parser, output, read_values, settings_words
from fedloom.config.settings import make_settings
from fedloom.errors import ConfigError
from fedloom.report import units
from fedloom.report.link_speeds import NETWORKS, Network, networks
from fedloom.tools.bench import machine_roof
from fedloom.tools.edge import TIMED_STEPS, TurnCost, turn_costs

EXAMPLES = """\
  fedloom cost method=fedrir model=fedrir_cnn          scikit-learn's digits, 10 clients
  fedloom cost configs/mnist-fedrir.toml --network 4g,2/10/80
  fedloom cost method=fedvtc models=resnet8,mobilenetv2 width=64 --gflops 20 --memory 4

keys: see fedloom run --help. For each architecture, the client with the most training examples is measured in a separate process on one
thread. The assumed device is a Raspberry Pi 4 (see docs/edge.md); describe another with --gflops and --memory.
"""
PI_GFLOPS, PI_GB = 4.0, 1.0
ROOF_S = 3.0  # in seconds, long enough to include undisturbed milliseconds on a busy machine


def cost_command(words: Sequence[str]) -> int:
    """Run `fedloom cost` and return its exit code."""
    parser = Parser(
        "cost",
        "Measure the cost of a client's local update by phase, and check whether it fits a small device.",
        EXAMPLES,
    )
    settings_words(parser)
    parser.add_argument(
        "--gflops", default=str(PI_GFLOPS), metavar="N", help="speed of the device on one thread, in GFLOP/s [4]"
    )
    parser.add_argument("--memory", default=str(PI_GB), metavar="GB", help="memory of the device [1]")
    parser.add_argument("--network", metavar="NAMES", help=f"{', '.join(NETWORKS)}, or UP/DOWN/LATENCY [all known]")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.read(words)
    gflops, memory = (_above_zero(f"--{key}", getattr(given, key)) for key in ("gflops", "memory"))
    ways = list(NETWORKS.values()) if given.network is None else networks(given.network)
    settings = make_settings(read_values(given.words))
    with Console(stderr=True).status("measuring a client's local update"):
        found = turn_costs(settings)
        slowdown = machine_roof(1, ROOF_S) / 1e9 / gflops
    if given.json:
        print(json.dumps([_facts(one, slowdown, memory, ways) for one in found], indent=2))
        return 0
    for one in found:
        _show(one, slowdown, memory, ways)
    output().print(
        f"device (assumed): {gflops:g} GFLOP/s on one thread, {memory:g} GB. This machine: {slowdown * gflops:.1f} GFLOP/s (measured), "
        f"so device seconds = seconds here x {slowdown:.1f}.\n"
        f"seconds: up to {TIMED_STEPS} steps of each phase are timed and scaled to all steps; "
        "tensors: peak memory of tensors",
        soft_wrap=True,
    )
    return 0


def _above_zero(key: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ConfigError(f"{key} {text}: must be a number above 0")
    return value


def _facts(one: TurnCost, slowdown: float, memory: float, ways: Sequence[Network]) -> Mapping[str, Any]:
    return {
        **asdict(one),
        "phases": [asdict(phase) for phase in one.phases],
        "slowdown": slowdown,
        "fits": one.process_bytes <= memory * 1e9,
        "network_seconds": {way.name: way.seconds(one.uplink_bytes, one.downlink_bytes) for way in ways},
    }


def _show(one: TurnCost, slowdown: float, memory: float, ways: Sequence[Network]) -> None:
    console = output()
    console.print(
        f"{one.method}, {one.model} on {one.data}: client {one.client}, the largest, with {one.rows:,} training examples"
    )
    console.print(f"parameters  {one.parameters:,}, {one.parameters_sent:,} of them sent")
    console.print(f"kept        {units.size(one.kept_bytes)} between rounds")
    times = ", ".join(f"{way.name} {_s(way.seconds(one.uplink_bytes, one.downlink_bytes))}" for way in ways)
    console.print(f"messages    {units.size(one.uplink_bytes)} up, {units.size(one.downlink_bytes)} down: {times}")
    fits = "fits" if one.process_bytes <= memory * 1e9 else "does not fit"
    program = units.size(one.program_bytes)
    peak = f"{units.size(one.process_bytes)} at its peak, including {program} for Python, torch and fedloom"
    console.print(f"process     {peak}: {fits} {memory:g} GB\n")
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("phase")
    for column in ("steps", "GFLOP", "seconds here", "on the device", "tensors"):
        table.add_column(column, justify="right", no_wrap=True)
    for phase in one.phases:
        seconds = (_s(phase.seconds), _s(phase.seconds * slowdown))
        table.add_row(
            phase.name, f"{phase.steps:,}", f"{phase.flops / 1e9:.3g}", *seconds, units.size(phase.tensor_bytes)
        )
    total, flops = sum(phase.seconds for phase in one.phases), sum(phase.flops for phase in one.phases)
    peak = units.size(max(phase.tensor_bytes for phase in one.phases))
    table.add_row("turn", "", f"{flops / 1e9:.3g}", _s(total), _s(total * slowdown), f"{peak} (the largest)")
    show(console, table)
    console.print()


def _s(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else units.duration(seconds)
