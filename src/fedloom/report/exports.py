"""Tables as files for other programs: CSV and JSON contain numbers; TeX and Markdown contain the tables of the page."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from fedloom.errors import UsageError
from fedloom.report.facts import owners, training_facts
from fedloom.report.generalisation import generalisation_columns, generalisation_grid
from fedloom.report.groups import Group, group, shared_primary
from fedloom.report.pairs import choose_baseline, difference
from fedloom.report.primary import VIEWS
from fedloom.report.read import RunRecord
from fedloom.report.tables import Cell, Column, Grid, paired_grid, summary_columns, summary_grid

Row = dict[str, Any]

KEYS = {
    "uplink": "uplink_bytes",
    "downlink": "downlink_bytes",
    "time": "seconds",
}  # columns without a unit in the header
COUNTS = ("examples", "uplink_bytes", "downlink_bytes")  # integer columns of the table of clients
PREAMBLE = """\
% The rules are those of booktabs, if the document uses it.
\\providecommand{\\toprule}{\\hline}\\providecommand{\\midrule}{\\hline}\\providecommand{\\bottomrule}{\\hline}
"""
TEX = {
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "[": "{[}", "]": "{]}", "±": r"$\pm$", "–": "--", "…": r"\ldots{}", "·": r"$\cdot$", "−": "$-$", "|": r"\textbar{}",
}  # fmt: skip


def summary_text(records: Sequence[RunRecord], kind: str, baseline: str | None = None) -> str:
    """Return the summary of runs in one of the formats in `FORMATS`.

    CSV has one row per method, with means and standard deviations over seeds. JSON also contains the value for each seed and the
    differences from the baseline (see `paired_table`). Numbers are as stored: fractions, bytes and seconds. TeX and Markdown contain the
    tables of the page.

    Raises:
        UsageError: the runs have different primary metrics, or `baseline` is not among them.
    """
    if kind in ("csv", "json"):
        rows = _methods(records)
        if kind == "csv":
            return _csv([_flat(row) for row in rows])
        primary = shared_primary(records)._asdict()
        return _json({"primary": primary, "methods": rows, "differences": _differences(records, baseline)})
    paired = paired_grid(records, baseline, digits=2) if len(records) > 1 else None
    grids = [summary_grid(records, digits=2), paired, generalisation_grid(records, digits=2)]
    return "\n".join(FORMATS[kind](grid) for grid in grids if grid)


def clients_text(records: Sequence[RunRecord], kind: str) -> str:
    """Return a table with one row per run and client in one of the formats in `FORMATS`.

    Scores and numbers of examples are those of the client's last evaluation, steps are means over rounds, and bytes are totals.

    Raises:
        UsageError: the runs have different primary metrics, or no run contains results of clients.
    """
    rows = [row for g in group(records) for record in g.counted for row in _clients(g, record)]
    if not rows:
        raise UsageError("clients: no run has results per client yet (clients.parquet)")
    if kind == "csv":
        return _csv(rows)
    if kind == "json":
        return _json({"primary": shared_primary(records)._asdict(), "clients": rows})
    headers = tuple(dict.fromkeys(key for row in rows for key in row))
    cells = tuple(tuple(Cell(_shown(row.get(key))) for key in headers) for row in rows)
    names = tuple(key.replace("_", " ") for key in headers)
    return FORMATS[kind](Grid(title="Clients", headers=names, rows=cells, caption="Scores as stored."))


def _methods(records: Sequence[RunRecord]) -> list[Row]:
    groups, primary = group(records), shared_primary(records)
    columns = [*summary_columns(primary, 2), *generalisation_columns(groups, primary, 2)]
    return [_method(g, columns) for g in groups]


def _method(members: Group, columns: Sequence[Column]) -> Row:
    runs = [record.name for record in members.counted]
    row: Row = {"label": members.label, "method": members.method, "runs": runs, "finished": members.finished}
    row |= {"seeds": [record.seed for record in members.counted]} | training_facts(members)
    for column in columns:
        values = [value for record in members.counted if (value := column.value(record)) is not None]
        if values:
            row[_key(column.header)] = _statistics([value if math.isfinite(value) else None for value in values])
    return row


def _statistics(values: Sequence[float | None]) -> Row:
    """Return the mean, the standard deviation and the values. None means that a target was never reached."""
    known = [value for value in values if value is not None]
    whole = len(known) == len(values)
    spread = statistics.stdev(known) if whole and len(known) > 1 else None
    return {"mean": statistics.fmean(known) if whole else None, "std": spread, "values": list(values)}


def _key(header: str) -> str:
    name = re.sub(r"\W+", "_", header.strip().lower()).strip("_")
    return KEYS.get(name, name)


def _flat(row: Row) -> Row:
    """Return a method's row without lists: the number of seeds, and the mean and standard deviation of each column."""
    flat: Row = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            flat |= {key: value["mean"], f"{key}_std": value["std"]}
        elif key not in ("runs", "seeds"):
            flat[key] = value
    return flat | {"n_seeds": len(row["seeds"])}


