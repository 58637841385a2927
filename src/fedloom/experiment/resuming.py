"""The facts on which a run depends (settings, versions, data, code).

They are recorded in the manifests of the run, and compared when the run is resumed.
"""

from __future__ import annotations

import inspect
import logging
import platform
import secrets
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from fedloom.config.parsing import read_toml
from fedloom.config.settings import Settings, make_settings
from fedloom.data import SOURCES
from fedloom.data.hub import cache_root, local_folder
from fedloom.data.hub_repository import PREFIX
from fedloom.data.preprocess import PREPROCESS, Preprocess
from fedloom.errors import HOME, ConfigError, RunFolderError, is_own_code
from fedloom.experiment.environment import software_versions
from fedloom.experiment.manifest import (
    DESCRIPTION,
    Manifest,
    code_changes,
    config_changes,
    entry,
    hash_of,
    version_changes,
)
from fedloom.experiment.run_folder import RunFolder
from fedloom.inputs import tensors_of
from fedloom.models.zoo import ZOO

if TYPE_CHECKING:
    from fedloom.experiment.loop import Experiment

log = logging.getLogger(__name__)

ACCEPT = "--accept-changes (accept_changes=True in Python)"
SAMPLED: Final = 1000  # number of inputs that are hashed to identify the data


class Resumption:
    """The checks of a run that is to be resumed, and the differences that they found.

    `accepted` contains differences that require `accept`; `noted` contains all others.
    """

    def __init__(self, folder: RunFolder, accept: bool) -> None:
        """Check the files, settings and versions. Objects are checked later, by `check_code` and `check_data`.

        Raises:
            RunFolderError: a file is damaged, or a difference was found and `accept` is false.
        """
        self.folder, self._accept = folder, accept
        self.accepted: list[str] = []
        self.noted: list[str] = []
        self.before = folder.newest_manifest()
        if self.before is None:
            if folder.has_checkpoint():
                found = (
                    "its checkpoint has no manifest.json (earlier versions wrote none), so its files cannot be checked"
                )
                self._refuse_unless_accepted(found, "to use them unchecked,")
            return
        refuse_damage(folder, self.before)
        self._compare("its config.toml was edited", *changed_settings(folder, self.before))
        self._compare("versions differ", *version_changes(self.before["versions"], software_versions()))

    def check_code(self, experiment: Experiment) -> None:
        """Raise RunFolderError if a source file of the method or of a model has changed and changes are not accepted."""
        if self.before:
            self._compare(
                "the code of its method or model", code_changes(self.before["code"], source_hashes(experiment))
            )

    def check_data(self, experiment: Experiment) -> None:
        """Raise RunFolderError if the data differ from the data at the start. Such a difference cannot be accepted."""
        if self.before and _differ(self.before["data"], data_facts(experiment)):
            raise RunFolderError(f"{self.folder.path}: its data differ from those at its start; restore the data")
        file = self.folder.path / PREPROCESS
        if file.is_file() and (changed := Preprocess.read(file).differences(experiment.data.preprocess)):
            raise RunFolderError(
                f"{file}: differs from the data ({', '.join(changed)}); restore the data and the settings data.*"
            )

    def facts(self, experiment: Experiment) -> dict[str, Any]:
        """Return the facts for the manifests from now on, and log the differences."""
        if self.noted or self.accepted:
            log.warning("%s: resumed with changes: %s", self.folder.path, "; ".join([*self.accepted, *self.noted]))
        before = self.before or {}
        this = {
            "round": experiment.done,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "host": platform.node(),
            "versions": software_versions(),
            "accepted": self.accepted,
            "noted": self.noted,
        }
        kept: dict[str, Any] = {key: before[key] for key in ("run", "description") if key in before}
        return {**run_facts(experiment, self.folder), **kept, "resumed": [*before.get("resumed", []), this]}

    def _compare(self, what: str, strict: list[str], free: Iterable[str] = ()) -> None:
        self.noted += free
        if strict:
            self._refuse_unless_accepted(f"{what}: {', '.join(strict)}", "undo this, or")

    def _refuse_unless_accepted(self, found: str, remedy: str) -> None:
        if not self._accept:
            raise RunFolderError(f"{self.folder.path}: {found}; {remedy} resume with {ACCEPT}")
        self.accepted.append(found)


