"""The folder of a tuning: create it, run the candidates that have not run yet, and write the results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import tomli_w

from fedloom.config.parsing import read_toml
from fedloom.config.settings import make_settings
from fedloom.data.hub_repository import file_name_of
from fedloom.errors import RunFolderError
from fedloom.experiment.build import make_dataset
from fedloom.experiment.lock import FolderLock
from fedloom.experiment.loop import NOTHING, GivenObjects
from fedloom.experiment.run_folder import RunFolder
from fedloom.tools.tuning.cells import Cells, OnRun, Tried
from fedloom.tools.tuning.plan import Tuning, plan_tuning
from fedloom.tools.tuning.results import write_results
from fedloom.tools.tuning.search import SEARCHES, import_optuna

FILE = "tune.toml"


def create_tuning(tuning: Tuning, out: str | Path | None = None, parts: GivenObjects = NOTHING) -> Path:
    """Check a tuning, create its folder, and return the path. Default: a folder in `runs/`, named after the time and the data set."""
    path = make_settings({"out": out}).out
    if path:
        RunFolder.check_free(path)
    if tuning.rules.search == "tpe":
        import_optuna()
    tuning.check(parts)
    folder = RunFolder.create(path, f"tune-{file_name_of(tuning.settings.data.name)}")
    folder.write(FILE, tomli_w.dumps(tuning.values))
    return folder.path


def reopen_tuning(folder: str | Path) -> Tuning:
    """Return the tuning in a folder, for `run_tuning`, which continues it. Raise RunFolderError if the folder contains no tuning."""
    path = Path(folder)
    if not (path / FILE).is_file():
        raise RunFolderError(f"{path} is not the folder of a tuning: it has no {FILE}")
    return plan_tuning(read_toml(path / FILE))


def run_tuning(
    tuning: Tuning,
    folder: Path,
    on_run: OnRun | None = None,
    accept_changes: bool = False,
    *,
    given: GivenObjects = NOTHING,
) -> dict[str, list[Tried]]:
    """Run what has not run yet, write the results and the tuned config file, and return all candidates that were tried, by method.

    The folder is locked during the tuning. `accept_changes` and `given` are as for `fedloom.tools.compare.execute`.
    """
    with FolderLock(folder):
        dataset = given.dataset or make_dataset(tuning.settings)
        cells = Cells(tuning, folder, replace(given, dataset=dataset), on_run=on_run, accept_changes=accept_changes)
        tried = {
            contender.label: SEARCHES[tuning.rules.search](tuning, contender, cells) for contender in tuning.contenders
        }
        write_results(tuning, folder, tried, dataset.objective.primary)
    return tried
