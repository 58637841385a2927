"""The sections of figures on the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fedloom.report import plots, style
from fedloom.report.facts import partition_words, shown
from fedloom.report.groups import group, series, shared_primary
from fedloom.report.partition_plots import partition_figure
from fedloom.report.primary import VIEWS, Primary
from fedloom.report.read import RunRecord
from fedloom.report.waiting import Waiting

PIXELS = 112  # pixels per inch of a figure, with which two figures fit next to each other
MOST_PARTITIONS = 6


class Plot(NamedTuple):
    """A figure on the page: its SVG, the note below it, and its width in pixels."""

    svg: str
    note: str
    width: int


class FigureSection(NamedTuple):
    """Figures with a title and a note about all of them."""

    title: str
    plots: list[Plot]
    note: str = ""


def sections(records: Sequence[RunRecord], waiting: Waiting | None, prefix: str) -> list[FigureSection]:
    """Return the sections of a chapter. `prefix` makes the ids in its figures unique on the page."""
    primary = shared_primary(records)
    spread = "Bar: the middle half of the clients; stroke: median; diamond: mean of the worst tenth."
    clients = [(plots.client_spread(records), spread)] if any(r.clients is not None for r in records) else []
    if any(record.summary for record in records):
        clients.append((plots.bytes_by_kind(records), "Bytes by kind of content: whole run, all clients together."))
    sharp = [(plots.sharpness(records), plots.SHARPNESS_NOTE)] if plots.has_sharpness(records) else []
    logs = [(plots.log_over_rounds(records, key), "") for key in plots.log_names(records)]
    partitions, note = _partitions(records)
    return [
        FigureSection(_title(primary), _drawn(f"{prefix}{primary.name}", _curves(records)), _seeds(records)),
        FigureSection("Clients and traffic", _drawn(f"{prefix}clients", clients)),
        FigureSection("Partition", _drawn(f"{prefix}partition", partitions), note),
        FigureSection("Sharpness", _drawn(f"{prefix}sharpness", sharp)),
        FigureSection("Logs", _drawn(f"{prefix}log", logs)),
        FigureSection("Devices and networks", _drawn(f"{prefix}time", _times(records, waiting))),
    ]


def _title(primary: Primary) -> str:
    """Return the title of the section with the curves of the primary metric."""
    return "Accuracy" if primary.name == "accuracy" else f"Metric: {primary.name}"


def _seeds(records: Sequence[RunRecord]) -> str:
    band = any(len(g.counted) > 1 for g in group(records))
    return "Line: mean over seeds; band: from the lowest seed to the highest." if band else ""


def _curves(records: Sequence[RunRecord]) -> list[tuple[style.Figure, str]]:
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


def _times(records: Sequence[RunRecord], waiting: Waiting | None) -> list[tuple[style.Figure, str]]:
    note = "Every round waits for its slowest client; the server's own work takes no time."
    networks = waiting.networks if waiting else ()
    return [(plots.metric_over_time(records, network, waiting), note) for network in networks if waiting]


def _drawn(name: str, figures: Sequence[tuple[style.Figure, str]]) -> list[Plot]:
    found = []
    for place, (figure, text) in enumerate(figures):
        note = f"{text} {figure.get_label()}".strip()
        title = next((axes.get_title(loc="left") for axes in figure.axes), name)
        drawn = style.svg(figure, f"{name}{place}", f"{title}. {note}")
        found.append(Plot(drawn, note, round(PIXELS * figure.get_size_inches()[0])))
    return found


def _partitions(records: Sequence[RunRecord]) -> tuple[list[tuple[style.Figure, str]], str]:
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
        found.append((figure, f"Hash {shown(digest)[:16]}."))
    words = "; ".join(dict.fromkeys(filter(None, (partition_words(sharing[0]) for _, sharing in shared))))
    left = len(runs) - len(shared)
    rest = f" {left} more partitions are not shown." if left else ""
    return found, f"Training examples by client. {words}.{rest}" if found else ""


def _sharing(sharing: Sequence[RunRecord], records: Sequence[RunRecord]) -> str:
    """Return the title of a partition, which names the runs that have it."""
    seeds = {record.seed for record in sharing}
    if len(sharing) == len(records):
        return "Training examples"
    if seeds.isdisjoint(record.seed for record in records if record not in sharing):
        return f"Seed {', '.join(map(str, sorted(seed for seed in seeds if seed is not None)))}"
    return style.shorten(", ".join(record.name for record in sharing), 36)