@contextmanager
def resumable(path: str | Path, accept: bool, rounds: int | None = None) -> Iterator[RunFolder]:
    """Lock the folder of a run, check it (see `Resumption`), and yield it. Unlock it after an error.

    `rounds` is a higher number of rounds, to which a finished run is extended.

    Raises:
        RunFolderError: the run is finished, its folder is being written, or a check failed.
    """
    folder = RunFolder.open(Path(path))
    if (folder.path / "summary.json").exists() and rounds is None:
        raise RunFolderError(
            f"{path}: this run is finished; there is nothing to resume (to go on longer, set rounds=N)"
        )
    folder.lock()
    try:
        folder.resumption = Resumption(folder, accept)
        yield folder
    except BaseException:
        folder.unlock()
        raise


def longer(settings: Settings, rounds: int | None, path: str | Path) -> Settings:
    """Return the settings with more rounds. The rounds for `stop.patience` are then counted from the former last round.

    Raise ConfigError if the run cannot be extended.
    """
    if rounds is None:
        return settings
    stopped = RunFolder.open(Path(path)).summary().get("stopped_early")
    done = stopped["round"] if stopped else settings.rounds
    if rounds <= done:
        raise ConfigError(f"rounds={rounds}: {path} has {done} rounds already; give a higher number")
    if settings.join.clients:
        raise ConfigError(f"rounds={rounds}: clients join after the last round (join.clients); start a new run")
    if settings.privacy.on:
        raise ConfigError(f"rounds={rounds}: the privacy budget was set for {settings.rounds} rounds; start a new run")
    stop = settings.stop if settings.stop.patience is None else settings.stop.model_copy(update={"after": done})
    return make_settings(settings.model_dump(exclude_none=True) | {"rounds": rounds, "stop": stop})


def check_longer(experiment: Experiment, before: int) -> None:
    """Raise ConfigError if the run, which had `before` rounds, cannot have more rounds.

    This is so after a final exchange, without a checkpoint, and if the method or the schedule depends on the number of rounds.
    """
    method, rounds, name = experiment.method, experiment.settings.rounds, type(experiment.method).__name__
    if experiment.hooks.finishes and (rounds != before or "stopped_early" in experiment.folder.summary()):
        raise ConfigError(f"rounds={rounds}: {name} has had its final exchange after the last round; start a new run")
    if rounds != before and method.uses_rounds:
        raise ConfigError(f"rounds={rounds}: {name} depends on the number of rounds ({before}); start a new run")
    if rounds != before and experiment.settings.schedule.name == "cosine":
        raise ConfigError(
            f"rounds={rounds}: schedule=cosine depends on the number of rounds ({before}); start a new run"
        )
    if rounds != before and not experiment.folder.has_checkpoint():
        raise ConfigError(
            f"rounds={rounds}: the run has no checkpoint to go on from (checkpoint_every=0); start a new run"
        )


def refuse_damage(folder: RunFolder, record: Manifest) -> None:
    """Raise RunFolderError for the first file that differs from the manifest `record`."""
    problem = next(folder.problems(record), None)
    if problem:
        raise RunFolderError(f"{problem}; restore the file from a copy of the folder")


def changed_settings(folder: RunFolder, manifest: Manifest) -> tuple[list[str], list[str]]:
    """Compare the settings in `config.toml` with those in the manifest (see `config_changes`)."""
    then, now = manifest["config"], read_toml(folder.path / "config.toml")
    try:
        return config_changes(
            *(make_settings(table).model_dump(mode="json", exclude_none=True) for table in (then, now))
        )
    except ConfigError:  # another version wrote one of them
        return config_changes(then, now)


