"""Figures of runs. Each is a separate `matplotlib.figure.Figure`; nothing here uses pyplot or global state.

Every function that takes `records` groups them by method and settings. A method has the same colour and dash in all
figures of the same records. If a quantity was not measured, the figure states this.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from fedloom.errors import DataError
from fedloom.report.groups import Group, group, headline, series, shared_primary
from fedloom.report.link_speeds import Network
from fedloom.report.looked_at import part_of
from fedloom.report.primary import VIEWS, Primary
from fedloom.report.read import RunRecord, printable
from fedloom.report.style import (
    ACCENT,
    INK,
    MUTED,
    Axes,
    Figure,
    Stroke,
    colors,
    drawing,
    label_ends,
    shorten,
    strokes,
    ticker,
)
from fedloom.report.units import duration, size
from fedloom.report.waiting import Waiting, elapsed

Floats = NDArray[np.float64]

WIDTH, HEIGHT = 4.9, 3.3
MAX_DOTS = 200
MAX_BUBBLES = (120, 30)
ROUNDS = ("lost", "late", "rejected", "skipped", "virtual_steps")  # cumulative counts of events in rounds
NOT_A_LOG = ("round", "uplink_bytes", "downlink_bytes", "cohort", *ROUNDS)
SCORES = tuple(f"{view}_" for view in (*VIEWS, "valid"))  # prefixes of the names of metrics; a log's name has a dot
SINGLE_GROUP = ["examples"]  # the names of a partition's groups if the task has no groups of examples


class Curve(NamedTuple):
    """A mean over seeds with its range; all four arrays have shape (points,)."""

    x: Floats
    mean: Floats
    low: Floats
    high: Floats


def metric_over_rounds(records: Sequence[RunRecord], view: str = "personal") -> Figure:
    """Plot the primary metric over completed rounds: mean over seeds, with a band from the lowest seed to the highest.

    `view` is `personal`, `general` or `server`. Fractions are shown in percent.
    """
    primary = shared_primary(records)
    curves = _curves(group(records), lambda record: _shown(record, primary, view))
    return _curves_figure(records, curves, f"{_title(primary, view)} over rounds", ("round", primary.label))


def metric_over_bytes(records: Sequence[RunRecord], view: str = "personal") -> Figure:
    """Plot the primary metric over the bytes sent so far, in both directions, for all clients."""

    def traffic(record: RunRecord) -> pd.Series:
        return series(record, "uplink_bytes") + series(record, "downlink_bytes")

    return _metric_over(traffic, size, records=records, view=view, over="traffic", axis_name="bytes sent, up and down")


def metric_over_time(records: Sequence[RunRecord], network: Network, waiting: Waiting) -> Figure:
    """Plot the personal metric over the time that devices on a network would need (see `report.waiting`)."""
    return _metric_over(
        lambda r: elapsed(r, network, waiting),
        duration,
        records=records,
        view="personal",
        over=f"time, {network.name}",
        axis_name="time",
    )


def _shown(record: RunRecord, primary: Primary, view: str) -> pd.Series[float]:
    """Return the values of the primary metric as they are shown, by round."""
    return primary.scale * series(record, primary.measure(view))


def _title(primary: Primary, view: str) -> str:
    return f"{view.capitalize()} {primary.name}"


def _metric_over(
    cost: Callable[[RunRecord], pd.Series],
    shown: Callable[[float], str],
    records: Sequence[RunRecord],
    view: str,
    over: str,
    axis_name: str,
) -> Figure:
    """Plot the primary metric over a cost, which is named `over` in the title; `shown` formats the cost on the axis."""
    groups, primary = group(records), shared_primary(records)
    title = f"{_title(primary, view)} over {over}"
    curves = _curves(groups, lambda record: _shown(record, primary, view))
    costs = _curves(groups, cost)
    curves = {label: _over(curve, costs[label]) for label, curve in curves.items() if label in costs}
    curves = {label: curve for label, curve in curves.items() if len(curve.x)}
    figure = _curves_figure(records, curves, title, (axis_name, primary.label))
    for axes in figure.axes if curves else ():
        axes.xaxis.set_major_locator(ticker.MaxNLocator(4))
        if _spans([curve.x[-1] for curve in curves.values()], 20):
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(ticker.NullFormatter())
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: shown(x) if x >= 0 else ""))
    return figure


SHARPNESS_NOTE = (
    "Random filter-normalised directions; at distance 1 every filter has moved by its own norm. "
    "Line: mean over directions and seeds; band: from the lowest to the highest."
)


def has_sharpness(records: Sequence[RunRecord]) -> bool:
    """Return whether any run's server model was analysed."""
    return any(part_of(record, "sharpness").get("curves") for record in records)


