"""Tables that fit the terminal without breaking words. A table that is too wide is printed in parts, one below the other."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import NamedTuple

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table


class Widths(NamedTuple):
    """The minimum width of a column (its longest word or number) and its preferred width (its longest line), in characters."""

    least: int
    most: int


def show(console: Console, table: Table) -> None:
    """Print a table with its title above it and its caption below it."""
    widths = [_widths(console, table, place) for place in range(len(table.columns))]
    if table.title:
        console.print(table.title)
    for number, places in enumerate(_split(table, widths, console.width)):
        if number:
            console.print()
        console.print(_part(table, places, [widths[place] for place in places], console.width))
    if table.caption:
        console.print(table.caption)


def _widths(console: Console, table: Table, place: int) -> Widths:
    column = table.columns[place]
    head, *cells = [Measurement.get(console, console.options, cell) for cell in (column.header, *column.cells)]
    most = max(cell.maximum for cell in (head, *cells))
    if column.justify == "right":  # numbers stay on one line: 82.2 ±8.7
        return Widths(max([head.minimum, *(cell.maximum for cell in cells)]), most)
    return Widths(most if column.no_wrap else max(cell.minimum for cell in (head, *cells)), most)


def _split(table: Table, widths: Sequence[Widths], room: int) -> list[list[int]]:
    """Return the columns of each part. The first column, which contains the names of the rows, is in every part."""
    parts = [[0]]
    for place in range(1, len(widths)):
        wanted = [*parts[-1], place]
        if len(wanted) > 2 and sum(widths[each].least for each in wanted) > room - _between(table, len(wanted)):
            parts.append([0, place])
        else:
            parts[-1] = wanted
    return parts


def _between(table: Table, n: int) -> int:
    """Return the width of the padding and borders of n columns, in characters."""
    _, right, _, left = table.padding
    padding = (left + right) * (n if table.pad_edge else n - 1)
    return padding + (n - 1 if table.box else 0) + (2 if table.box and table.show_edge else 0)


def _part(table: Table, places: Sequence[int], widths: Sequence[Widths], room: int) -> Table:
    part = copy(table)
    part.title = part.caption = None
    part.columns = [copy(table.columns[place]) for place in places]
    for place, column in enumerate(part.columns):
        column._index = place
        column.overflow = "fold"  # do not cut words that are wider than the terminal
    room -= _between(table, len(places))
    if sum(each.least for each in widths) <= room:
        for column, width in zip(part.columns, _shared_out(widths, room), strict=True):
            column.width = width
    return part


def _shared_out(widths: Sequence[Widths], room: int) -> list[int]:
    """Return the width of each column: its preferred width or, if there is too little room, a width reduced in the
    widest columns first.
    """
    found = [each.most for each in widths]
    while sum(found) > room:
        can_shrink = [place for place, each in enumerate(widths) if found[place] > each.least]
        found[max(can_shrink, key=lambda place: found[place])] -= 1
    return found
