"""Comparisons of several methods on the same clients. This module plans the runs and executes them in one folder.

All runs with the same seed share the partition, the initial weights and the cohorts, because these depend only on the seed and on settings
that are the same in the whole comparison. Only the method and its hyper-parameters differ.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import tomli_w

from fedloom import accelerator
from fedloom.config.parsing import read_toml
from fedloom.config.settings import Settings, Values, make_method, make_settings
from fedloom.data.hub_repository import file_name_of
from fedloom.errors import ConfigError, RunFolderError
from fedloom.experiment.build import arithmetic, engine_for, make_dataset, make_federation, make_problem
from fedloom.experiment.lock import FolderLock
from fedloom.experiment.loop import NOTHING, Experiment, GivenObjects, OnRound
from fedloom.experiment.progress import Overall, Show
from fedloom.experiment.run_folder import RunFolder
from fedloom.tools.compare_rows import Row, check_labels, draft, expanded, seeds_of, variant_table

log = logging.getLogger(__name__)

FILE = "compare.toml"
OnRun = Callable[["PlannedRun"], OnRound | None]  # called before a run is prepared
OnStart = Callable[["PlannedRun", Experiment], None]  # called when a run is ready, before its first round


class PlannedRun(NamedTuple):
    """One run of a comparison."""

    label: str
    seed: int
    settings: Settings

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        assert self.settings.out is not None
        return self.settings.out

    @property
    def finished(self) -> bool:
        """Whether the run is finished."""
        return (self.folder / "summary.json").is_file()


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A comparison, with one run for each row and seed. All other settings are in `base`."""

    base: Values
    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    title: str = ""  # text above the table
    reading: str = ""  # text below the table on how to interpret the numbers

    def jobs(self, folder: Path) -> list[PlannedRun]:
        """Return all runs, ordered by seed, so that an interrupted comparison contains complete seeds."""
        return [
            PlannedRun(row.label, seed, self._run_settings(row, seed, folder / f"{row.label}-seed{seed}"))
            for seed in self.seeds
            for row in self.rows
        ]

    def check(self, parts: GivenObjects = NOTHING) -> None:
        """Check the data, partition, model and engine of every row, so that errors are raised before the first run.

        Raises:
            UsageError: a run would raise this error.
        """
        self._check_shared_head()
        dataset = parts.dataset or make_dataset(self._settings(self.rows[0], self.seeds[0]))
        for seed in self.seeds:
            federation = make_federation(self._settings(self.rows[0], seed), dataset, parts.partition)
            for row in self.rows if seed == self.seeds[0] else ():
                settings = self._run_settings(row, seed)
                with arithmetic(settings):
                    problem = make_problem(settings, make_method(settings.method), federation, parts.model)
                    place = accelerator.place(settings.engine.device, settings.engine.device_bytes)
                    engine_for(settings, place, problem).close()

    def toml(self) -> str:
        """Return a config file that reproduces this comparison. It contains every setting."""
        first = self.rows[0]._replace(run={})
        settings = self._settings(first, self.seeds[0]).model_dump(mode="json", exclude_none=True)
        base = {key: value for key, value in settings.items() if key not in ("method", "seed", "label")}
        variants = {row.label: variant_table(row) for row in self.rows}
        told = {key: text for key, text in (("title", self.title), ("reading", self.reading)) if text}
        return tomli_w.dumps({**told, "method": list(variants), "seed": list(self.seeds), **base, "variant": variants})

    def _settings(self, row: Row, seed: int, out: str | Path | None = None) -> Settings:
        own = {**row.run, "method": row.method, "seed": seed, "label": row.label, "out": out}
        return make_settings({**self.base, **own})

    def _run_settings(self, row: Row, seed: int, out: str | Path | None = None) -> Settings:
        """Return the settings of one run, without `eval.shared_head` if its clients share no body."""
        settings = self._settings(row, seed, out)
        if not settings.eval.shared_head or make_method(settings.method).shared_features() is not None:
            return settings
        return settings.model_copy(update={"eval": settings.eval.model_copy(update={"shared_head": False})})

    def _check_shared_head(self) -> None:
        """Log the rows without a shared body if `eval.shared_head` is set. Raise ConfigError if no row has a shared body."""
        if not self._settings(self.rows[0], self.seeds[0]).eval.shared_head:
            return
        lacking = [row.label for row in self.rows if not self._run_settings(row, self.seeds[0]).eval.shared_head]
        if len(lacking) == len(self.rows):
            raise ConfigError("eval.shared_head=true: in no row do clients share a body; remove eval.shared_head")
        if lacking:
            log.warning("eval.shared_head: not for %s, whose clients share no body", ", ".join(lacking))


