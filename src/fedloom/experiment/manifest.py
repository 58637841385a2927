"""Manifests of run folders. They contain hashes of the files of a run, so that damaged or edited files are found before they are used.

`checkpoint/manifest.json` is written together with its checkpoint, and `manifest.json` at the end of the run. They list files with their
size and hash. For the three files that grow during the run (`metrics.jsonl`, `events.jsonl`, `clients.parquet`), they list the number of
rows up to the manifest's round and the hash of these rows, because the files may contain newer rows than the checkpoint.

All hashes are BLAKE2b with 256 bits. A manifest detects accidental changes, but it contains no secret, so anyone can edit a file and its
manifest (`fedloom.experiment.signing` adds a signature).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

from fedloom.errors import RunFolderError

FORMAT = 1
MANIFEST = "manifest.json"
DESCRIPTION = ("environment.json", "partition.json", "preprocess.json")  # files that do not change during the run

Row = Mapping[str, Any]
Manifest = dict[str, Any]


def hash_of(data: bytes) -> str:
    """Return the hash of the bytes, as hexadecimal digits."""
    return hashlib.blake2b(data, digest_size=32).hexdigest()


def entry(data: bytes) -> list[Any]:
    """Return the entry of a file in a manifest: the size of the file in bytes, and its hash."""
    return [len(data), hash_of(data)]


class Tally:
    """The number of rows so far, and a hash of these rows."""

    def __init__(self, rows: Iterable[str] = ()) -> None:
        self.count = 0
        self._hash = hashlib.blake2b(digest_size=32)
        for row in rows:
            self.add(row)

    def add(self, row: str) -> None:
        """Add the text of one row."""
        self.count += 1
        self._hash.update(row.encode() + b"\n")

    def entry(self) -> list[Any]:
        """Return the entry of a growing file in a manifest: the number of rows in the file, and their hash."""
        return [self.count, self._hash.hexdigest()]


def line_of(row: Row) -> str:
    """Return a row as a line of `metrics.jsonl` or `events.jsonl`. Non-finite numbers become null."""
    return json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()})


def client_line(row: Row) -> str:
    """Return a row of `clients.parquet` as text, without missing values. The text does not depend on the types of the columns."""
    clean = {k: float(v) if isinstance(v, Real) else str(v) for k, v in row.items() if v is not None}
    return json.dumps({k: v for k, v in clean.items() if v == v}, sort_keys=True)  # NaN is a missing value


def canonical(value: Any) -> bytes:
    """Return JSON text without spaces and with sorted keys, for hashing."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def sealed(content: Mapping[str, Any]) -> Manifest:
    """Return the content of a manifest, with its digest added."""
    return {**content, "digest": hash_of(canonical(content))}


def combined_digest(digests: Mapping[str, str]) -> str:
    """Return one digest for several runs. `digests` contains the digest of each run by the path of its folder."""
    return hash_of(canonical(digests))


def to_text(manifest: Manifest) -> str:
    """Return a manifest as the text of its file."""
    return json.dumps(manifest, indent=1) + "\n"


def read_manifest(file: Path) -> Manifest | None:
    """Return the manifest in a file, or None if there is no such file.

    Raises:
        RunFolderError: the file was damaged or edited, or has the format of a newer version.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{file} cannot be read: {error}") from None
    if isinstance(found, dict) and found.get("format", FORMAT) != FORMAT:
        raise RunFolderError(
            f"{file} has format {found['format']}, but this version reads only {FORMAT}; upgrade fedloom"
        )
    if not isinstance(found, dict) or found != sealed({k: v for k, v in found.items() if k != "digest"}):
        raise RunFolderError(f"{file} was changed after the run wrote it; restore the file from a copy of the folder")
    return found


def file_problems(folder: Path, files: Mapping[str, Any]) -> Iterator[str]:
    """Yield one line for each file in `folder` that is missing or differs from its entry."""
    for name, wanted in files.items():
        file = folder / name
        try:
            data = file.read_bytes()
        except OSError as error:
            yield f"{file} is missing" if isinstance(error, FileNotFoundError) else f"{file} cannot be read: {error}"
            continue
        if len(data) != wanted[0]:
            yield f"{file} has {len(data)} bytes instead of {wanted[0]}"
        elif hash_of(data) != wanted[1]:
            yield f"{file} was changed after the run wrote it (its hash differs)"


def checkpoint_problems(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Yield one line for each file of the checkpoint in `folder` that is missing, unexpected or damaged."""
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    for name in sorted(there - manifest["files"].keys() - {MANIFEST}):
        yield f"{folder / name} does not belong to this checkpoint"
    yield from file_problems(folder, manifest["files"])
    clients = sorted(int(Path(name).stem) for name in manifest["files"] if name.startswith("clients/"))
    if clients != manifest["changed"]:
        yield f"{folder / MANIFEST} lists clients {manifest['changed']}, but has files of clients {clients}"


def row_problem(file: Path, rows: Iterable[str], wanted: list[Any], upto: int) -> Iterator[str]:
    """Yield one line if the rows of a growing file, up to round `upto`, differ from their entry."""
    found = Tally(rows).entry()
    if found[0] != wanted[0]:
        yield f"{file} has {found[0]} rows up to round {upto} instead of {wanted[0]}"
    elif found != wanted:
        yield f"{file}: rows up to round {upto} were changed after the run wrote them"


# differences between the start of a run and now


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested table as a flat one with dotted names."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


FREE = (
    "eval",
    "eval_every",
    "log",
    "engine",
    "checkpoint_every",
    "out",
    "label",
    "stop",
)  # settings that may change at a resume


def config_changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Compare two tables of settings. Return the changes that must be accepted and those that are allowed, one line each."""
    old, new = flat(then), flat(now)
    strict, free = list[str](), list[str]()
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if before == after:
            continue
        allowed = key.partition(".")[0] in FREE or (key == "rounds" and after is not None and after > before)
        (free if allowed else strict).append(f"{key}={after} (was {before})")
    return strict, free


def version_changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Compare versions. Return the differences that must be accepted (fedloom's or torch's major or minor version) and all others."""
    strict, free = list[str](), list[str]()
    for key in now:
        before, after = then.get(key), now[key]
        if before == after:
            continue
        major = key in ("fedloom", "torch") and str(before).split(".")[:2] != str(after).split(".")[:2]
        (strict if major else free).append(f"{key} {after} (was {before})")
    return strict, free


def code_changes(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return the source files that differ, one line each."""
    return [
        f"{file} was {'added' if file not in then else 'removed' if file not in now else 'changed'}"
        for file in sorted(then.keys() | now.keys())
        if then.get(file) != now.get(file)
    ]
