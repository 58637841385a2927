"""A run's folder. Files are written during the run, so that nothing is lost if it stops.

`config.toml`, `environment.json` and `partition.json` are written at the start, `checkpoint/` and `clients.parquet` every few rounds, and
`summary.json` at the end. `metrics.jsonl` gets one line per evaluated round, and `events.jsonl` a line if a client is lost, late or
rejected, or a round is skipped. Every file except the two `.jsonl` files is replaced atomically (written to a temporary file, then
renamed), and so is the checkpoint's folder.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch

from fedloom._version import __version__
from fedloom.errors import RunFolderError, WireError
from fedloom.tree import Tree
from fedloom.wire.messages import decode, encode

if TYPE_CHECKING:
    import pandas as pd

LINES = ("metrics.jsonl", "events.jsonl")


DEPLOYED = "federation.json"  # exists if the run's clients and their states are on devices


class RunFolder:
    """The files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path | None, name: str) -> RunFolder:
        """Create a folder: `path`, or one under `runs/` named after the time and `name`.

        Raises:
            RunFolderError: `path` exists and is not an empty folder; nothing is ever overwritten.
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
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            started = any((path / name).is_file() for name in ("config.toml", "compare.toml"))
            hint = f", or continue it with --resume {path}" if started and not (path / "summary.json").is_file() else ""
            raise RunFolderError(f"out={path}: already exists and is not an empty folder; choose another folder{hint}")

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Open an existing run's folder."""
        if not (path / "config.toml").is_file():
            raise RunFolderError(f"{path}: is not a run folder, because it has no config.toml")
        return cls(path)

    # whole files

    def write(self, name: str, text: str) -> None:
        """Replace a text file atomically."""
        beside = self.path / f".{name}.tmp"
        beside.write_text(text, encoding="utf-8")
        beside.replace(self.path / name)

    def write_json(self, name: str, value: Any) -> None:
        """Replace a JSON file atomically."""
        self.write(name, json.dumps(value, indent=2) + "\n")

    def partition(self) -> dict[str, Any]:
        """Return the contents of `partition.json`, or {} if there is none."""
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

    def write_clients(self, table: pd.DataFrame) -> None:
        """Replace `clients.parquet`."""
        beside = self.path / ".clients.parquet.tmp"
        table.to_parquet(beside, index=False)
        beside.replace(self.path / "clients.parquet")

    def read_clients(self, upto: int) -> pd.DataFrame:
        """Return the rows of `clients.parquet` up to round `upto`."""
        import pandas as pd

        file = self.path / "clients.parquet"
        try:
            table = pd.read_parquet(file) if file.is_file() else pd.DataFrame({"round": []})
            return table[table["round"] <= upto]
        except (OSError, ValueError, TypeError, KeyError) as error:  # pyarrow's errors are ValueErrors
            raise RunFolderError(f"{file} cannot be read: {str(error).splitlines()[0]}") from None

    # metrics, line by line

    def append(self, row: Mapping[str, Any], name: str = "metrics.jsonl") -> None:
        """Append a line to `metrics.jsonl` or `events.jsonl`; non-finite numbers become null."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(clean) + "\n")

    def rows(self, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
        """Return the lines of `metrics.jsonl` or `events.jsonl`, without a truncated last line."""
        file = self.path / name
        try:
            text = file.read_text(encoding="utf-8") if file.is_file() else ""
        except (OSError, ValueError) as error:
            raise RunFolderError(f"{file} cannot be read: {error}") from None
        lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return [_row(line, f"line {number} of {file}") for number, line in enumerate(lines, start=1)]

    def keep_rows(self, upto: int) -> list[dict[str, Any]]:
        """Remove the lines and events after round `upto` (they will be written again), and return the remaining lines."""
        kept = {name: [row for row in self.rows(name) if row["round"] <= upto] for name in LINES}
        for name, rows in kept.items():
            if rows or name == LINES[0]:
                self.write(name, "".join(json.dumps(row) + "\n" for row in rows))
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
        """Replace the checkpoint atomically; the previous one stays until the new one is complete and on disk.

        `late`: uplinks in flight, by client; `previous`: the server's tree before its last aggregation, to roll back to.
        """
        new, now, old = (self.path / name for name in (".checkpoint.new", "checkpoint", ".checkpoint.old"))
        shutil.rmtree(new, ignore_errors=True)
        (new / "clients").mkdir(parents=True)
        (new / "server.safetensors").write_bytes(encode(server))
        if previous is not None:
            (new / "previous.safetensors").write_bytes(encode(previous))
        for i, client in clients.items():
            (new / "clients" / f"{i}.safetensors").write_bytes(encode(client))
        for i, message in (late or {}).items():
            (new / "late").mkdir(exist_ok=True)
            (new / "late" / f"{i}.safetensors").write_bytes(encode(message))
        (new / "state.json").write_text(json.dumps(state), encoding="utf-8")
        to_disk()
        if now.exists():  # otherwise `old` is the only complete checkpoint
            shutil.rmtree(old, ignore_errors=True)
            now.rename(old)
        new.rename(now)
        to_disk()
        shutil.rmtree(old, ignore_errors=True)

    def has_checkpoint(self) -> bool:
        """Return whether there is a checkpoint."""
        return self._newest() is not None

    def _newest(self) -> Path | None:
        """Return the newest complete checkpoint; two exist only while one replaces the other."""
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
    """Flush all written files to disk, so that they survive a power failure. An `fsync` per client's file would take 1 to 5 ms each."""
    if hasattr(os, "sync"):  # not on Windows
        os.sync()


def _row(text: str, where: str) -> dict[str, Any]:
    """Parse a JSON object with a round number."""
    try:
        row = json.loads(text)
    except ValueError as error:
        raise RunFolderError(f"{where} cannot be read: {error}") from None
    if not isinstance(row, dict) or type(row.get("round")) is not int:
        raise RunFolderError(f"{where} cannot be read: 'round' is missing or is not an integer")
    return row


def _messages(folder: Path) -> dict[int, Tree]:
    return {int(file.stem): decode(file.read_bytes()) for file in folder.glob("*.safetensors")}


def environment() -> dict[str, Any]:
    """Return versions and hardware, for the run's records."""
    return {
        "fedloom": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _commit() -> str | None:
    """Return the commit of the working copy that this package runs from, or None if there is none."""
    # the package may be in a .venv inside another project's working copy
    tracked = _git("ls-files", "--error-unmatch", Path(__file__).name)
    return _git("rev-parse", "HEAD") if tracked else None


def _git(*words: str) -> str | None:
    """Return git's output in this package's folder, or None if git fails."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
