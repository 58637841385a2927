"""Progress of a run: a summary at the start, followed by a live line on a terminal, or by plain lines elsewhere."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fedloom.experiment.costs import pieces
from fedloom.experiment.private import cohort_size
from fedloom.method import trains_of

if TYPE_CHECKING:
    from fedloom.experiment.loop import Experiment

LEAST_S = 10.0  # minimum time between two plain lines for finished rounds
MOST_S = 30.0  # maximum time between any two plain lines
LOOK_S = 5.0  # interval between checks of whether a line is due


class Overall(NamedTuple):
    """The numbers of completed and planned rounds, over all runs of a command."""

    done: int
    planned: int


class Show(Protocol):
    """Displays progress; a callback for `Experiment.run`."""

    def __call__(
        self, done: int, rounds: int, row: Mapping[str, Any], name: str | None = None, overall: Overall | None = None
    ) -> None:
        """Show that `done` of `rounds` rounds are completed, and show the newest metrics.

        Args:
            name: a new name to display from now on.
            overall: the progress of all runs together, from which the remaining time is estimated; default: `done` of `rounds`.
        """


@contextmanager
def live(name: str, console: Console | None = None, unit: str = "round", done: int = 0) -> Iterator[Show]:
    """Show progress on standard error, or on `console`.

    Args:
        name: the name to display.
        unit: the unit of progress.
        done: number of units that a resumed run had already completed.
    """
    console = console or Console(stderr=True)
    if console.is_terminal:
        with _bar(name, console, unit) as show:
            yield show
        return
    lines = PlainLines(name, lambda line: _print(console, line), unit, done)
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=(lines, over), name="fedloom-progress", daemon=True)
    watch.start()
    try:
        yield lines
    finally:
        over.set()
        watch.join()


@contextmanager
def _bar(name: str, console: Console, unit: str) -> Iterator[Show]:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=16),
        TextColumn("{task.fields[place]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[numbers]}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        job = bar.add_task(name, total=None, place="", numbers="")

        def show(
            done: int, rounds: int, row: Mapping[str, Any], name: str | None = None, overall: Overall | None = None
        ) -> None:
            all_done, planned = overall or (done, rounds)
            place = f"{unit} {done}/{rounds}"
            bar.update(job, completed=all_done, total=planned, description=name, place=place, numbers=numbers(row))

        yield show


def _watch(lines: PlainLines, over: threading.Event) -> None:
    while not over.wait(LOOK_S):
        lines.tick()


def _print(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


class PlainLines:
    """Progress as lines of text: at most one per 10 s for finished rounds, and at least one per 30 s."""

    def __init__(
        self,
        name: str,
        write: Callable[[str], None],
        unit: str = "round",
        done: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name, self._write, self._unit, self._clock = name, write, unit, clock
        self._begun = self._last = self._reached = clock()
        self._before = done  # number of units completed before the clock started
        self._overall = Overall(done, 0)
        self._place, self._numbers = "", ""
        self._lock = threading.Lock()

    def __call__(
        self, done: int, rounds: int, row: Mapping[str, Any], name: str | None = None, overall: Overall | None = None
    ) -> None:
        """Show progress as described in `Show`."""
        with self._lock:
            self._name, self._reached = name or self._name, self._clock()
            self._overall = overall or Overall(done, rounds)
            self._place, self._numbers = f"{self._unit} {done}/{rounds}", numbers(row)
            is_last = done == rounds and "joined" not in row
            if is_last or self._clock() - self._last >= LEAST_S:
                self._line()

    def tick(self) -> None:
        """Write a line if it would otherwise become overdue before the next check."""
        with self._lock:
            if self._clock() - self._last > MOST_S - LOOK_S - 1:
                self._line()

    def _line(self) -> None:
        self._last = self._clock()
        parts = [self._place or f"no {self._unit} has finished yet", self._time(), self._numbers]
        self._write(f"{self._name}: " + "  ".join(part for part in parts if part))

    def _time(self) -> str:
        """Return an estimate of the remaining time from the pace so far. A round that takes longer than earlier ones lowers the pace."""
        passed, made = self._last - self._begun, self._overall.done - self._before
        left = self._overall.planned - self._overall.done
        if made <= 0:
            return f"{_duration(passed)} so far"
        reached = self._reached - self._begun
        pace = max(reached / made, passed / (made + 1))
        return f"about {_duration(pace * left - (passed - reached))} left" if left else ""


def _duration(seconds: float) -> str:
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"


def numbers(row: Mapping[str, Any]) -> str:
    """Return as text the newest scores, and the numbers of lost, late and rejected updates and of skipped rounds so far."""
    amiss = {name: row.get(name) for name in ("lost", "late", "rejected", "skipped")}
    words = [_score(view, row) for view in ("personal", "server", "valid")]
    words += [f"newcomers {row['joined']}"] if "joined" in row else []
    return "  ".join([*filter(None, words), *(f"{name} {value}" for name, value in amiss.items() if value)])


def _score(view: str, row: Mapping[str, Any]) -> str:
    """Return a view's primary metric as text, or "" if the row contains none. It is the first metric of the view in the row."""
    key, value = next(((key, value) for key, value in row.items() if key.startswith(f"{view}_")), ("", None))
    if value is None:
        return ""
    name = key.removeprefix(f"{view}_")
    number = f"{value:.3f}" if value == 0 or 0.001 <= value <= 1 else f"{value:.4g}"
    return f"{view} {number}" if name == "accuracy" else f"{view} {name} {number}"


def facts(experiment: Experiment) -> dict[str, str]:
    """Return facts, in words and by topic, about a run that is about to start."""
    settings, task = experiment.settings, experiment.problem.task
    sizes = [experiment.data.n_train(i) for i in range(task.n_clients)]
    done = f", of which {experiment.done} are done" if experiment.done else ""
    return {
        "data": f"{settings.data.name}, {sum(sizes):,} training examples",
        "clients": f"{task.n_clients}, {_cohort(experiment)} in a round",
        "steps": f"about {_steps(experiment, sizes):,} in a round",
        "rounds": f"{experiment.rounds}{done}",
        "engine": type(experiment.engine).__name__.lower(),
        "folder": str(experiment.folder.path),
    }


def _cohort(experiment: Experiment) -> str:
    task, settings = experiment.problem.task, experiment.settings
    if settings.privacy.on:
        return f"about {cohort_size(settings, task.n_clients)}"
    if settings.cohort is None and "-" in str(settings.participation):
        return f"at most {task.max_cohort}"
    return "all" if task.max_cohort == task.n_clients else str(task.max_cohort)


def _steps(experiment: Experiment, sizes: Sequence[int]) -> int:
    """Return the number of optimiser steps of the largest cohort in a round, for clients of average size.

    With privacy, the cohort has the expected size.
    """
    problem = experiment.problem
    steps = 0
    for n, n_clients in Counter(sizes).items():
        for phase in experiment.method.phases():
            trains = len(trains_of([phase]))
            if n and trains:
                steps += n_clients * trains * sum(pieces(phase, problem.plan, n).values())
    return round(steps * cohort_size(experiment.settings, problem.task.n_clients) / problem.task.n_clients)