def _differences(records: Sequence[RunRecord], baseline: str | None) -> Row:
    groups, primary = group(records), shared_primary(records)
    base = choose_baseline(groups, baseline)
    rows = []
    for other in (g for g in groups if g is not base):
        for view in VIEWS:
            found = difference(other, base, primary.measure(view))
            if found:
                facts = {"n_seeds": found.n_seeds, "mean": found.mean, "interval": found.interval}
                rows.append({"label": other.label, "model": view, **facts})
    unit = "percentage points" if primary.percent else primary.unit
    return {"baseline": base.label, "unit": unit, "positive": "better", "rows": rows}


def _clients(members: Group, record: RunRecord) -> list[Row]:
    if record.clients is None:
        return []
    head = {"label": members.label, "method": record.method, "seed": record.seed}
    scores = [name for view in VIEWS if (name := record.primary.measure(view)) in record.clients.columns]
    ways = {"examples": "last", "steps": "mean", "uplink_bytes": "sum", "downlink_bytes": "sum"}
    ways = {key: way for key, way in ways.items() if key in record.clients.columns} | dict.fromkeys(scores, "last")
    table = record.clients.sort_values("round").groupby("client").agg(ways)
    names = dict(enumerate(owners(record)))
    return [
        head
        | {"client": int(client)}
        | ({"owner": names.get(client)} if names else {})
        | {str(key): _number(value, whole=key in COUNTS) for key, value in row.items()}
        for client, row in zip(table.index, table.to_dict("records"), strict=True)
    ]


def _number(value: Any, *, whole: bool) -> float | int | None:
    if value is None or not math.isfinite(float(value)):
        return None
    return int(value) if whole else float(value)


def _shown(value: Any) -> str:
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _csv(rows: Sequence[Row]) -> str:
    buffer = io.StringIO()
    names = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _json(content: Row) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _markdown(grid: Grid) -> str:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    def text(cell: Cell) -> str:
        escaped = re.sub(r"([\\|*_`<\[])", r"\\\1", cell.text)
        return f"**{escaped}**" if cell.bold else escaped

    headers = [header.replace("\n", " ").strip() for header in grid.headers]
    rule = ["---", *["---:"] * (len(headers) - 1)]
    body = [line([text(cell) for cell in row]) for row in grid.rows]
    caption = ["", grid.caption] if grid.caption else []
    return "\n".join([f"**{grid.title}**", "", line(headers), line(rule), *body, *caption, ""])


def _tex(grid: Grid) -> str:
    def line(cells: Sequence[str]) -> str:
        return f"{' & '.join(cells)} \\\\"

    def text(cell: Cell) -> str:
        return f"\\textbf{{{_escaped(cell.text)}}}" if cell.bold else _escaped(cell.text)

    parts = [header.strip().split("\n") for header in grid.headers]
    depth = max(map(len, parts))
    padded = [[""] * (depth - len(part)) + part for part in parts]
    heads = [line([_escaped(part[level]) for part in padded]) for level in range(depth)]
    body = [line([text(cell) for cell in row]) for row in grid.rows]
    columns = "l" + "r" * (len(parts) - 1)
    return "\n".join(
        [
            f"% {grid.title}",
            PREAMBLE + f"\\begin{{tabular}}{{{columns}}}",
            "\\toprule",
            *heads,
            "\\midrule",
            *body,
            "\\bottomrule",
            "\\end{tabular}",
            *[f"% {grid.caption}" for _ in [0] if grid.caption],
            "",
        ]
    )


def _escaped(text: str) -> str:
    """Return text for TeX. Letters that would require a package are written as their codes."""
    signed = re.sub(r"(?<![\w)])-(?=\d)", "−", text)
    return "".join(TEX.get(c, c if ord(c) < 0x180 else f"\\texttt{{U+{ord(c):04X}}}") for c in signed)


FORMATS: Mapping[str, Callable[[Any], str]] = MappingProxyType(
    {"csv": _csv, "json": _json, "md": _markdown, "tex": _tex}
)
"""The formats of tables, by suffix of the file."""
