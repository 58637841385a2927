"""A live line while an experiment runs: rounds, time left, the newest numbers. Plain lines where the output is no terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fedloom.experiment import OnRound

QUIET_S = 10.0  # at least so many seconds between two plain lines


@contextmanager
def live(name: str, console: Console | None = None) -> Iterator[OnRound]:
    """A callback for `Experiment.run` that shows progress on standard error."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield _plain(name, console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[numbers]}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        job = bar.add_task(name, total=None, numbers="")

        def show(done: int, rounds: int, row: Mapping[str, Any]) -> None:
            bar.update(job, completed=done, total=rounds, numbers=numbers(row))

        yield show


def _plain(name: str, console: Console) -> OnRound:
    last = time.monotonic()

    def show(done: int, rounds: int, row: Mapping[str, Any]) -> None:
        nonlocal last
        if done == rounds or time.monotonic() - last >= QUIET_S:
            last = time.monotonic()
            console.print(f"{name}: round {done}/{rounds}  {numbers(row)}", highlight=False)

    return show


def numbers(row: Mapping[str, Any]) -> str:
    """The newest accuracies in a few words."""
    shown = {"personal": row.get("personal_accuracy"), "server": row.get("server_accuracy")}
    return "  ".join(f"{name} {value:.3f}" for name, value in shown.items() if value is not None)