def sharpness(records: Sequence[RunRecord]) -> Figure:
    """Plot the training loss of the server's model along random directions, in units of each filter's norm."""
    curves = {}
    for g in group(records):
        found = [part_of(record, "sharpness") for record in g.records]
        lines = [line for part in found for line in part.get("curves", ())]
        if lines:
            x, each = np.asarray(next(part["distances"] for part in found if "distances" in part)), np.asarray(lines)
            curves[g.label] = Curve(x, each.mean(0), each.min(0), each.max(0))
    figure = _curves_figure(records, curves, "Loss around the server's model", ("distance", "cross-entropy"))
    for axes in figure.axes if curves else ():
        axes.xaxis.set_major_locator(ticker.MaxNLocator(5))
    return figure


def log_over_rounds(records: Sequence[RunRecord], key: str) -> Figure:
    """Plot one logged quantity over rounds, averaged over each round's cohort, for the methods that log it."""
    curves = _curves(group(records), lambda record: series(record, key))
    figure = _curves_figure(records, curves, shorten(printable(key), 40), ("round", ""), (4.0, 2.7))
    if _spans([value for curve in curves.values() for value in curve.low], 200):
        figure.axes[0].set_yscale("log")
        for axis_format in (figure.axes[0].yaxis.set_major_formatter, figure.axes[0].yaxis.set_minor_formatter):
            axis_format(ticker.LogFormatter(minor_thresholds=(2, 0.5)))  # the default formatter writes TeX
    return figure


def log_names(records: Sequence[RunRecord]) -> list[str]:
    """Return the names of the methods' own logs (`train.loss`, `mcsl.kl`), in order of first appearance."""
    columns = dict.fromkeys(key for record in records for key in record.metrics.columns)
    own = [key for key in columns if key not in NOT_A_LOG and not key.startswith(SCORES)]
    return [key for key in own if not key.endswith("_seconds") and has_values(records, key)]


def has_values(records: Iterable[RunRecord], key: str) -> bool:
    """Return whether any run has a finite value of this metric."""
    return any(len(series(record, key)) for record in records)


def client_spread(records: Sequence[RunRecord]) -> Figure:
    """Plot the primary metric of every client's personal model at the last evaluation, for all seeds together.

    The bar spans the middle half, the line is the median, and the diamond is the mean of the worst tenth. At most 200
    dots per method are drawn, evenly spaced in rank.
    """
    groups, primary = group(records), shared_primary(records)
    marks = strokes(groups)
    with drawing():
        figure = Figure(figsize=(WIDTH, 1.2 + 0.38 * len(groups)))
        x_label = f"personal {primary.name} of a client{primary.qualifier}"
        axes = figure.add_subplot(title="Spread over clients", xlabel=x_label)
        found = [_draw_spread(axes, place, g, primary, marks[g.label].colour) for place, g in enumerate(groups)]
        if not any(found):
            return _not_measured(axes)
        _name_rows(axes, [g.label for g in groups])
    return figure


def bytes_by_kind(records: Sequence[RunRecord]) -> Figure:
    """Plot the bytes of a whole run, in both directions: one bar per method and kind of content, mean over seeds."""
    groups = group(records)
    marks = strokes(groups)
    traffic = {g.label: _kinds(g) for g in groups}
    rows = [(label, kind) for label, kinds in traffic.items() for kind in kinds]
    with drawing():
        figure = Figure(figsize=(WIDTH, 1.0 + 0.25 * len(rows)))
        if not rows:
            return _not_measured(figure.add_subplot(title="Bytes by kind"))
        panels = figure.subplots(1, 2, sharex=True, sharey=True)
        largest = max(max(traffic[label][kind]) for label, kind in rows)
        for side, (axes, title) in enumerate(zip(panels, ("Uplink by kind", "Downlink"), strict=True)):
            widths = [traffic[label][kind][side] for label, kind in rows]
            bars = axes.barh(range(len(rows)), widths, 0.62, color=[marks[label].colour for label, _ in rows])
            axes.bar_label(bars, [size(width) if width else "" for width in widths], padding=3, fontsize=8)
            axes.set(title=title, xlim=(0, 1.5 * largest or 1), xticks=[])
            _name_rows(axes, [f"{shorten(label, 18)} · {printable(kind)}" for label, kind in rows])
            axes.tick_params(left=False, labelleft=not side)
            axes.spines["bottom"].set_visible(False)
    return figure


