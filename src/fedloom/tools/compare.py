"""Comparisons of several methods on the same clients. This module plans the runs and executes them in one folder.

All runs with the same seed share the partition, the initial weights and the cohorts, because these depend only on the seed and on settings
that are the same in the whole comparison. Only the method and its hyper-parameters differ.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import tomli_w

from fedloom import accelerator
from fedloom.config.hints import near_keys
from fedloom.config.parsing import read_toml
from fedloom.config.settings import Named, Settings, Values, make_method, make_settings
from fedloom.data.hub_repository import file_name_of
from fedloom.errors import ConfigError, RunFolderError, suggest
from fedloom.experiment.build import arithmetic, engine_for, make_dataset, make_federation, make_problem
from fedloom.experiment.lock import FolderLock
from fedloom.experiment.loop import NOTHING, Experiment, GivenObjects, OnRound
from fedloom.experiment.progress import Overall, Show
from fedloom.experiment.run_folder import RunFolder
from fedloom.methods.registry import METHODS, installed_methods, method_class, no_such_method

log = logging.getLogger(__name__)

FILE = "compare.toml"
OWN_KEYS = ("variant", "title", "reading")  # keys that a comparison has and a run lacks
VARIED = ("uplink", "downlink")  # settings of the run that may differ between rows
OnRun = Callable[["PlannedRun"], OnRound | None]  # called before a run is prepared
OnStart = Callable[["PlannedRun", Experiment], None]  # called when a run is ready, before its first round


class Row(NamedTuple):
    """One row of the comparison's table."""

    label: str
    method: Values  # `name` and all hyper-parameters of the method
    run: Values = {}  # settings of the run that only this row has; they must be in VARIED


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
        variants = {row.label: _table(row) for row in self.rows}
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
    * `method.KEY`: a hyper-parameter of all methods that have it.
    * A table with the name of a method: hyper-parameters of that method.
    * `variant.NAME`: a separate row, with `method`, hyper-parameters and, optionally, `uplink` and `downlink`.
    * `seed`: a list of seeds.
    * `title`, `reading`: texts above and below the table.

    Raises:
        ConfigError: a key or value is invalid; the message names it and states the allowed values.
    """
    table = values.get("method", {})
    table = table if isinstance(table, Mapping) else {"name": table}
    variants = _tables(values.get("variant", {}), "variant")
    names = _listed(table.get("name", list(variants)), "method")
    if not names:
        _split(values, set(METHODS))  # raises for an unknown key, such as `methods`, which is a likelier mistake
        raise ConfigError(
            "method: must name the methods to compare, such as method=fedavg,fedrir; [variant.NAME] tables add variants"
        )
    base, own = _split(
        values, {*METHODS, *map(_label, names), *(_label(str(v.get("method"))) for v in variants.values())}
    )
    common = {key: value for key, value in table.items() if key != "name"}
    rows = tuple(_spelt_out(_row(name, common, own, variants)) for name in names)
    _check_common(common, rows)
    _check_labels([row.label for row in rows])
    comparison = Comparison(
        base=base,
        rows=rows,
        seeds=_seeds(values.get("seed", 0)),
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
            started = (job.folder / "config.toml").is_file()
            resumed = Experiment.resume(job.folder, parts, accept_changes) if started else None
            experiment = resumed or Experiment(job.settings, parts)
            if on_start:
                on_start(job, experiment)
            experiment.run(on_round)
    return [job.folder for job in jobs]


def _row(name: str, common: Values, own: Mapping[str, Values], variants: Mapping[str, Values]) -> Row:
    variant = dict(variants.get(name, {}))
    method = variant.pop("method", name)
    run = {key: variant.pop(key) for key in VARIED if key in variant}
    if name in variants:
        _check_variant(name, method)
    elif ":" not in name and "+" not in name and name not in METHODS and name not in installed_methods():
        raise ConfigError(no_such_method(name, variants))
    shared = {key: value for key, value in common.items() if key in _fields(method)}
    table = own.get(_label(method), {})
    _check_keys(_label(method), method, table)
    _check_keys(f"variant.{name}", method, variant)
    return Row(_label(name), {"name": method, **shared, **table, **variant}, run)


def _table(row: Row) -> Values:
    """Return a row as a table `[variant.NAME]`. Values that are None are omitted, because they are defaults and TOML has no None."""
    own = {key: value for key, value in {**row.method, **row.run}.items() if key != "name" and value is not None}
    return {"method": row.method["name"], **own}


def _check_variant(name: str, method: Any) -> None:
    if not isinstance(method, str):
        raise ConfigError(f"variant.{name}.method={method}: must be the name of a method")
    if method == name and name not in METHODS:
        raise ConfigError(f'variant.{name}: has no method; set method = "...", the method that it varies')
    try:
        method_class(method)
    except ConfigError as error:
        raise ConfigError(f"variant.{name}.{error}") from None


def _check_keys(where: str, method: str, table: Values) -> None:
    fields = _fields(method)
    for key in table.keys() - fields:
        hint = (
            "; it is a setting of the run, and the same for all rows"
            if key in Settings.model_fields
            else suggest(key, fields)
        )
        raise ConfigError(f"{where}.{key}: {method} has no such hyper-parameter{hint}")


def _label(name: str) -> str:
    return name.rpartition(":")[2]


def _fields(method: str) -> set[str]:
    return {field.name for field in dataclasses.fields(method_class(method))}


def _split(values: Mapping[str, Any], methods: set[str]) -> tuple[Values, dict[str, Values]]:
    """Return the settings of the runs, and the tables of methods by name. The name of the table for `my.py:Mine` is `Mine`."""
    if "label" in values:
        raise ConfigError(
            f"label={values['label']}: cannot be set, because each row is named after its method; use [variant.NAME] for another name"
        )
    rest = {
        key: value
        for key, value in values.items()
        if key not in ("method", "seed", "variant", "out", "title", "reading")
    }
    base = {key: value for key, value in rest.items() if key in Settings.model_fields}
    own = {key: value for key, value in rest.items() if key not in base and key in methods}
    for key in rest.keys() - base.keys() - own.keys():
        raise ConfigError(f"unknown key '{key}'{near_keys(key, [*Settings.model_fields, *OWN_KEYS, *methods])}")
    return base, _tables(own, "")


def _tables(tables: Any, where: str) -> dict[str, Values]:
    prefix = f"{where}." if where else ""
    if not isinstance(tables, Mapping):
        raise ConfigError(f"{where}={tables}: must consist of tables, such as [{prefix}NAME]")
    for name, table in tables.items():
        if not isinstance(table, Mapping):
            raise ConfigError(f"{prefix}{name}={table}: is a table; set {prefix}{name}.KEY=VALUE")
    return {name: dict(table) for name, table in tables.items()}


def _listed(value: Any, key: str) -> list[Any]:
    """Return `a,b`, `[a, b]` or `a` as a list."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    found = list(value) if isinstance(value, Sequence) else [value]
    if key == "method" and not all(isinstance(name, str) for name in found):
        raise ConfigError(f"method={value}: must be names of methods")
    return found