def plan(values: Mapping[str, Any]) -> Comparison:
    """Return the comparison described by the tables of a config file and `key=value` arguments.

    A comparison has these keys in addition to those of a run:
    * `method`: a list of methods or variants; default: all variants.
    * `method.KEY`: a hyper-parameter of all methods that have it. Several values (`0.1,0.01`, or a list) give one row for each value.
    * A table with the name of a method: hyper-parameters of that method.
    * `variant.NAME`: a separate row, with `method`, hyper-parameters and, optionally, `uplink` and `downlink`.
    * `seed`: a list of seeds.
    * `title`, `reading`: texts above and below the table.

    Raises:
        ConfigError: a key or value is invalid; the message names it and states the allowed values.
    """
    base, drafts = draft(values)
    rows = tuple(row for each in drafts for row in expanded(each))
    check_labels([row.label for row in rows])
    comparison = Comparison(
        base=base,
        rows=rows,
        seeds=seeds_of(values.get("seed", 0)),
        title=_text(values, "title"),
        reading=_text(values, "reading"),
    )
    comparison.jobs(Path())  # refuse settings that no run can have
    return comparison


def progress_of(jobs: Sequence[PlannedRun], shown: Show) -> OnRun:
    """Return a function that maps a run of a comparison to a function that shows the progress of this run and of the comparison."""
    rounds = [job.settings.rounds for job in jobs]

    def on_run(job: PlannedRun) -> OnRound:
        place = jobs.index(job)
        before, name = sum(rounds[:place]), title_of(jobs, job)
        return lambda done, n_rounds, row: shown(done, n_rounds, row, name, Overall(before + done, sum(rounds)))

    return on_run


def title_of(jobs: Sequence[PlannedRun], job: PlannedRun) -> str:
    """Return the position and the name of a run in a comparison, such as `[2/6] fedavg, seed 0`."""
    return f"[{jobs.index(job) + 1}/{len(jobs)}] {job.label}, seed {job.seed}"


def create_folder(comparison: Comparison, out: str | Path | None = None, parts: GivenObjects = NOTHING) -> Path:
    """Create the folder of a comparison. By default, it is in `runs/` and named after the time and the data set.

    `parts` contains objects that replace the data, the model and the partition in the settings.
    """
    settings = comparison._settings(comparison.rows[0], comparison.seeds[0], out)
    comparison.check(parts)
    text = comparison.toml()
    folder = RunFolder.create(settings.out, f"compare-{file_name_of(settings.data.name)}")
    folder.write(FILE, text)
    return folder.path


def create_folders(comparisons: Mapping[str, Comparison], out: str | Path | None = None) -> dict[Path, Comparison]:
    """Create a folder with one folder per comparison, by name. If a comparison is invalid, create nothing."""
    for comparison in comparisons.values():
        comparison.check()
    whole = RunFolder.create(None if out is None else Path(out), "compare").path
    made = {}
    for name, comparison in comparisons.items():
        folder = RunFolder.create(whole / name, name)
        folder.write(FILE, comparison.toml())
        made[folder.path] = comparison
    return made


def reopen(folder: str | Path) -> dict[Path, Comparison]:
    """Return the comparisons in a folder or in its subfolders. `execute` continues them."""
    path = Path(folder)
    inside = sorted(file.parent for file in path.glob(f"*/{FILE}")) if path.is_dir() else []
    if inside and not (path / FILE).is_file():
        return {part: plan(read_toml(part / FILE)) for part in inside}
    if not (path / FILE).is_file():
        if (path / "config.toml").is_file():
            raise RunFolderError(f"{path} is the folder of a single run; continue it with fedloom run --resume {path}")
        raise RunFolderError(f"{path} is not the folder of a comparison: it has no {FILE}")
    return {path: plan(read_toml(path / FILE))}


def execute(
    comparison: Comparison,
    folder: Path,
    on_run: OnRun | None = None,
    on_start: OnStart | None = None,
    accept_changes: bool = False,
    *,
    given: GivenObjects = NOTHING,
) -> list[Path]:
    """Execute the unfinished runs, and return the folders of all runs. An interrupted run resumes from its checkpoint.

    The folder is locked during the execution. For `accept_changes`, see `Experiment.resume`; for `given`, see `create_folder`.
    """
    jobs = comparison.jobs(folder)
    left = [job for job in jobs if not job.finished]
    parts = given if given.dataset or not left else replace(given, dataset=make_dataset(left[0].settings))
    with FolderLock(folder):
        for job in left:
            on_round = on_run(job) if on_run else None
            experiment = prepared(job, parts, accept_changes)
            if on_start:
                on_start(job, experiment)
            experiment.run(on_round)
    return [job.folder for job in jobs]


def prepared(job: PlannedRun, parts: GivenObjects, accept_changes: bool = False) -> Experiment:
    """Return the experiment of an unfinished run: new, or resumed from its checkpoint."""
    if (job.folder / "config.toml").is_file():
        return Experiment.resume(job.folder, parts, accept_changes)
    return Experiment(job.settings, parts)


def _text(values: Mapping[str, Any], key: str) -> str:
    text = values.get(key, "")
    if not isinstance(text, str):
        raise ConfigError(f"{key}={text}: must be text")
    return " ".join(text.split())
