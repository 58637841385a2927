"""Comparisons of several methods in Python, `fedloom.compare(...)`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedloom.api.runs import Model, Run, given_objects, reopened
from fedloom.config.parsing import set_dotted
from fedloom.config.settings import Values
from fedloom.data import Dataset
from fedloom.errors import ConfigError
from fedloom.experiment.progress import live
from fedloom.method import Method
from fedloom.methods.registry import METHODS, method_name
from fedloom.tools.compare import create_folder, execute, plan, progress_of

if TYPE_CHECKING:
    import pandas as pd

    from fedloom.report.tables import Grid


@dataclass(frozen=True)
class Compared:
    """The finished runs of several methods with the same partition, initial weights and cohorts.

    `runs` contains the runs by the names of their folders, such as `fedavg-seed0`.
    """

    folder: Path
    runs: Mapping[str, Run] = field(repr=False)

    @property
    def table(self) -> pd.DataFrame:
        """A table with one row per method (mean over seeds) that contains the primary metric (fractions from 0 to 1),
        bytes and seconds.
        """
        from fedloom.report import read
        from fedloom.report.tables import summary_grid

        return _frame(summary_grid(read([run.folder for run in self.runs.values()])))

    @property
    def pairs(self) -> pd.DataFrame:
        """A table with one row per method: its mean difference from FedAvg, or from the first method, with the same seed.

        Positive differences are better. Differences are in percentage points, or in the unit of the metric.
        """
        from fedloom.report import read
        from fedloom.report.tables import paired_grid

        grid = paired_grid(read([run.folder for run in self.runs.values()]))
        if grid is None:
            raise ConfigError("compare: one method cannot be compared; give at least two")
        return _frame(grid)


def compare(
    methods: Sequence[Method | str] | Mapping[str, Method | str],
    *,
    data: Dataset | str = "digits",
    seeds: Sequence[int] = (0,),
    model: Model | str | None = None,
    partition: Any = None,
    progress: bool = True,
    **settings: Any,
) -> Compared:
    """Run several methods on the same data, once per seed, and return the runs.

    Args:
        methods: names (`"fedavg"`, `"my.py:Mine"`), or registered methods as objects (`fedloom.FedRIR(lr=1e-3)`). In a dictionary, the
            keys are the names of the rows.
        data, model, partition, progress: see `fedloom.run`.
        seeds: the seeds.
        settings: settings of `fedloom.run`, which apply to all methods. `out` is the folder of the comparison.

    Raises:
        UsageError: settings are unknown or contradict each other, or data are missing.
    """
    out = settings.pop("out", None)
    if "seed" in settings:
        raise ConfigError(f"seed={settings['seed']}: a comparison takes several seeds; pass seeds=[...]")
    values, parts = given_objects(data, model, partition, settings)
    rows = _rows(methods)
    for key in settings:
        if key.startswith("method.") and any(isinstance(method, Method) for method in _listed(methods)):
            raise ConfigError(f"{key}: a method was given as an object; set the value there, or give names of methods")
    for key, value in {**rows, "seed": list(seeds)}.items():
        set_dotted(values, key, value)
    comparison = plan(values)
    folder = create_folder(comparison, out, parts)
    jobs = comparison.jobs(folder)
    if progress:
        with live("compare", None, done=0) as shown:
            execute(comparison, folder, progress_of(jobs, shown), given=parts)
    else:
        execute(comparison, folder, given=parts)
    return Compared(folder, {job.folder.name: reopened(job.folder, parts) for job in jobs})


def _rows(methods: Sequence[Method | str] | Mapping[str, Method | str]) -> Values:
    """Return the methods in the form of the settings `method` and `variant`."""
    if isinstance(methods, Method):
        raise ConfigError("methods: must be a list of methods, such as ['local', 'fedavg']")
    named = methods if isinstance(methods, Mapping) else _listed(methods)
    rows = named if isinstance(named, Mapping) else {_label(method): method for method in named}
    if len(rows) < len(named):
        raise ConfigError("methods: two methods have the same name; pass a dictionary with a different name for each")
    variants = {label: _variant(method) for label, method in rows.items() if label != method}
    return {"method.name": list(rows), **({"variant": variants} if variants else {})}


def _listed(methods: Any) -> list[Any]:
    if isinstance(methods, str):
        return methods.split(",")
    return list(methods.values() if isinstance(methods, Mapping) else methods)


def _label(method: Method | str) -> str:
    return method_name(type(method)) if isinstance(method, Method) else method


def _variant(method: Method | str) -> Values:
    if isinstance(method, str):
        return {"method": method}
    name = method_name(type(method))
    if name not in METHODS:
        raise ConfigError(f"methods: {name} is not registered; give it as 'my.py:{name}'")
    return {"method": name, **{key: value for key, value in dataclasses.asdict(method).items() if value is not None}}


def _frame(grid: Grid) -> pd.DataFrame:
    """Return a table of a report with numbers instead of text."""
    import pandas as pd

    names = [" ".join(header.split()) for header in grid.headers]
    rows = [[cell.text if i == 0 else cell.value for i, cell in enumerate(row)] for row in grid.rows]
    return pd.DataFrame(rows, columns=names).set_index(names[0])
