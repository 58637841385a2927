"""Read run folders into records, which are the only input of reports."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from fedloom.errors import RunFolderError
from fedloom.report.primary import ACCURACY, Primary, read_primary


@dataclass(frozen=True, eq=False, kw_only=True)
class RunRecord:
    """The contents of one run folder.

    `metrics` has one row per evaluated round, sorted by `round`, with NaN for null. `clients` has one row per (round, client), or is None
    if the folder has no `clients.parquet`. `summary` is None while the run is unfinished. `environment` and `partition` are empty if their
    files are missing. `analysis` is the result of `fedloom analyse`. `primary` is the primary metric of the run. `manifest` is the
    manifest of the finished run; it is not checked here (`fedloom verify` checks it).
    """

    path: Path
    name: str
    config: Mapping[str, Any]
    metrics: pd.DataFrame
    clients: pd.DataFrame | None
    summary: Mapping[str, Any] | None
    environment: Mapping[str, Any]
    partition: Mapping[str, Any]
    analysis: Mapping[str, Any] = field(default_factory=dict)
    primary: Primary = ACCURACY
    manifest: Mapping[str, Any] = field(default_factory=dict)

    @property
    def method(self) -> str:
        """The name of the method from the config, or else from the summary, or else from the name of the folder."""
        return printable(str(self.fact("method") or self.name))

    @property
    def seed(self) -> int | None:
        """The seed, or None if the folder does not contain it."""
        seed = self.fact("seed")
        return seed if isinstance(seed, int) else None

    @property
    def finished(self) -> bool:
        """Whether the run is finished."""
        return self.summary is not None and bool(self.summary.get("finished", True))

    @property
    def stopped(self) -> Mapping[str, Any] | None:
        """The reason why the run stopped early (`stopped_early` of its summary), or None."""
        found = (self.summary or {}).get("stopped_early")
        return found if isinstance(found, Mapping) else None

    @property
    def rounds_done(self) -> int:
        """The number of rounds completed at the last evaluation, or 0 before the first evaluation."""
        return int(self.metrics["round"].iloc[-1]) if len(self.metrics) else 0

    @property
    def progress(self) -> str:
        """Progress of the run, such as `"round 12 of 30"`."""
        planned = self.fact("rounds")
        return f"round {self.rounds_done} of {planned}" if planned else f"round {self.rounds_done}"

    def fact(self, key: str) -> Any:
        """Return `key` from the config (its name if it is a table), or else from the summary, or else None."""
        value = self.config.get(key)
        if isinstance(value, Mapping):
            value = value.get("name")
        return value if value not in (None, "") else (self.summary or {}).get(key)


def printable(text: str) -> str:
    """Return `text` with control characters replaced, so that names cannot control a terminal or break a page."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def read(paths: Iterable[str | Path]) -> list[RunRecord]:
    """Read all runs in `paths`. Each path is a run folder, or a folder of run folders. Repeated runs are read once.

    Raise RunFolderError if a path is neither, or if a file cannot be read. If the last line of `metrics.jsonl` is incomplete because the
    run was interrupted, the line is skipped.
    """
    folders: dict[Path, Path] = {}
    for path in paths:
        for folder in _run_folders(Path(path)):
            folders.setdefault(folder.resolve(), folder)
    if not folders:
        raise RunFolderError("no run folder was given; name at least one")
    return [_read_run(folder) for folder in folders.values()]


def _run_folders(path: Path) -> list[Path]:
    if not path.is_dir():
        inside = (path.parent / "config.toml").is_file()
        state = "is a file" if path.exists() else "does not exist"
        hint = f"; give its folder, {path.parent}" if path.exists() and inside else ""
        raise RunFolderError(f"run folder '{path}' {state}{hint}")
    inner = [child for child in path.iterdir() if (child / "config.toml").is_file()]
    if inner:
        return sorted(inner, key=_natural_order)
    if (path / "config.toml").is_file():
        return [path]
    raise RunFolderError(f"'{path}' is neither a run folder (config.toml is missing) nor a folder of run folders")


def _natural_order(path: Path) -> list[tuple[int, str]]:
    """Return a sort key that puts seed2 before seed10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def _read_run(folder: Path) -> RunRecord:
    summary, partition = (_read_json(folder / name) for name in ("summary.json", "partition.json"))
    primary = summary.get("primary", partition.get("primary"))  # unfinished runs have no summary
    return RunRecord(
        path=folder,
        name=printable(folder.resolve().name),
        config=_read_toml(folder / "config.toml"),
        metrics=_read_metrics(folder / "metrics.jsonl"),
        clients=_read_clients(folder / "clients.parquet"),
        summary=summary if (folder / "summary.json").exists() else None,
        environment=_read_json(folder / "environment.json"),
        partition=partition,
        analysis=_read_json(folder / "analysis" / "analysis.json"),
        primary=read_primary(primary, f"'{folder}'"),
        manifest=_read_json(folder / "manifest.json"),
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunFolderError(f"cannot read '{path}': {error}") from error


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(_read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise RunFolderError(f"'{path}' is not valid TOML: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    return _object(_read_text(path), f"'{path}'")


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RunFolderError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise RunFolderError(f"{where} must be a JSON object, not {type(value).__name__}")
    return value


def _read_metrics(path: Path) -> pd.DataFrame:
    rows = list(_metric_rows(path)) if path.exists() else []
    table = pd.DataFrame(rows, columns=list(dict.fromkeys(["round", *(key for row in rows for key in row)])))
    table = table.astype({key: "int64" if key == "round" else "float64" for key in table.columns})
    # A run killed between writing this file and its checkpoint evaluates some rounds again. Keep the later line.
    return table.drop_duplicates("round", keep="last").sort_values("round", ignore_index=True)


def _metric_rows(path: Path) -> Iterator[dict[str, float | None]]:
    lines = _read_text(path).split("\n")
    for number, line in enumerate(lines, start=1):
        where = f"line {number} of '{path}'"
        try:
            row = _object(line, where) if line.strip() else None
        except RunFolderError:
            if number == len(lines):  # no newline at the end: the run was interrupted while writing it
                return
            raise
        if row is not None:
            yield {key: value for key, value in _checked(row, where).items() if not isinstance(value, list)}


def _checked(row: dict[str, Any], where: str) -> dict[str, Any]:
    if type(row.get("round")) is not int:
        raise RunFolderError(f"{where} has no integer 'round'")
    for key, value in row.items():
        parts = (
            value if isinstance(value, list) else [value]
        )  # lists have values per class; the report uses those in the summary
        if not all(part is None or isinstance(part, int | float) for part in parts):
            raise RunFolderError(f"{where}: '{key}' must be a number or null, not {value!r}")
    return row


def _read_clients(path: Path) -> pd.DataFrame | None:
    if not path.exists():
        return None
    try:
        table: pd.DataFrame = pq.ParquetFile(path).read().to_pandas()
    except (OSError, pa.ArrowException) as error:
        raise RunFolderError(f"'{path}' is not a readable Parquet file: {error}") from error
    missing = [key for key in ("round", "client") if key not in table.columns]
    if missing:
        raise RunFolderError(f"'{path}' has no column '{missing[0]}'")
    return table