def _text(values: Mapping[str, Any], key: str) -> str:
    text = values.get(key, "")
    if not isinstance(text, str):
        raise ConfigError(f"{key}={text}: must be text")
    return " ".join(text.split())


def _seeds(value: Any) -> tuple[int, ...]:
    listed = _listed(value, "seed")
    seeds = [int(seed) if isinstance(seed, str) and seed.isdecimal() else seed for seed in listed]
    if not seeds or any(type(seed) is not int or seed < 0 for seed in seeds) or len(set(seeds)) < len(seeds):
        shown = ",".join(map(str, listed))
        raise ConfigError(f"seed={shown}: must be distinct integers of at least 0, such as seed=0,1,2")
    return tuple(seeds)


def _check_common(common: Values, rows: Sequence[Row]) -> None:
    for key in common:
        if not any(key in row.method for row in rows):
            fields = sorted(set[str]().union(*(_fields(row.method["name"]) for row in rows)))
            names = ", ".join(dict.fromkeys(row.method["name"] for row in rows))
            raise ConfigError(f"method.{key}: none of {names} has this hyper-parameter{suggest(key, fields)}")


def _check_labels(labels: Sequence[str]) -> None:
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"method: '{label}' is given twice; name the second one with [variant.NAME]")
        if not re.fullmatch(r"\w[\w.+-]*", label):
            raise ConfigError(f"variant.{label}: a name may contain only letters, digits and _ . + -")


def _spelt_out(row: Row) -> Row:
    """Return the row with all hyper-parameters, so that a resumed comparison does not depend on later changes of default values."""
    method = make_method(Named(**row.method))
    return row._replace(method={"name": row.method["name"], **dataclasses.asdict(method)})