def partition_figure(class_counts: ArrayLike, classes: Sequence[object] | None = None, kind: str = "class") -> Figure:
    """Plot a partition: examples of each class (rows) at each client (columns), with examples per client above.

    `class_counts` has shape (K, Y); `classes` are the Y names. In tasks without classes, they are groups of examples, and `kind` is what
    to call one. Up to 120 clients and 30 classes are drawn as bubbles with area proportional to the number of examples, larger
    partitions as shaded cells. Raise DataError for invalid counts, or a wrong number of names.
    """
    counts = _checked_counts(class_counts)
    n_clients, n_classes = counts.shape
    names = [str(name) for name in (range(n_classes) if classes is None else classes)]
    if len(names) != n_classes:
        raise DataError(f"classes has {len(names)} names, but class_counts has {n_classes} classes")
    few = n_clients <= MAX_BUBBLES[0] and n_classes <= MAX_BUBBLES[1]
    width = min(max(1.6 + 0.19 * n_clients, WIDTH), 10.8) if few else 10.8
    with drawing():
        figure = Figure(figsize=(width, min(2.0 + 0.21 * n_classes, 6.5)))
        top, main = figure.subplots(2, 1, sharex=True, height_ratios=[1, max(2.5, 0.3 * min(n_classes, 20))])
        top.stairs(counts.sum(axis=1), np.arange(n_clients + 1) - 0.5, fill=True, color=ACCENT, alpha=0.55)
        top.set(title="Training examples", ylabel="examples", ylim=(0, None))
        top.yaxis.set_major_locator(ticker.MaxNLocator(2, integer=True))
        top.tick_params(bottom=False)
        if few:
            note = f"largest bubble: {counts.max():.0f} examples"
            top.set_title(note, loc="right", color=MUTED, fontsize=8, fontweight="normal")
            _draw_bubbles(main, counts, cell_points=72 * min((width - 1.4) / n_clients, 0.21))
        else:
            _draw_shades(main, counts)
        _name_classes(main, names)
        main.set(
            xlabel="client",
            ylabel="" if names == SINGLE_GROUP else kind,
            xlim=(-0.6, n_clients - 0.4),
            ylim=(n_classes - 0.4, -0.6),
        )
        main.xaxis.set_major_locator(ticker.MaxNLocator(20, integer=True, min_n_ticks=1))
    return figure


def _curves(groups: Sequence[Group], values: Callable[[RunRecord], pd.Series[float]]) -> dict[str, Curve]:
    """Return curves over rounds by label, without empty ones."""
    curves = {}
    for g in groups:
        table = pd.concat([values(record) for record in g.counted], axis=1).dropna(how="all").sort_index()
        if len(table):
            parts = (table.index, table.mean(axis=1), table.min(axis=1), table.max(axis=1))
            curves[g.label] = Curve(*(np.asarray(part, dtype=np.float64) for part in parts))
    return curves


def _over(curve: Curve, other: Curve) -> Curve:
    """Return `curve` over the mean of `other` instead of rounds, at rounds where both are known."""
    _, ours, theirs = np.intersect1d(curve.x, other.x, return_indices=True)
    return Curve(other.mean[theirs], curve.mean[ours], curve.low[ours], curve.high[ours])


def _curves_figure(
    records: Sequence[RunRecord],
    curves: Mapping[str, Curve],
    title: str,
    axis_names: tuple[str, str],
    shape: tuple[float, float] = (WIDTH, HEIGHT),
) -> Figure:
    marks = strokes(group(records))
    with drawing():
        figure = Figure(figsize=(shape[0], max(shape[1], 0.9 + 0.2 * len(curves))))
        axes = figure.add_subplot(title=title, xlabel=axis_names[0], ylabel=axis_names[1])
        if not curves:
            return _not_measured(axes)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True, min_n_ticks=1))
        for label, curve in curves.items():
            _draw_curve(axes, curve, marks[label])
        axes.autoscale_view()
        label_ends(axes, {label: (curve.x[-1], curve.mean[-1]) for label, curve in curves.items()}, marks)
    return figure


def _draw_curve(axes: Axes, curve: Curve, mark: Stroke) -> None:
    if len(curve.x) == 1:  # a line needs two points
        axes.plot(curve.x, curve.mean, "o", color=mark.colour)
        axes.vlines(curve.x, curve.low, curve.high, color=mark.colour)
    else:
        axes.plot(curve.x, curve.mean, mark.dash, color=mark.colour)
        axes.fill_between(curve.x, curve.low, curve.high, color=mark.colour, alpha=0.16, linewidth=0)


def _spans(values: Iterable[float], ratio: float) -> bool:
    """Return whether all values are positive and the largest is more than `ratio` times the smallest."""
    known = list(values)
    return bool(known) and min(known) > 0 and max(known) > ratio * min(known)


def _not_measured(axes: Axes) -> Figure:
    axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color=MUTED)
    axes.set(xticks=[], yticks=[])
    figure = axes.get_figure(root=True)
    assert figure is not None
    return figure


