"""A live line while an experiment runs: rounds, time left, the newest numbers. Plain lines where the output is no terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

QUIET_S = 10.0  # at least so many seconds between two plain lines


class Show(Protocol):
    """Shows how far the work has come; a callback for `Experiment.run`."""

    def __call__(self, done: int, rounds: int, row: Mapping[str, Any], name: str | None = None) -> None:
        """`done` of `rounds`, the newest numbers, and another name from now on."""


@contextmanager
def live(name: str, console: Console | None = None, unit: str = "round") -> Iterator[Show]:
    """Progress on standard error, or on `console`; `unit` is what is counted."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield _plain(name, console, unit)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[numbers]}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        job = bar.add_task(name, total=None, numbers="")

        def show(done: int, rounds: int, row: Mapping[str, Any], name: str | None = None) -> None:
            bar.update(job, completed=done, total=rounds, numbers=numbers(row), description=name)

        yield show


def _plain(title: str, console: Console, unit: str) -> Show:
    last = time.monotonic()

    def show(done: int, rounds: int, row: Mapping[str, Any], name: str | None = None) -> None:
        nonlocal last
        if (done == rounds and "joined" not in row) or time.monotonic() - last >= QUIET_S:
            last = time.monotonic()
            line = f"{name or title}: {unit} {done}/{rounds}  {numbers(row)}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)

    return show


def numbers(row: Mapping[str, Any]) -> str:
    """The newest accuracies in a few words, and what went amiss so far."""
    shown = {"personal": row.get("personal_accuracy"), "server": row.get("server_accuracy")}
    amiss = {name: row.get(name) for name in ("lost", "late", "rejected", "skipped")}
    words = [f"{name} {value:.3f}" for name, value in shown.items() if value is not None]
    words += [f"newcomers {row['joined']}"] if "joined" in row else []
    return "  ".join(words + [f"{name} {value}" for name, value in amiss.items() if value])
