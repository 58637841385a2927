"""A run's folder. Files are written during the run, so that nothing is lost if the run stops.

`config.toml`, `environment.json`, `partition.json` and `preprocess.json` are written at the start, `checkpoint/` and `clients.parquet`
every few rounds, and `summary.json` at the end. `manifest.json` in `checkpoint/` and, at the end, in the folder itself contains hashes of
all of these files (`fedloom.experiment.manifest`). One line per evaluated round is added to `metrics.jsonl`. A line is added to
`events.jsonl` if a client is lost, late or rejected, or if a round is skipped. Every file except the two `.jsonl` files is replaced
atomically (written to a temporary file, which is then renamed), and so is the folder of the checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedloom.errors import RunFolderError, WireError, first_line
from fedloom.experiment import manifest
from fedloom.experiment.lock import LOCK, FolderLock
from fedloom.experiment.manifest import MANIFEST, Manifest, Tally
from fedloom.tree import Tree
from fedloom.wire.messages import decode, encode

if TYPE_CHECKING:
    import pandas as pd

    from fedloom.experiment.resuming import Resumption

LINES = ("metrics.jsonl", "events.jsonl")
CLIENTS = "clients.parquet"


DEPLOYED = "federation.json"  # exists if the run's clients and their states are on devices


class RunFolder:
    """The files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.facts: Mapping[str, Any] = {}  # the facts on which the run depends, for its manifests
        self._digest: str | None = None  # digest of the newest checkpoint's manifest
        self._tallies = {name: Tally() for name in LINES}  # tallies of the rows written so far
        self._clients = Tally()
        self._lock: FolderLock | None = None
        self.resumption: Resumption | None = None  # the checks of a run that is being resumed

    @classmethod
    def create(cls, path: Path | None, name: str) -> RunFolder:
        """Create a folder: `path`, or one under `runs/` named after the time and `name`.

        Raises:
            RunFolderError: `path` exists and is not an empty folder. Nothing is ever overwritten.
        """
        if path is None:
            stem = Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{name}"
            tries = (stem if n == 1 else stem.with_name(f"{stem.name}-{n}") for n in range(1, 1000))
            path = next(candidate for candidate in tries if not candidate.exists())
        cls.check_free(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(f"out={path}: {error.strerror}") from None
        return cls(path)

    @staticmethod
    def check_free(path: Path) -> None:
        """Raise RunFolderError if a new run cannot be written to `path`."""
        if path.exists() and (not path.is_dir() or any(file.name != LOCK for file in path.iterdir())):
            started = any((path / name).is_file() for name in ("config.toml", "compare.toml"))
            hint = f", or resume it with --resume {path}" if started and not (path / "summary.json").is_file() else ""
            state = "already exists and is not an empty folder" if path.is_dir() else "is a file"
            raise RunFolderError(f"out={path}: {state}; choose another folder{hint}")

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Open an existing run's folder."""
        if not (path / "config.toml").is_file():
            raise RunFolderError(f"{path} is not a run folder, because {cls._lack(path)}")
        return cls(path)

    @staticmethod
    def _lack(path: Path) -> str:
        """Return the reason why `path` is not a run folder, and which folder may be meant."""
        if not path.exists():
            return "it does not exist"
        if path.is_file():
            return (
                f"it is a file{f'; give its folder, {path.parent}' if (path.parent / 'config.toml').is_file() else ''}"
            )
        several = (path / "compare.toml").is_file() or any(path.glob("*/config.toml"))
        return f"it has no config.toml{'; give one of the run folders in it' if several else ''}"

    def lock(self) -> None:
        """Lock the folder for writing until `unlock`. Raise RunFolderError if it is already being written."""
        self._lock = FolderLock(self.path)

    def unlock(self) -> None:
        """Release the lock."""
        if self._lock:
            self._lock.release()

    # whole files

    def write(self, name: str, text: str) -> None:
        """Replace a text file atomically."""
        beside = self.path / f".{name}.tmp"
        beside.write_bytes(text.encode())
        beside.replace(self.path / name)

    def write_json(self, name: str, value: Any) -> None:
        """Replace a JSON file atomically."""
        self.write(name, json.dumps(value, indent=2) + "\n")

    def partition(self) -> dict[str, Any]:
        """Return the contents of `partition.json`, or {} if there is no such file."""
        file = self.path / "partition.json"
        try:
            return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}
        except (OSError, ValueError, TypeError) as error:
            raise RunFolderError(f"{file} cannot be read: {error}") from None

    def summary(self) -> dict[str, Any]:
        """Return the contents of `summary.json`, or {} before the run is finished."""
        path = self.path / "summary.json"
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return found

    def write_clients(self, table: pd.DataFrame, rows: Sequence[Mapping[str, Any]] = ()) -> None:
        """Replace `clients.parquet`. `rows` are the rows of the table, for the manifest. Earlier rows must not have changed."""
        for row in rows[self._clients.count :]:
            self._clients.add(manifest.client_line(row))
        beside = self.path / f".{CLIENTS}.tmp"
        table.to_parquet(beside, index=False)
        beside.replace(self.path / CLIENTS)

    def read_clients(self, upto: float) -> pd.DataFrame:
        """Return the rows of `clients.parquet` up to round `upto`."""
        import pandas as pd

        file = self.path / CLIENTS
        try:
            table = pd.read_parquet(file) if file.is_file() else pd.DataFrame({"round": []})
            return table[table["round"] <= upto]
        except (OSError, ValueError, TypeError, KeyError) as error:  # pyarrow's errors are ValueErrors
            raise RunFolderError(f"{file} cannot be read: {first_line(error)}") from None

    # metrics, line by line

    def append(self, row: Mapping[str, Any], name: str = "metrics.jsonl") -> None:
        """Append a line to `metrics.jsonl` or `events.jsonl`. Non-finite numbers become null."""
        line = manifest.line_of(row)
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        self._tallies[name].add(line)

    def rows(self, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
        """Return the lines of `metrics.jsonl` or `events.jsonl`. A truncated last line is omitted."""
        file = self.path / name
        try:
            text = file.read_text(encoding="utf-8") if file.is_file() else ""
        except (OSError, ValueError) as error:
            raise RunFolderError(f"{file} cannot be read: {error}") from None
        lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return [_row(line, f"line {number} of {file}") for number, line in enumerate(lines, start=1)]

    def keep_rows(self, upto: int) -> list[dict[str, Any]]:
        """Remove the lines and events after round `upto`, which will be written again, and return the remaining lines."""
        kept = {name: [row for row in self.rows(name) if row["round"] <= upto] for name in LINES}
        for name, rows in kept.items():
            lines = [manifest.line_of(row) for row in rows]
            self._tallies[name] = Tally(lines)
            if rows or name == LINES[0]:
                self.write(name, "".join(line + "\n" for line in lines))
            else:
                (self.path / name).unlink(missing_ok=True)
        return kept[LINES[0]]

    # checkpoint

    def save_checkpoint(
        self,
        state: Mapping[str, Any],
        server: Tree,
        clients: Mapping[int, Tree],
        late: Mapping[int, Tree] | None = None,
        previous: Tree | None = None,
    ) -> None:
        """Replace the checkpoint atomically. The previous checkpoint remains until the new one is complete and on disk.

        `late` contains the uplinks in flight, by client. `previous` is the server's tree before its last aggregation, for a rollback.
        """
        new, now, old = (self.path / name for name in (".checkpoint.new", "checkpoint", ".checkpoint.old"))
        messages = {"server": server, **{f"clients/{i}": client for i, client in clients.items()}}
        messages |= {f"late/{i}": message for i, message in (late or {}).items()}
        messages |= {} if previous is None else {"previous": previous}
        files = dict[str, list[Any]]()

        def put(name: str, data: bytes) -> None:
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            (new / name).write_bytes(data)
            files[name] = manifest.entry(data)

        shutil.rmtree(new, ignore_errors=True)
        (new / "clients").mkdir(parents=True)
        for name, message in messages.items():
            put(f"{name}.safetensors", encode(message))
        put("state.json", json.dumps(state).encode())
        record = self._manifest(state["round"], files=files, changed=sorted(clients))
        (new / MANIFEST).write_text(manifest.to_text(record), encoding="utf-8")
        to_disk()
        if now.exists():  # otherwise `old` is the only complete checkpoint
            shutil.rmtree(old, ignore_errors=True)
            now.rename(old)
        new.rename(now)
        to_disk()
        shutil.rmtree(old, ignore_errors=True)
        self._digest = record["digest"]

    def finish(self, summary: Mapping[str, Any], rounds: int) -> None:
        """Write the manifest of the finished run, which contains the digest of the checkpoint's manifest, and `summary.json`."""
        text = json.dumps(summary, indent=2) + "\n"
        finish = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "summary": manifest.entry(text.encode())}
        self.write(MANIFEST, manifest.to_text(self._manifest(rounds, finish=finish)))
        self.write("summary.json", text)

    def _manifest(self, number: int, **what: Any) -> Manifest:
        rows = {name: tally.entry() for name, tally in self._tallies.items()} | {CLIENTS: self._clients.entry()}
        content = {"format": manifest.FORMAT, **self.facts, "round": number, "previous": self._digest, "rows": rows}
        return manifest.sealed(content | what)

    def newest_manifest(self) -> Manifest | None:
        """Return the manifest of the newest checkpoint, or None if there is none. The next manifest refers to it as the previous one."""
        whole = self._newest()
        found = manifest.read_manifest(whole / MANIFEST) if whole else None
        if whole and not found and not (whole / "state.json").is_file():
            raise RunFolderError(f"{whole} has neither {MANIFEST} nor state.json; restore the folder from a copy")
        self._digest = found["digest"] if found else None
        return found

    def problems(self, record: Manifest) -> Iterator[str]:
        """Yield one line for each file that differs from `record`, the manifest of the newest checkpoint or of the finished run."""
        if "files" in record:
            yield from self.checkpoint_problems(record)
        yield from manifest.file_problems(self.path, record["description"])
        last = math.inf if "finish" in record else record["round"]  # an interrupted run may have newer rows
        for name in LINES:
            lines = [manifest.line_of(row) for row in self.rows(name) if row["round"] <= last]
            yield from manifest.row_problem(self.path / name, lines, record["rows"][name], record["round"])
        table = self.read_clients(last).to_dict("records")
        rows = (manifest.client_line({str(k): v for k, v in row.items()}) for row in table)
        yield from manifest.row_problem(self.path / CLIENTS, rows, record["rows"][CLIENTS], record["round"])

    def checkpoint_problems(self, record: Manifest) -> Iterator[str]:
        """Yield one line for each file of the newest checkpoint that differs from its manifest `record`."""
        if whole := self._newest():
            yield from manifest.checkpoint_problems(whole, record)

    def has_checkpoint(self) -> bool:
        """Return whether there is a checkpoint."""
        return self._newest() is not None

    def _newest(self) -> Path | None:
        """Return the newest complete checkpoint. Two exist only while one replaces the other."""
        found = (self.path / name for name in ("checkpoint", ".checkpoint.old"))
        return next((folder for folder in found if folder.is_dir()), None)

    def load_checkpoint(self) -> tuple[dict[str, Any], Tree, dict[int, Tree]] | None:
        """Return the newest complete checkpoint (state, server's tree, trees of the changed clients), or None if there is none."""
        whole = self._newest()
        if not whole:
            return None
        try:
            state = _row((whole / "state.json").read_text(encoding="utf-8"), "state.json")
            server = decode((whole / "server.safetensors").read_bytes())
            return state, server, _messages(whole / "clients")
        except (OSError, ValueError, WireError, RunFolderError) as error:
            raise RunFolderError(f"the checkpoint in {whole} cannot be read: {error}") from None

    def load_previous(self) -> Tree | None:
        """Return the server's tree before the last aggregation of the newest complete checkpoint, or None if it was not kept."""
        file = (self._newest() or self.path) / "previous.safetensors"
        try:
            return decode(file.read_bytes()) if file.is_file() else None
        except (OSError, ValueError, WireError) as error:
            raise RunFolderError(f"the checkpoint in {file.parent} cannot be read: {error}") from None

    def load_late(self) -> dict[int, Tree]:
        """Return the uplinks that were in flight at the newest complete checkpoint, by client."""
        whole = self._newest()
        try:
            return _messages(whole / "late") if whole else {}
        except (OSError, ValueError, WireError) as error:
            raise RunFolderError(f"the checkpoint in {whole} cannot be read: {error}") from None


def to_disk() -> None:
    """Flush all written files to disk, so that they survive a power failure.

    An `fsync` for each client's file would take 1 to 5 ms per file.
    """
    if hasattr(os, "sync"):  # not on Windows
        os.sync()


def _row(text: str, where: str) -> dict[str, Any]:
    """Return the JSON object in a line, which must contain a round number."""
    try:
        row = json.loads(text)
    except ValueError as error:
        raise RunFolderError(f"{where} cannot be read: {error}") from None
    if not isinstance(row, dict) or type(row.get("round")) is not int:
        raise RunFolderError(f"{where} cannot be read: 'round' is missing or is not an integer")
    return row


def _messages(folder: Path) -> dict[int, Tree]:
    return {int(file.stem): decode(file.read_bytes()) for file in folder.glob("*.safetensors")}
