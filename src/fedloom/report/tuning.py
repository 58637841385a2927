"""The table and the page of a tuning, from its `tune.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedloom.errors import RunFolderError
from fedloom.report.page import write_content
from fedloom.report.primary import Primary, read_primary
from fedloom.report.read import printable
from fedloom.report.tables import EMPTY, Cell, Grid

SEARCHES = {"grid": "whole grid", "halving": "successive halving", "tpe": "TPE (Optuna)"}
MOST_SEEDS = 10  # maximum number of seeds that have their own columns


def read_tuning(file: Path) -> dict[str, Any]:
    """Return the contents of `tune.json`. Raise RunFolderError if it cannot be read."""
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        read_primary(found["primary"], str(file))
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunFolderError(f"{file} cannot be read: {error}") from None


def tuning_grids(found: Mapping[str, Any]) -> list[Grid]:
    """Return one table per method with all candidates that were tried, in their order. The chosen candidate is bold."""
    return [_grid(found, method) for method in found["methods"]]


def write_tuning_page(found: Mapping[str, Any], path: Path) -> None:
    """Write the page of a tuning, as one self-contained HTML file. Raise UsageError if it cannot be written."""
    from fedloom.report.tuning_figures import tuning_figures  # matplotlib is an extra

    title = f"Tuning: {', '.join(printable(method['label']) for method in found['methods'])}"
    about = {
        "title": title,
        "reading": _reading(found),
        "facts": _about(found),
        "unfinished": [],
        "warnings": [warning for method in found["methods"] for warning in method["warnings"]],
        "grids": [_choice(found), *tuning_grids(found)],
        "sections": tuning_figures(found),
        "looked_at": [],
        "details": [],
    }
    write_content([about], title, path)


def _about(found: Mapping[str, Any]) -> dict[str, str]:
    held_out = (
        f"{100 * found['valid']:g} % of each client's training examples" if found["valid"] else "from the partition"
    )
    return {
        "data": printable(str(found["data"])),
        "search": SEARCHES.get(found["search"], printable(str(found["search"]))),
        "candidates per method": str(found["candidates"]),
        "rounds": ", ".join(map(str, found["rungs"])),
        "seeds": ", ".join(map(str, found["seeds"])),
        "chosen on": f"{_measure(found)} ({held_out})",
    }


def _measure(found: Mapping[str, Any]) -> str:
    primary = read_primary(found["primary"], "tune.json")
    return f"validation {primary.heading}"


def _reading(found: Mapping[str, Any]) -> str:
    halved = "After each number of rounds except the last, the worse half of a method's candidates stopped. "
    return (
        f"Every method had {found['candidates']} candidates and the same rounds. {halved if len(found['rungs']) > 1 else ''}"
        "The chosen candidate has the best mean over seeds on validation examples. Test examples were not used. The command "
        "fedloom compare tuned.toml compares the methods with these values on test examples."
    )


def _choice(found: Mapping[str, Any]) -> Grid:
    """Return a table with the chosen candidate of every method."""
    primary = read_primary(found["primary"], "tune.json")
    rows = []
    for method in found["methods"]:
        chosen = method["tried"][method["best"]] if method["best"] is not None else None
        words = Cell(values_words(chosen["values"])) if chosen else Cell("none")
        rows.append((Cell(printable(method["label"])), words, _mean(chosen, primary) if chosen else EMPTY))
    headers = ("Method", "candidate", f"validation\n{primary.name}")
    return Grid(title=f"Chosen candidates, {_measure(found)}", headers=headers, rows=tuple(rows), caption="")


def _grid(found: Mapping[str, Any], method: Mapping[str, Any]) -> Grid:
    primary, seeds = read_primary(found["primary"], "tune.json"), found["seeds"]
    shown = seeds if 1 < len(seeds) <= MOST_SEEDS else []
    short = len(found["rungs"]) > 1
    rows = []
    for place, one in enumerate(method["tried"]):
        best = place == method["best"]
        each = [_score(one["scores"].get(str(seed)), primary) for seed in shown]
        rounds = [Cell(str(one["rounds"]), one["rounds"])] if short else []
        chosen = Cell("chosen" if best else printable(one["failed"]))
        mean = _mean(one, primary)._replace(bold=best)
        rows.append((Cell(values_words(one["values"])), mean, *each, *rounds, chosen))
    several = "mean ± std" if len(seeds) > 1 else f"seed {seeds[0]}"
    headers = ("Candidate", several, *(f"seed {seed}" for seed in shown), *(["rounds"] if short else []), "")
    label = printable(method["label"])
    return Grid(title=f"{label}, {_measure(found)}", headers=headers, rows=tuple(rows), caption="")


def _mean(one: Mapping[str, Any], primary: Primary) -> Cell:
    cell = _score(one["mean"], primary)
    if one["std"] is None or one["mean"] is None:
        return cell
    return cell._replace(text=f"{cell.text} ±{primary.spread(one['std'], one['mean'])}")


def _score(value: float | None, primary: Primary) -> Cell:
    return EMPTY if value is None else Cell(primary.text(value), value)


def values_words(values: Mapping[str, Any]) -> str:
    """Return hyper-parameters in the form in which a user types them, such as `lr=0.1 mu=0.01`."""
    words = (f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in values.items())
    return printable(" ".join(words))
