"""The figures of the page, by section."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from fedloom.report import plots, style
from fedloom.report.facts import owners, partition_words, shown
from fedloom.report.groups import group, series, shared_primary
from fedloom.report.partition_plots import partition_figure
from fedloom.report.primary import VIEWS, Primary
from fedloom.report.read import RunRecord
from fedloom.report.waiting import Waiting

PIXELS = 112  # pixels per inch of a figure, with which two figures fit next to each other
MOST_PARTITIONS = 6
MOST_NAMES = 30  # maximum number of clients whose names are shown


class Plot(NamedTuple):
    """A figure on the page: its SVG, the note below it, and its width in pixels."""

    svg: str
    note: str
    width: int


Noted = tuple[style.Figure, str]
"""A figure, and the note below it."""


class FigureSection(NamedTuple):
    """Figures with a title and a note about all of them. `name` is the start of their ids on the page."""

    title: str
    name: str
    figures: list[Noted]
    note: str = ""


def sections(records: Sequence[RunRecord], waiting: Waiting | None) -> list[FigureSection]:
    """Return the sections that have figures."""
    primary = shared_primary(records)
    spread = "Bar: the middle half of the clients; stroke: median; diamond: mean of the worst tenth."
    clients = [(plots.client_spread(records), spread)] if any(r.clients is not None for r in records) else []
    if any(record.summary for record in records):
        clients.append((plots.bytes_by_kind(records), "Bytes by kind of content: whole run, all clients together."))
    sharp = [(plots.sharpness(records), plots.SHARPNESS_NOTE)] if plots.has_sharpness(records) else []
    logs = [(plots.log_over_rounds(records, key), "") for key in plots.log_names(records)]
    partitions, note = _partitions(records)
    found = [
        FigureSection(_title(primary), primary.name, _curves(records), _seeds(records)),
        FigureSection("Clients and traffic", "clients", clients),
        FigureSection("Partition", "partition", partitions, note),
        FigureSection("Sharpness", "sharpness", sharp),
        FigureSection("Logs", "log", logs),
        FigureSection("Devices and networks", "time", _times(records, waiting)),
    ]
    return [section for section in found if section.figures]


def named_figures(records: Sequence[RunRecord], waiting: Waiting | None) -> dict[str, style.Figure]:
    """Return all figures of the page by title, in the form used in file names, such as `personal-accuracy-over-rounds`."""
    found: dict[str, style.Figure] = {}
    for section in sections(records, waiting):
        for figure, _ in section.figures:
            stem = re.sub(r"[^a-z0-9]+", "-", _heading(figure, section.name).lower()).strip("-") or section.name
            places = (stem, *(f"{stem}-{place}" for place in range(2, len(found) + 3)))
            found[next(name for name in places if name not in found)] = figure
    return found


def _title(primary: Primary) -> str:
    """Return the title of the section with the curves of the primary metric."""
    return "Accuracy" if primary.name == "accuracy" else f"Metric: {primary.name}"


def _seeds(records: Sequence[RunRecord]) -> str:
    band = any(len(g.counted) > 1 for g in group(records))
    return "Line: mean over seeds; band: from the lowest seed to the highest." if band else ""


def _curves(records: Sequence[RunRecord]) -> list[Noted]:
    """Return figures of the primary metric over rounds and, if methods are compared and evaluated more than once, over traffic."""
    primary = shared_primary(records)
    views = [view for view in VIEWS if plots.has_values(records, primary.measure(view))]
    if not views:
        return []
    if len(group(records)) == 1:
        return [(plots.views_over_rounds(records), "")]
    found = [(plots.metric_over_rounds(records, view), "") for view in views]
    if any(len(series(record, primary.measure(views[0]))) > 1 for record in records):
        found.append((plots.metric_over_bytes(records, views[0]), "All clients together, cumulative."))
    return found


def _times(records: Sequence[RunRecord], waiting: Waiting | None) -> list[Noted]:
    note = "Every round waits for its slowest client; the server's own work takes no time."
    networks = waiting.networks if waiting else ()
    return [(plots.metric_over_time(records, network, waiting), note) for network in networks if waiting]


def for_page(sections: Sequence[FigureSection], prefix: str = "") -> dict[str, dict[str, Any]]:
    """Return the sections by title, as the values of the page's template. `prefix` makes the ids unique on the page."""
    import markupsafe

    return {
        section.title: {
            "note": section.note,
            "figures": [
                plot._asdict() | {"svg": markupsafe.Markup(plot.svg)} for plot in section_plots(section, prefix)
            ],
        }
        for section in sections
    }


def section_plots(section: FigureSection, prefix: str) -> list[Plot]:
    """Return the figures of a section for the page. `prefix` makes the ids in them unique on the page."""
    found = []
    for place, (figure, text) in enumerate(section.figures):
        note = f"{text} {figure.get_label()}".strip()
        name = f"{prefix}{section.name}"
        svg = style.svg(figure, f"{name}{place}", f"{_heading(figure, name)}. {note}")
        found.append(Plot(svg, note, round(PIXELS * figure.get_size_inches()[0])))
    return found


def _heading(figure: style.Figure, default: str) -> str:
    """Return the titles of a figure's axes, joined by "and", or `default` if there are none."""
    return " and ".join(title for axes in figure.axes if (title := axes.get_title(loc="left"))) or default


def _partitions(records: Sequence[RunRecord]) -> tuple[list[Noted], str]:
    """Return one figure for each different partition, all with the same scale, and a note about the figures."""
    runs: dict[str, list[RunRecord]] = {}
    for record in records:
        if (record.partition.get("class_counts") or {}).get("train"):
            runs.setdefault(str(record.partition.get("hash", record.name)), []).append(record)
    shared = list(runs.items())[:MOST_PARTITIONS]
    counts = [sharing[0].partition["class_counts"]["train"] for _, sharing in shared]
    largest = max((float(n) for table in counts for row in table for n in row), default=0.0)
    found = []
    for (digest, sharing), table in zip(shared, counts, strict=True):
        kind = "class" if sharing[0].primary.name == "accuracy" else "group"
        names, title = sharing[0].partition.get("classes"), _sharing(sharing, records)
        figure = partition_figure(table, names, kind, title, largest)
        found.append((figure, f"Hash {shown(digest)[:16]}. {_owners(sharing[0])}".strip()))
    words = "; ".join(dict.fromkeys(filter(None, (partition_words(sharing[0]) for _, sharing in shared))))
    left = len(runs) - len(shared)
    rest = f" {left} more partitions are not shown." if left else ""
    scheme = f" Partition: {words}." if words else ""
    return found, f"Training examples by client.{scheme}{rest}" if found else ""


def _owners(record: RunRecord) -> str:
    """Return a line with the names of the clients, or "" if they have no names or there are more than `MOST_NAMES`."""
    names = owners(record)
    if not 0 < len(names) <= MOST_NAMES:
        return ""
    return f"Clients: {', '.join(f'{client} {name}' for client, name in enumerate(names))}."


def _sharing(sharing: Sequence[RunRecord], records: Sequence[RunRecord]) -> str:
    """Return the title of a partition, which names the runs that have it."""
    seeds = {record.seed for record in sharing}
    if len(sharing) == len(records):
        return "Training examples"
    if seeds.isdisjoint(record.seed for record in records if record not in sharing):
        return f"Seed {', '.join(map(str, sorted(seed for seed in seeds if seed is not None)))}"
    return style.shorten(", ".join(record.name for record in sharing), 36)
