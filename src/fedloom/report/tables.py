"""The summary and the paired differences of runs, as grids of cells, and as tables for the terminal."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

from fedloom.report import units
from fedloom.report.facts import local_training
from fedloom.report.groups import Group, group, headline, run_total, shared_primary
from fedloom.report.pairs import MIN_SEEDS_FOR_INTERVAL, Difference, choose_baseline, difference
from fedloom.report.primary import VIEWS, Primary
from fedloom.report.read import RunRecord


class Cell(NamedTuple):
    """A cell: its text, its number for sorting (or None if it has none), and whether it is bold."""

    text: str
    value: float | None = None
    bold: bool = False


EMPTY = Cell("–")
NOT_COUNTED = {"rejected": "rejected", "lost": "lost", "late": "late", "skipped": "rounds skipped"}


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table before it is rendered. The first column contains the names of the rows; "\\n" in a header is a line break."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str
    heat: bool = False  # whether cells are shaded by their values, from 0 to 1


class Column(NamedTuple):
    """A column of the summary: how its number is read from a run, and how it is formatted."""

    header: str
    value: Callable[[RunRecord], float | None]
    text: Callable[[float], str]
    is_score: bool  # whether it is a primary metric, with its spread over seeds, or a cost (lower is better)


def summary_table(records: Sequence[RunRecord]) -> Table:
    """Return a table with one row per method (mean ± std over seeds): the primary metric, and total traffic and time per run.

    Raises:
        UsageError: the runs have different primary metrics.
    """
    return drawn(summary_grid(records))


def paired_table(records: Sequence[RunRecord], baseline: str | None = None) -> Table | None:
    """Return a table of differences from a baseline, paired by seed, or None if no runs form pairs.

    The default baseline is FedAvg, or the first method if there is no FedAvg.

    Raises:
        UsageError: `baseline` is not among the runs, or the runs have different primary metrics.
    """
    grid = paired_grid(records, baseline)
    return drawn(grid) if grid else None


def summary_grid(records: Sequence[RunRecord], digits: int = 1) -> Grid:
    """Return the grid of `summary_table`. `digits` is the number of decimal places of percentages. Columns without values are omitted."""
    groups, primary = group(records), shared_primary(records)
    columns = summary_columns(primary, digits)
    return filled_grid(f"Results, {primary.heading}", columns, groups, digits, _summary_caption(groups))


def filled_grid(title: str, columns: Sequence[Column], groups: Sequence[Group], digits: int, caption: str) -> Grid:
    """Return a grid with one row per group (mean ± std over seeds), without the columns that have no values."""
    primary = shared_primary([record for g in groups for record in g.records])
    columns = [column for column in columns if _fills(column, groups)]
    body = [_column_cells(column, groups, primary, digits) for column in columns]
    names = [Cell(g.label if g.finished else f"{g.label} (unfinished)") for g in groups]
    headers = ("Method", *(column.header for column in columns))
    return Grid(title=title, headers=headers, rows=tuple(zip(names, *body, strict=True)), caption=caption)


def summary_columns(primary: Primary, digits: int) -> list[Column]:
    """Return all possible columns of the summary. `digits` is the number of decimal places of percentages."""

    def text(value: float) -> str:
        return primary.text(value, digits)

    def score(header: str, view: str, statistic: str = "final", facet: str = "") -> Column:
        return Column(header, lambda record: headline(record, primary.measure(view, facet), statistic), text, True)

    def cost(header: str, key: str, text: Callable[[float], str]) -> Column:
        return Column(header, lambda record: run_total(record, key), text, False)

    return [
        score("personal\nfinal", "personal"),
        score("personal\nlast 10", "personal", "last10"),
        score("personal\nchosen", "personal", "chosen_on_validation"),
        score("personal\nworst 10%", "personal", "worst10"),
        Column("personal\ntrained", _trained, text, True),
        score("personal\nfitted", "personal", facet="fitted"),
        score("general\nfinal", "general"),
        score("server\nfinal", "server"),
        Column("rounds\nto target", lambda record: _to_target(record, "rounds"), _rounds, False),
        Column("bytes\nto target", lambda record: _to_target(record, "bytes"), _bytes, False),
        Column("newcomers\nreceived", lambda record: _newcomers(record, "received"), text, True),
        Column("newcomers\njoined", lambda record: _newcomers(record, "joined"), text, True),
        Column("\nepsilon", _epsilon, lambda value: f"{value:.3g}", False),
        cost("\nuplink", "uplink_bytes", units.size),
        cost("\ndownlink", "downlink_bytes", units.size),
        cost("\ntime", "seconds", units.duration),
    ]


def _epsilon(record: RunRecord) -> float | None:
    """Return the epsilon that a private run spent, for an observer who does not know the cohorts; infinity without noise."""
    privacy = (record.summary or {}).get("privacy")
    return None if privacy is None else math.inf if privacy["epsilon"] is None else float(privacy["epsilon"])


def _to_target(record: RunRecord, what: str) -> float | None:
    """Return the cost until the target was reached: infinity if it was never reached, and None if the run had no target."""
    summary = record.summary or {}
    value = summary.get(f"{what}_to_target", math.inf if "target" in summary else None)
    return math.inf if "target" in summary and value is None else value


def _rounds(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "never"


def _bytes(value: float) -> str:
    return units.size(value) if math.isfinite(value) else "never"


def recall_grid(records: Sequence[RunRecord], most: int = 20) -> Grid | None:
    """Return the per-class recall of the clients' models on the common test set, in percent, averaged over seeds.

    Return None if the runs have no recalls, have different classes, or have more than `most` classes, which is too many for a table.
    """
    caption = (
        "Personal models on the common test set: fraction of each class's examples that they classify correctly; "
        "mean over clients and seeds."
    )
    return _grid_by_name(records, "general_recall", "Recall by class, in percent", caption, most)


def f1_grid(records: Sequence[RunRecord], most: int = 20) -> Grid | None:
    """Return the F1 score of each label for the clients' models on the common test set, in percent, averaged over seeds.

    Return None if the runs have no F1 scores, have different labels, or have more than `most` labels, which is too many for a table.
    """
    caption = "Personal models on the common test set: F1 of each label over all clients' predictions; mean over seeds."
    return _grid_by_name(records, "general_f1", "F1 by label, in percent", caption, most)


def _grid_by_name(records: Sequence[RunRecord], measure: str, title: str, caption: str, most: int) -> Grid | None:
    found = {g.label: [run for r in g.counted if (run := (r.summary or {}).get(measure))] for g in group(records)}
    found = {label: runs for label, runs in found.items() if runs}
    sizes = {len(run) for runs in found.values() for run in runs}
    named = {tuple(names) for r in records if (names := _names(r))}
    if len(sizes) != 1 or max(sizes) > most or len(named) > 1:
        return None
    names = next(iter(named), None) or range(*sizes)
    rows = tuple((Cell(label), *map(_percent_cell, zip(*runs, strict=True))) for label, runs in found.items())
    return Grid(title=title, headers=("Method", *map(str, names)), rows=rows, caption=caption, heat=True)


def _names(record: RunRecord) -> Sequence[object] | None:
    """Return the names of the classes or labels. Run folders without an objective store them in the partition."""
    objective = (record.summary or {}).get("objective") or {"names": record.partition.get("classes")}
    names: Sequence[object] | None = objective.get("names")
    return names


def _percent_cell(values: Sequence[float | None]) -> Cell:
    known = [value for value in values if value is not None]
    return Cell(units.points(statistics.fmean(known), 0), statistics.fmean(known)) if known else EMPTY


def _trained(record: RunRecord) -> float | None:
    """Return the personal metric over clients that have trained, or None if it equals the metric over all clients."""
    value = headline(record, record.primary.measure("personal", "trained"))
    return None if value == headline(record, record.primary.measure("personal")) else value


def _newcomers(record: RunRecord, when: str) -> float | None:
    """Return the primary metric of newcomers on their own examples, with the model that they received, or after they joined."""
    value = ((record.summary or {}).get("new_clients") or {}).get(when)
    return float(value) if isinstance(value, int | float) else None


def _fills(column: Column, groups: Sequence[Group]) -> bool:
    return any(column.value(record) is not None for g in groups for record in g.counted)


def _column_cells(column: Column, groups: Sequence[Group], primary: Primary, digits: int) -> list[Cell]:
    cells = [_mean_cell(column, g, primary, digits) for g in groups]
    means = [cell.value for cell, g in zip(cells, groups, strict=True) if cell.value is not None and g.finished]
    printed = [column.text(mean) for mean in means]  # values that are printed in the same way are treated as equal
    if len(set(printed)) < 2:
        return cells
    best = column.text(primary.best(means) if column.is_score else min(means))
    return [
        cell._replace(bold=g.finished and cell.value is not None and column.text(cell.value) == best)
        for cell, g in zip(cells, groups, strict=True)
    ]


def _mean_cell(column: Column, members: Group, primary: Primary, digits: int) -> Cell:
    values = [value for record in members.counted if (value := column.value(record)) is not None]
    if not values:
        return EMPTY
    mean = statistics.fmean(values)
    text = column.text(mean)
    if column.is_score and len(values) > 1:
        text += f" ±{primary.spread(statistics.stdev(values), mean, digits)}"
    return Cell(text, mean)


def _summary_caption(groups: Sequence[Group]) -> str:
    counts = {g.label: len(g.counted) for g in groups}
    notes = [training] if (training := local_training(groups)) else []
    if max(counts.values()) > 1:
        distinct = set(counts.values())
        listed = str(*distinct) if len(distinct) == 1 else ", ".join(f"{label} {n}" for label, n in counts.items())
        notes.append(f"Mean ± standard deviation over seeds ({listed}).")
    without = [f"{g.label} {told}" for g in groups if (told := not_counted(g.counted))]
    if without:
        notes.append(f"Local updates that did not count: {'; '.join(without)}.")
    unfinished = [record for g in groups for record in g.records if not record.finished]
    if unfinished:
        listed = ", ".join(f"{record.name} ({record.progress})" for record in unfinished)
        notes.append(f"Unfinished: {listed}; counted only where a method has no finished run.")
    early = [f"{record.name} ({record.progress})" for g in groups for record in g.counted if record.stopped]
    if early:
        notes.append(f"Stopped early, because the validation score had not improved: {', '.join(early)}.")
    edited = [record.name for g in groups for record in g.records if (record.summary or {}).get("accepted_changes")]
    if edited:
        notes.append(f"Resumed with other settings, code or versions: {', '.join(edited)}.")
    return " ".join(notes)


def not_counted(records: Sequence[RunRecord]) -> str:
    """Return as text the numbers of lost, late and rejected local updates and of skipped rounds in these runs."""
    counts = {what: sum(int((r.summary or {}).get(what) or 0) for r in records) for what in NOT_COUNTED}
    return ", ".join(f"{n:,} {NOT_COUNTED[what]}" for what, n in counts.items() if n)


def paired_grid(records: Sequence[RunRecord], baseline: str | None = None, digits: int = 1) -> Grid | None:
    """Return the grid of `paired_table`. `digits` is the number of decimal places of percentage points."""
    groups, primary = group(records), shared_primary(records)
    base = choose_baseline(groups, baseline)
    others = [g for g in groups if g is not base]
    found = {view: [difference(g, base, primary.measure(view)) for g in others] for view in VIEWS}
    found = {view: column for view, column in found.items() if any(column)}
    rows = [_paired_row(g.label, column, primary, digits) for g, *column in zip(others, *found.values(), strict=True)]
    if not found:
        return None
    headers = ("Method", "\nseeds", *(f"{view}\nfinal" for view in found))
    return Grid(
        title=f"Difference to {base.label} in {primary.difference_heading}",
        headers=headers,
        rows=tuple(row for row in rows if row),
        caption=_paired_caption(list(found.values()), primary),
    )


def _paired_row(
    label: str, differences: Sequence[Difference | None], primary: Primary, digits: int
) -> tuple[Cell, ...]:
    n_seeds = max((found.n_seeds for found in differences if found), default=0)
    if not n_seeds:
        return ()
    cells = [_difference_cell(found, primary, digits) for found in differences]
    return (Cell(label), Cell(str(n_seeds), n_seeds), *cells)


def _difference_cell(found: Difference | None, primary: Primary, digits: int) -> Cell:
    if found is None:
        return EMPTY
    numbers = (found.mean, *(found.interval or ()))
    largest = max(map(abs, numbers))
    text, *interval = (primary.difference(number, largest, digits) for number in numbers)
    if interval:
        text += f" [{', '.join(interval)}]"
    return Cell(text, found.mean, found.clear)


def _paired_caption(columns: Sequence[Sequence[Difference | None]], primary: Primary) -> str:
    caption = "Pairs share data, seed and partition; finished runs only."
    if primary.is_lower_better:
        caption = f"Positive is better: {primary.name} is lower than that of the baseline. {caption}"
    if any(found and found.interval for column in columns for found in column):
        return f"{caption} In brackets: 95 % t-interval of the mean; bold if it excludes zero."
    return f"{caption} An interval needs at least {MIN_SEEDS_FOR_INTERVAL} seeds."


def drawn(grid: Grid) -> Table:
    """Return the grid as a table for the terminal."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)
    table.title, table.title_justify = Text(grid.title, style="bold"), "left"
    table.caption, table.caption_justify = Text(grid.caption, style="dim"), "left"
    for place, header in enumerate(grid.headers):
        table.add_column(Text(header), justify="right" if place else "left", vertical="bottom", overflow="fold")
    for row in grid.rows:
        table.add_row(*(Text(cell.text, style="bold" if cell.bold else "") for cell in row))
    return table