def _name_rows(axes: Axes, labels: Sequence[str]) -> None:
    """Name the rows at the left, from top to bottom, without horizontal grid lines."""
    axes.set_yticks(range(len(labels)), [shorten(label, 30) for label in labels], color=INK)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)


def _draw_spread(axes: Axes, row: int, members: Group, primary: Primary, colour: str) -> bool:
    """Draw one method. Return whether there was anything to draw."""
    values = _client_values(members, primary)
    if not len(values):
        return False
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    axes.barh(row, high - low, 0.56, left=low, color=colour, alpha=0.22)
    axes.vlines(median, row - 0.28, row + 0.28, color=colour, linewidth=2)
    dots = values if len(values) <= MAX_DOTS else np.quantile(values, np.linspace(0, 1, MAX_DOTS))
    # Multiples of the golden ratio spread the dots evenly and reproducibly.
    heights = row + 0.44 * ((np.arange(len(dots)) * 0.618034) % 1 - 0.5)
    axes.plot(dots, heights, "o", color=colour, markersize=3, markeredgewidth=0, alpha=0.6)
    worst = [headline(record, primary.measure("personal"), "worst10") for record in members.counted]
    known = [value for value in worst if value is not None]
    if known:
        axes.plot(
            [primary.scale * float(np.mean(known))], [row], "D", color=INK, markersize=4.5, markerfacecolor="none"
        )
    return True


def _client_values(members: Group, primary: Primary) -> Floats:
    """Return the sorted values, as shown, at each run's last evaluation, shape (clients of all seeds,)."""
    found: list[Floats] = [np.empty(0)]
    measure = primary.measure("personal")
    for record in members.counted:
        if record.clients is not None and measure in record.clients.columns:
            values = pd.to_numeric(record.clients[measure], errors="coerce")
            known = record.clients.assign(value=values)[values.notna()]
            last = known[known["round"] == known["round"].max()]
            found.append(primary.scale * last["value"].to_numpy(dtype=np.float64))
    return np.sort(np.concatenate(found))


def _kinds(members: Group) -> dict[str, tuple[float, float]]:
    """Return mean bytes (up, down) by kind, the largest kind first."""
    tables = [table for record in members.counted if (table := (record.summary or {}).get("bytes_by_kind"))]
    kinds = dict.fromkeys(kind for table in tables for way in ("uplink", "downlink") for kind in table.get(way, {}))

    def mean(way: str, kind: str) -> float:
        return float(np.mean([table.get(way, {}).get(kind, 0) for table in tables]))

    return dict(
        sorted(((kind, (mean("uplink", kind), mean("downlink", kind))) for kind in kinds), key=lambda row: -sum(row[1]))
    )


def _checked_counts(class_counts: ArrayLike) -> Floats:
    try:
        counts = np.asarray(class_counts, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"class_counts must be numbers of shape (clients, classes): {error}") from error
    if counts.ndim != 2 or not counts.size:
        raise DataError(f"class_counts must have shape (clients, classes), not {counts.shape}")
    if not np.isfinite(counts).all() or counts.min() < 0:
        raise DataError("class_counts must be counts: finite and not negative")
    return counts


def _draw_bubbles(axes: Axes, counts: Floats, cell_points: float) -> None:
    n_levels = 24  # one marker per size level keeps the SVG small
    largest = counts.max() or 1.0
    levels = np.ceil(n_levels * np.sqrt(counts / largest)).astype(int)
    for level in range(1, n_levels + 1):
        clients, classes = np.nonzero(levels == level)
        if len(clients):
            diameter = max(0.98 * cell_points * level / n_levels, 1.2)
            axes.plot(clients, classes, "o", color=ACCENT, markersize=diameter, markeredgewidth=0)


def _draw_shades(axes: Axes, counts: Floats) -> None:
    clear, full = (colors.to_rgba(ACCENT, alpha) for alpha in (0, 1))
    shades = colors.LinearSegmentedColormap.from_list("shades", [clear, full])
    norm = colors.PowerNorm(0.5, 0, counts.max() or 1.0)  # square-root scale, so that small counts are visible
    image = axes.imshow(counts.T, aspect="auto", interpolation="none", cmap=shades, norm=norm)
    figure = axes.get_figure(root=True)
    assert figure is not None
    bar = figure.colorbar(image, ax=axes, label="examples", pad=0.01, fraction=0.04)
    bar.solids.set_rasterized(True)  # type: ignore[union-attr]
    axes.grid(visible=False)


def _name_classes(axes: Axes, names: Sequence[str]) -> None:
    step = math.ceil(len(names) / 30)
    axes.set_yticks(range(0, len(names), step), [shorten(printable(name), 16) for name in names[::step]])
