"""A run as a folder of files, written as the run goes, so that nothing is lost when it stops.

`config.toml`, `environment.json`, `partition.json` at the start; a line of `metrics.jsonl` per evaluated round; lines of `events.jsonl`
where a client was lost, late or rejected, or a round was skipped; `checkpoint/` and
`clients.parquet` every few rounds; `summary.json` at the end. Every file but those of lines is replaced whole (written beside, then
renamed), and a checkpoint is a folder that is renamed whole.
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


DEPLOYED = "federation.json"  # there where the run's clients, and their states, are on devices


class RunFolder:
    """The files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path | None, name: str) -> RunFolder:
        """A new folder: `path`, or one under `runs/` named for the time and `name`.

        Raises:
            RunFolderError: something is there already; nothing is ever overwritten.
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
        """Raise RunFolderError if a new run cannot be put at `path`."""
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            started = any((path / name).is_file() for name in ("config.toml", "compare.toml"))
            hint = f", or continue it with --resume {path}" if started and not (path / "summary.json").is_file() else ""
            raise RunFolderError(f"out={path}: there is something already; choose another folder{hint}")

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run's folder."""
        if not (path / "config.toml").is_file():
            raise RunFolderError(f"{path} is not a run's folder: it holds no config.toml")
        return cls(path)

    # whole files

    def write(self, name: str, text: str) -> None:
        """Replace a text file in one step."""
        beside = self.path / f".{name}.tmp"
        beside.write_text(text, encoding="utf-8")
        beside.replace(self.path / name)

    def write_json(self, name: str, value: Any) -> None:
        """Replace a JSON file in one step."""
        self.write(name, json.dumps(value, indent=2) + "\n")

    def partition(self) -> dict[str, Any]:
        """What `partition.json` holds; nothing where there is none."""
        file = self.path / "partition.json"
        try:
            return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}
        except (OSError, ValueError, TypeError) as error:
            raise RunFolderError(f"{file} cannot be read: {error}") from None

    def summary(self) -> dict[str, Any]:
        """What a finished run's `summary.json` holds; nothing before."""
        path = self.path / "summary.json"
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return found

    def write_clients(self, table: pd.DataFrame) -> None:
        """Replace `clients.parquet`."""
        beside = self.path / ".clients.parquet.tmp"
        table.to_parquet(beside, index=False)
        beside.replace(self.path / "clients.parquet")

    def read_clients(self, upto: int) -> pd.DataFrame:
        """The rows of `clients.parquet` up to a round."""
        import pandas as pd

        file = self.path / "clients.parquet"
        try:
            table = pd.read_parquet(file) if file.is_file() else pd.DataFrame({"round": []})
            return table[table["round"] <= upto]
        except (OSError, ValueError, TypeError, KeyError) as error:  # pyarrow's errors are ValueErrors
            raise RunFolderError(f"{file} cannot be read: {str(error).splitlines()[0]}") from None

    # metrics, line by line

    def append(self, row: Mapping[str, Any], name: str = "metrics.jsonl") -> None:
        """Add a line to `metrics.jsonl`, or to `events.jsonl`; what is not finite becomes null."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(clean) + "\n")

    def rows(self, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`, or of `events.jsonl`; a last line that was cut off is left out."""
        file = self.path / name
        try:
            text = file.read_text(encoding="utf-8") if file.is_file() else ""
        except (OSError, ValueError) as error:
            raise RunFolderError(f"{file} cannot be read: {error}") from None
        lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return [_row(line, f"line {number} of {file}") for number, line in enumerate(lines, start=1)]

    def keep_rows(self, upto: int) -> list[dict[str, Any]]:
        """Drop the lines and events after a round (they will be written again), and return the lines that stay."""
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
    ) -> None:
        """Replace the checkpoint in one step; the one before stays until the new one is whole, on the disk too. `late`: uplinks
        under way, by client.
        """
        new, now, old = (self.path / name for name in (".checkpoint.new", "checkpoint", ".checkpoint.old"))
        shutil.rmtree(new, ignore_errors=True)
        (new / "clients").mkdir(parents=True)
        (new / "server.safetensors").write_bytes(encode(server))
        for i, client in clients.items():
            (new / "clients" / f"{i}.safetensors").write_bytes(encode(client))
        for i, message in (late or {}).items():
            (new / "late").mkdir(exist_ok=True)
            (new / "late" / f"{i}.safetensors").write_bytes(encode(message))
        (new / "state.json").write_text(json.dumps(state), encoding="utf-8")
        to_disk()
        if now.exists():  # otherwise `old` is the only whole checkpoint
            shutil.rmtree(old, ignore_errors=True)
            now.rename(old)
        new.rename(now)
        to_disk()
        shutil.rmtree(old, ignore_errors=True)

    def has_checkpoint(self) -> bool:
        """Whether there is one."""
        return self._newest() is not None

    def _newest(self) -> Path | None:
        """The newest whole checkpoint; a second one is there only for the moment in which a new one takes its place."""
        found = (self.path / name for name in ("checkpoint", ".checkpoint.old"))
        return next((folder for folder in found if folder.is_dir()), None)

    def load_checkpoint(self) -> tuple[dict[str, Any], Tree, dict[int, Tree]] | None:
        """The newest whole checkpoint: its state, the server's tree, and the changed clients' trees; None where there is none."""
        whole = self._newest()
        if not whole:
            return None
        try:
            state = _row((whole / "state.json").read_text(encoding="utf-8"), "state.json")
            server = decode((whole / "server.safetensors").read_bytes())
            return state, server, _messages(whole / "clients")
        except (OSError, ValueError, WireError, RunFolderError) as error:
            raise RunFolderError(f"the checkpoint in {whole} cannot be read: {error}") from None

    def load_late(self) -> dict[int, Tree]:
        """The uplinks that were under way at the newest whole checkpoint, by client."""
        whole = self._newest()
        try:
            return _messages(whole / "late") if whole else {}
        except (OSError, ValueError, WireError) as error:
            raise RunFolderError(f"the checkpoint in {whole} cannot be read: {error}") from None


def to_disk() -> None:
    """Let all that was written reach the disk: before that it does not outlive a power cut. A file for each of many clients, one by one,
    would take a millisecond or five each.
    """
    if hasattr(os, "sync"):  # not on Windows
        os.sync()


def _row(text: str, where: str) -> dict[str, Any]:
    """A JSON object that tells its round."""
    try:
        row = json.loads(text)
    except ValueError as error:
        raise RunFolderError(f"{where} cannot be read: {error}") from None
    if not isinstance(row, dict) or type(row.get("round")) is not int:
        raise RunFolderError(f"{where} cannot be read: it has no whole number 'round'")
    return row


def _messages(folder: Path) -> dict[int, Tree]:
    return {int(file.stem): decode(file.read_bytes()) for file in folder.glob("*.safetensors")}


def environment() -> dict[str, Any]:
    """Versions and hardware, for the record."""
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
    """The commit of the working copy that this package runs from, if it is one."""
    # a .venv may lie in somebody else's working copy
    tracked = _git("ls-files", "--error-unmatch", Path(__file__).name)
    return _git("rev-parse", "HEAD") if tracked else None


def _git(*words: str) -> str | None:
    """What git answers in this package's folder, if it does."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