def run_facts(experiment: Experiment, folder: RunFolder) -> dict[str, Any]:
    """Return the facts on which the results of a new run depend, for its manifests."""
    description = {name: folder.path / name for name in DESCRIPTION if (folder.path / name).is_file()}
    return {
        "run": secrets.token_hex(8),
        "versions": software_versions(),
        "config": experiment.settings.model_dump(mode="json", exclude_none=True),
        "partition": experiment.partition.hash(),
        "data": data_facts(experiment),
        "code": source_hashes(experiment),
        "description": {name: entry(file.read_bytes()) for name, file in description.items()},
        "resumed": [],
    }


def data_facts(experiment: Experiment) -> dict[str, Any] | None:
    """Return facts that identify the data, or None if the examples are on devices.

    The facts are the number of examples, the classes, the task, and hashes of the targets and of the first `SAMPLED` inputs.
    """
    if experiment.partition.scheme.get("name") == "devices":
        return None
    dataset = experiment.data.dataset
    labels = dataset.targets.numpy().tobytes()
    content = dataset.objective.content()
    inputs = b"".join(bytes(t[:SAMPLED].contiguous().view(torch.uint8).numpy()) for t in tensors_of(dataset.inputs))
    return {
        "rows": dataset.n_rows,
        "classes": list(dataset.classes),
        "task": {key: value for key, value in content.items() if key not in ("names", "mean", "std")},
        "labels": hash_of(labels),
        "inputs": hash_of(inputs),
    }


def _differ(before: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> bool:
    """Return whether a fact about the data has changed. Facts that an earlier version did not record are not compared."""
    if before is None or now is None:
        return before is not now
    return any(now.get(key) != value for key, value in before.items())


def refuse_missing_objects(path: str | Path, settings: Settings, has: Collection[str], remedy: str) -> None:
    """Raise RunFolderError if a run was started with Python objects that are needed again but are not in `has`."""
    name = settings.data.name.lower().replace("_", "-")
    needed = {
        "data": settings.data.path is None
        and name not in SOURCES
        and not name.startswith(PREFIX)
        and local_folder(name, cache_root()) is None,
        "model": ":" not in settings.model.name and settings.model.name not in ZOO,
        "partition": settings.partition.name == "given",
    }
    missing = [key for key, is_needed in needed.items() if is_needed and key not in has]
    if missing:
        call = f"fedloom.resume(FOLDER, {', '.join(f'{key}=...' for key in missing)})"
        raise RunFolderError(
            f"{path}: the run was started in Python with objects that are not in its folder: {', '.join(missing)}; "
            + remedy.format(call=call)
        )


def source_hashes(experiment: Experiment) -> dict[str, str]:
    """Return the hash of each source file of the method, its bases and its models, by name. Files of other packages are omitted.

    In a script that runs as the main program, only the classes are hashed, because the script itself may change before it resumes the run.
    """
    texts: dict[str, set[bytes]] = {}
    for cls in _classes(experiment):
        try:
            file = Path(inspect.getsourcefile(cls) or "")
            is_main = cls.__module__ == "__main__"
            text = inspect.getsource(cls).encode() if is_main else file.read_bytes()
        except (TypeError, OSError):  # a built-in class, or one from a notebook
            continue
        if file.is_relative_to(HOME):
            texts.setdefault(f"fedloom/{file.relative_to(HOME).as_posix()}", set()).add(text)
        elif is_own_code(str(file)):
            texts.setdefault(f"{file.name}:{cls.__qualname__}" if is_main else file.name, set()).add(text)
    return {name: hash_of(b"".join(sorted(found))) for name, found in sorted(texts.items())}


def _classes(experiment: Experiment) -> Iterator[type]:
    problem = experiment.problem
    modules = [net for arch in range(len(problem.archs)) for net in problem.modules(arch).values()]
    for cls in {type(problem.method), *(type(part) for net in modules for part in net.modules())}:
        yield from cls.__mro__
