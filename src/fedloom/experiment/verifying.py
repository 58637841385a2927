"""Verification that the folder of a finished or unfinished run contains exactly what the run wrote. Nothing is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fedloom.errors import ConfigError, RunFolderError
from fedloom.experiment.environment import software_versions
from fedloom.experiment.manifest import MANIFEST, Manifest, file_problems, read_manifest, version_changes
from fedloom.experiment.resuming import changed_settings
from fedloom.experiment.run_folder import RunFolder
from fedloom.experiment.signing import check_signature


@dataclass(kw_only=True)
class Verdict:
    """The result for one run folder."""

    problems: list[str] = field(default_factory=list)  # missing, damaged or edited files, with one line for each
    notes: list[str] = field(default_factory=list)  # differences from this installation, and changes that were accepted
    digest: str = ""  # digest of the manifest
    state: str = ""  # the state of the run, such as "finished, round 20"
    signer: str = ""  # the fingerprint of the key, if there is a signature


def verify(path: str | Path, key: str | Path | None = None) -> Verdict:
    """Check a run folder against its manifests. `key` is a file with the public key that must have signed the run.

    Raises:
        RunFolderError: the folder is not a run folder.
        ConfigError: a signature cannot be checked, because 'cryptography' is not installed or `key` is not a public key.
    """
    folder, verdict = RunFolder.open(Path(path)), Verdict()
    try:
        saved = folder.newest_manifest()
        finished = any((folder.path / name).exists() for name in ("summary.json", MANIFEST))
        record = read_manifest(folder.path / MANIFEST) if finished else saved
        if record is None:
            reason = (
                "an earlier version wrote it"
                if finished or folder.has_checkpoint()
                else "no checkpoint has been written yet"
            )
            raise RunFolderError(f"{folder.path} has no manifest ({reason}), so it cannot be verified")
        verdict.digest, verdict.state = (
            record["digest"],
            f"{'finished' if finished else 'unfinished'}, round {record['round']}",
        )
        _collect(verdict, lambda: _problems(folder, record, saved, finished))
        verdict.notes += _notes(record)
        verdict.signer = check_signature(folder.path, record["digest"], key)
    except RunFolderError as error:
        verdict.problems.append(str(error))
    return verdict


def run_folders(path: Path) -> list[Path]:
    """Return the run folders at or below a path. Raise RunFolderError if there are none."""
    patterns = ("config.toml", "*/config.toml", "*/*/config.toml")  # of a run, a comparison, or several comparisons
    found = next((files for pattern in patterns if (files := sorted(path.glob(pattern)))), [])
    if not found:
        raise RunFolderError(f"{path} is neither a run folder (config.toml is missing) nor a folder of run folders")
    return [file.parent for file in found]


def _collect(verdict: Verdict, find: Callable[[], Iterator[str]]) -> None:
    """Add all problems that `find` yields and, if its search ends with an error, this error."""
    try:
        for problem in find():
            verdict.problems.append(problem)
    except RunFolderError as error:
        verdict.problems.append(str(error))


def _problems(folder: RunFolder, record: Manifest, saved: Manifest | None, finished: bool) -> Iterator[str]:
    try:
        strict, free = changed_settings(folder, record)
    except ConfigError as error:
        strict, free = [str(error)], []
    for change in [*strict, *free] if finished else strict:  # some settings may change before a resume
        yield f"{folder.path / 'config.toml'} was edited: {change}"
    if finished:
        yield from file_problems(folder.path, {"summary.json": record["finish"]["summary"]})
        if record["previous"] != (saved["digest"] if saved else None):
            yield f"{folder.path / 'checkpoint'} is missing, or is not the last checkpoint of this run"
        elif saved:
            yield from folder.checkpoint_problems(saved)
    yield from folder.problems(record)


def _notes(record: Manifest) -> list[str]:
    """Return the differences from the versions of this installation, and the changes that were accepted when the run was resumed."""
    strict, free = version_changes(software_versions(), record["versions"])
    accepted = [f"resumed in round {one['round']}: {change}" for one in record["resumed"] for change in one["accepted"]]
    return [f"written with versions that differ from this installation: {', '.join([*strict, *free])}"] * bool(
        strict or free
    ) + accepted
