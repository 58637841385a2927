"""The performance of models beyond the classes and clients of their training, and the clients that a method makes worse off."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from rich.table import Table

from fedloom.report import units
from fedloom.report.groups import Group, group, headline, shared_primary
from fedloom.report.pairs import worse_off
from fedloom.report.primary import Primary
from fedloom.report.read import RunRecord
from fedloom.report.tables import Column, Grid, drawn, filled_grid

RIVALS = ("local", "fedavg")
"""Methods for comparison: a client is worse off if its own model is less accurate than with one of them."""
NOTES = {
    "not_held": "Held, not held: common test examples of the classes that a client has, or has not, among its training examples.",
    "changed": "Factor changed: clients' own test examples with another value of the client factor, such as the colour.",
    "shared_head": "Shared head: one linear classifier for all clients on the features of the shared body.",
    "worse": "Worse off: clients whose personal model is worse than with the other method, same data and seed.",
}


def generalisation_table(records: Sequence[RunRecord]) -> Table | None:
    """Return the table of `generalisation_grid` for the terminal, or None if it contains no values."""
    grid = generalisation_grid(records)
    return drawn(grid) if grid else None


def generalisation_grid(records: Sequence[RunRecord], digits: int = 1) -> Grid | None:
    """Return a table with one row per method: accuracy by classes held and not held, with the shared head, and clients worse off.

    Columns without values are omitted. Return None if no columns remain.
    """
    groups, primary = group(records), shared_primary(records)
    columns = generalisation_columns(groups, primary, digits)
    grid = filled_grid(f"Generalisation, {primary.heading}", columns, groups, digits, "")
    if len(grid.headers) < 2:
        return None
    text = " ".join(grid.headers).replace("\n", " ")
    words = {"not_held": "not held", "changed": "changed", "shared_head": "shared head", "worse": "worse off"}
    return Grid(
        title=grid.title,
        headers=grid.headers,
        rows=grid.rows,
        caption=" ".join(NOTES[name] for name, word in words.items() if word in text),
    )


def generalisation_columns(groups: Sequence[Group], primary: Primary, digits: int) -> list[Column]:
    """Return all possible columns of `generalisation_grid`."""
    return [*_scores(primary, digits), *_worse_off(groups, digits)]


def _scores(primary: Primary, digits: int) -> list[Column]:
    def text(value: float) -> str:
        return primary.text(value, digits)

    def score(header: str, view: str, statistic: str = "final") -> Column:
        return Column(header, lambda record: headline(record, primary.measure(view), statistic), text, True)

    return [
        Column("general\nheld", lambda record: _held(record, primary), text, True),
        score("general\nnot held", "general", "not_held"),
        score("factor\nchanged", "changed"),
        score("shared head\ngeneral", "shared_head"),
        score("shared head\nnot held", "shared_head", "not_held"),
        Column("shared head\nnewcomers", _newcomers, text, True),
    ]


def _held(record: RunRecord, primary: Primary) -> float | None:
    """Return the score on the classes that clients have, or None if every client has all classes."""
    measure = primary.measure("general")
    return None if headline(record, measure, "not_held") is None else headline(record, measure, "held")


def _newcomers(record: RunRecord) -> float | None:
    value = ((record.summary or {}).get("new_clients") or {}).get("shared_head")
    return float(value) if isinstance(value, int | float) else None


def _worse_off(groups: Sequence[Group], digits: int) -> list[Column]:
    """Return one column for each group in `RIVALS`, with the fraction of clients that are worse off."""
    found = []
    for name in RIVALS:
        rival = next((g for g in groups if name in (g.label, g.method)), None)
        if rival is not None:
            text = lambda value: units.points(value, digits)  # noqa: E731
            found.append(Column(f"worse off\nthan {rival.label}", _than(rival), text, False))
    return found


def _than(rival: Group) -> Callable[[RunRecord], float | None]:
    """Return a function that computes, for a run, the mean fraction of clients that are worse off than in the rival's runs.

    The rival's runs are those with the same data and seed.
    """

    def fraction(record: RunRecord) -> float | None:
        if record in rival.records or not record.finished:
            return None
        found = [worse_off(record, other) for other in rival.records if other.finished]
        known = [value for value in found if value is not None]
        return statistics.fmean(known) if known else None

    return fraction
