"""The command `fedloom export`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from fedloom.cli.tables import show
from fedloom.cli.words import Parser, output
from fedloom.errors import ConfigError
from fedloom.experiment.loop import Experiment
from fedloom.report import units
from fedloom.tools.export import BATCH, Exported, export_client, needs, targets

EXAMPLES = """\
  fedloom export runs/mine                             personal model of client 0, written to runs/mine/export
  fedloom export runs/mine --client 3,7 --out models   client-3.onnx and client-7.onnx, and their weights as safetensors
  fedloom export runs/mine --all --json

needs: pip install 'fedloom[export]'
"""
COLUMNS = ("file", "parameters", "same class", "difference")
TIMES = (
    "torch\n1 example",
    "onnx\n1 example",
    f"torch\n{BATCH} examples",
    f"onnx\n{BATCH} examples",
    "memory",
    "of it model",
)


def export_command(words: Sequence[str]) -> int:
    """Run `fedloom export` and return its exit code."""
    parser = Parser(
        "export", "Export personal models of a run as ONNX files, and compare their outputs with torch.", EXAMPLES
    )
    parser.add_argument("run", nargs="?", metavar="RUN", help="a run folder with a checkpoint")
    parser.add_argument("--client", metavar="I,J", help="clients whose models are exported (default: 0)")
    parser.add_argument("--all", action="store_true", help="export the models of all clients")
    parser.add_argument(
        "--out", metavar="FOLDER", help="output folder (default: RUN/export); files are never overwritten"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.read(words)
    if not given.run:
        raise ConfigError("fedloom export: give the folder of a run, such as runs/mine")
    if given.all and given.client is not None:
        raise ConfigError(f"--client {given.client}: conflicts with --all, which exports every client; use one of them")
    needs()
    experiment = Experiment.reopen(given.run)
    n = experiment.data.n_clients  # including clients that joined after training
    clients = list(range(n)) if given.all else _clients("0" if given.client is None else given.client, n)
    files = targets(Path(given.run) / "export" if given.out is None else Path(given.out), clients)
    found: list[Exported] = []
    with Console(stderr=True).status("") as status:
        for i, file in files.items():
            status.update(f"client {i}: {len(found) + 1} of {len(files)}")
            found.append(export_client(experiment, i, file))
    if given.json:
        print(json.dumps([asdict(one) for one in found], indent=2))
    else:
        _show(found, experiment)
    return 0


def _clients(text: str, n: int) -> list[int]:
    chosen = []
    for word in text.split(","):
        if not word.strip().isdecimal() or int(word) >= n:
            raise ConfigError(f"--client {text}: '{word}' is not a client of this run; clients are 0 to {n - 1}")
        chosen.append(int(word))
    return list(dict.fromkeys(chosen))


def _value(one: Exported, experiment: Experiment) -> str:
    if one.value is None:
        return "-"
    return f"{one.value:.1%}" if experiment.data.objective.primary.percent else f"{one.value:.4g}"


def _show(found: Sequence[Exported], experiment: Experiment) -> None:
    console = output()
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("client", vertical="bottom")
    for column in (COLUMNS[0], COLUMNS[1], found[0].metric, *COLUMNS[2:], *TIMES):
        table.add_column(column, justify="right", no_wrap=True, vertical="bottom")
    for one in found:
        seconds = (one.torch_seconds, one.onnx_seconds, one.torch_batch_seconds, one.onnx_batch_seconds)
        table.add_row(
            str(one.client),
            units.size(one.file_bytes),
            f"{one.parameters:,}",
            _value(one, experiment),
            "-" if one.same_answers is None else f"{one.same_answers} of {one.rows}",
            f"{one.difference:.1e}",
            *(f"{1000 * value:.2f} ms" for value in seconds),
            units.size(one.peak_bytes),
            units.size(one.model_bytes),
        )
    show(console, table)
    method, folder = experiment.settings.method.name, Path(found[0].file).parent
    without = ", ".join(str(one.client) for one in found if not one.own_rows)
    rows = "the client's own test examples" + (
        f" (client {without} has none, so on the common test set)" if without else ""
    )
    console.print(
        f"{method} after {experiment.done} rounds; {found[0].metric}, and the difference between the ONNX and torch outputs, "
        f"measured on {rows}. Times are medians with one thread. Memory is the peak of a new ONNX Runtime process for one example.",
        soft_wrap=True,
    )
    console.print(f"folder  {folder}", soft_wrap=True)
