"""Figures of runs. Each is a separate `matplotlib.figure.Figure`. This module uses neither pyplot nor global state.

Every function with the argument `records` groups the records by method and settings. A method has the same colour and dashes in all
figures of the same records. If a quantity was not measured, the figure states this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedloom.report.groups import Group, group, headline, series, shared_primary
from fedloom.report.link_speeds import Network
from fedloom.report.looked_at import part_of
from fedloom.report.primary import VIEWS, Primary
from fedloom.report.read import RunRecord, printable
from fedloom.report.style import (
    INK,
    MUTED,
    NAME_LETTERS,
    SERIES,
    Axes,
    Figure,
    Stroke,
    blank,
    drawing,
    figure_of,
    framed,
    label_ends,
    names_margin,
    shorten,
    strokes,
    text_width,
    ticker,
)
from fedloom.report.units import duration, significant, size
from fedloom.report.waiting import Waiting, elapsed

Floats = NDArray[np.float64]

WIDTH, HEIGHT = 4.9, 3.1
LOG_SIZE = (3.2, 2.3)  # size of figures of logs, in inches
MAX_DOTS = 200
STEPS = (1, 2, 2.5, 5, 10)  # possible steps between ticks
MIN_SPAN = 10.0  # minimum span of an axis in percentage points, so that noise does not look like progress
MIN_SPAN_OF_VALUE = 0.1  # minimum span for other quantities, as a fraction of the largest value
SAME = 0.012  # lines closer than this fraction of the axis are drawn as one, in alternating colours
ROUNDS = ("lost", "late", "rejected", "skipped", "virtual_steps")  # cumulative counts of events in rounds
NOT_A_LOG = ("round", "uplink_bytes", "downlink_bytes", "cohort", *ROUNDS)
SCORES = tuple(f"{view}_" for view in (*VIEWS, "valid", "shared_head"))  # of metric names; names of logs contain a dot


class Curve(NamedTuple):
    """The mean of a quantity over seeds, with its range. All four arrays have the shape (points,)."""

    x: Floats
    mean: Floats
    low: Floats
    high: Floats


@dataclass(frozen=True, kw_only=True)
class Look:
    """The title, the axis names and the scales of a figure of curves. `over` is appended to the title, except for bars."""

    title: str
    axis_names: tuple[str, str]
    over: str = ""
    percent: bool = False
    shape: tuple[float, float] = (WIDTH, HEIGHT)
    x_log: bool = False
    y_log: bool = False


def metric_over_rounds(records: Sequence[RunRecord], view: str = "personal") -> Figure:
    """Plot the primary metric over completed rounds, as a mean over seeds with a band from the lowest to the highest seed.

    `view` is `personal`, `general` or `server`. Fractions are shown in percent. If all runs were evaluated only once, bars are drawn.
    """
    primary = shared_primary(records)
    curves = _curves(group(records), lambda record: _shown(record, primary, view))
    look = _over_rounds(_title(primary, view), primary)
    return _curves_figure(curves, strokes(group(records)), look)


def views_over_rounds(records: Sequence[RunRecord]) -> Figure:
    """Plot the primary metric of one method over rounds, with one line for each of the models that are scored."""
    (members,), primary = group(records), shared_primary(records)
    curves: dict[str, Curve] = {}
    for view in VIEWS:
        found = _curves([members], lambda record, view=view: _shown(record, primary, view))  # type: ignore[misc]
        if found:
            (curves[view],) = found.values()
    marks = {view: Stroke(SERIES[place], "-") for view, place in zip(VIEWS, (0, 1, 3), strict=True)}
    title = f"{primary.name[:1].upper()}{primary.name[1:]}"
    return _curves_figure(curves, marks, _over_rounds(title, primary))


def metric_over_bytes(records: Sequence[RunRecord], view: str = "personal") -> Figure:
    """Plot the primary metric over the number of bytes sent so far, in both directions, for all clients."""

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


def _over_rounds(title: str, primary: Primary) -> Look:
    return Look(title=title, axis_names=("round", primary.label), over=" over rounds", percent=primary.percent)


def _shown(record: RunRecord, primary: Primary, view: str) -> pd.Series[float]:
    """Return the values of the primary metric in the form in which they are shown, by round."""
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
    """Plot the primary metric over a cost. `over` is the name of the cost in the title; `shown` formats the cost on the axis."""
    groups, primary = group(records), shared_primary(records)
    curves = _curves(groups, lambda record: _shown(record, primary, view))
    costs = _curves(groups, cost)
    curves = {label: _over(curve, costs[label]) for label, curve in curves.items() if label in costs}
    curves = {label: curve for label, curve in curves.items() if len(curve.x)}
    x_log = _spans([curve.x[-1] for curve in curves.values()], 20)
    title = f"{_title(primary, view)} over {over}"
    look = Look(title=title, axis_names=(axis_name, primary.label), percent=primary.percent, x_log=x_log)
    figure = _curves_figure(curves, strokes(groups), look, bars=False)
    for axes in figure.axes if curves else ():
        if x_log:
            axes.xaxis.set_minor_formatter(ticker.NullFormatter())
        else:
            axes.xaxis.set_major_locator(ticker.MaxNLocator(4, steps=STEPS))
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: shown(x) if x >= 0 else ""))
    return figure


SHARPNESS_NOTE = (
    "Random filter-normalised directions; at distance 1 every filter has moved by its own norm. "
    "Line: mean over directions and seeds; band: from the lowest to the highest."
)


def has_sharpness(records: Sequence[RunRecord]) -> bool:
    """Return whether the sharpness of any run's server model was analysed."""
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
    look = Look(title="Loss around the server's model", axis_names=("distance", "cross-entropy"))
    figure = _curves_figure(curves, strokes(group(records)), look)
    for axes in figure.axes if curves else ():
        axes.xaxis.set_major_locator(ticker.MaxNLocator(5))
    return figure


def log_over_rounds(records: Sequence[RunRecord], key: str) -> Figure:
    """Plot one logged quantity over rounds, averaged over the cohort of each round, for the methods that log it."""
    curves = _curves(group(records), lambda record: series(record, key))
    y_log = _spans([value for curve in curves.values() for value in curve.low], 200)
    look = Look(title=shorten(printable(key), 36), axis_names=("round", ""), shape=LOG_SIZE, y_log=y_log)
    figure = _curves_figure(curves, strokes(group(records)), look)
    if y_log:
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

    The bar spans the middle half of the values, the line is the median, and the diamond is the mean of the worst tenth. At most 200 dots
    are drawn per method, evenly spaced in rank.
    """
    groups, primary = group(records), shared_primary(records)
    marks = strokes(groups)
    with drawing():
        x_label = f"personal {primary.name} of a client{primary.qualifier}"
        names = [g.label for g in groups]
        axes = _rows_axes(names, 0.38, title="Spread over clients", xlabel=x_label)
        found = [_draw_spread(axes, place, g, primary, marks[g.label].colour) for place, g in enumerate(groups)]
        if not any(found):
            return _not_measured(axes)
        if primary.percent:
            axes.set_xlim(-2, 102)
        _name_rows(axes, names)
    return figure_of(axes)


def bytes_by_kind(records: Sequence[RunRecord]) -> Figure:
    """Plot the number of bytes of a whole run, in both directions, with one bar per method and kind of content, as a mean over seeds."""
    groups = group(records)
    marks = strokes(groups)
    traffic = {g.label: _kinds(g) for g in groups}
    rows = [(label, kind) for label, kinds in traffic.items() for kind in kinds]
    names = [f"{shorten(label, 12)} · {shorten(printable(kind), 11)}" for label, kind in rows]
    with drawing():
        if not rows:
            return _not_measured(framed((WIDTH, 1.5), (0.3, 0.3, 0.4, 0.3), title="Bytes by kind"))
        figure = blank((WIDTH, 0.6 + 0.25 * len(rows)))
        height, left = figure.get_size_inches()[1], _rows_margin(names)
        width = (WIDTH - left - 0.1) / 2
        largest = max(max(traffic[label][kind]) for label, kind in rows)
        for side, title in enumerate(("Uplink", "Downlink")):
            box = ((left + side * width) / WIDTH, 0.1 / height, 0.93 * width / WIDTH, 1 - 0.5 / height)
            axes = figure.add_axes(box, title=title, xticks=[])
            widths = [traffic[label][kind][side] for label, kind in rows]
            bars = axes.barh(range(len(rows)), widths, 0.62, color=[marks[label].colour for label, _ in rows])
            axes.bar_label(bars, [size(width) if width else "" for width in widths], padding=3, fontsize=8)
            axes.set_xlim(0, 1.6 * largest or 1)
            _name_rows(axes, names)
            axes.tick_params(left=False, labelleft=not side)
            axes.spines["bottom"].set_visible(False)
    return figure


def _curves(groups: Sequence[Group], values: Callable[[RunRecord], pd.Series[float]]) -> dict[str, Curve]:
    """Return the curves over rounds by label. Empty curves are omitted."""
    curves = {}
    for g in groups:
        table = pd.concat([values(record) for record in g.counted], axis=1).dropna(how="all").sort_index()
        if len(table):
            parts = (table.index, table.mean(axis=1), table.min(axis=1), table.max(axis=1))
            curves[g.label] = Curve(*(np.asarray(part, dtype=np.float64) for part in parts))
    return curves


def _over(curve: Curve, other: Curve) -> Curve:
    """Return `curve` over the mean of `other` instead of rounds, for the rounds in which both are known."""
    _, ours, theirs = np.intersect1d(curve.x, other.x, return_indices=True)
    return Curve(other.mean[theirs], curve.mean[ours], curve.low[ours], curve.high[ours])


def _curves_figure(curves: Mapping[str, Curve], marks: Mapping[str, Stroke], look: Look, bars: bool = True) -> Figure:
    """Draw curves with their names at their ends.

    With `bars`, bars are drawn instead if each curve is one point of the same round.
    """
    only = {tuple(curve.x) for curve in curves.values()}
    if bars and len(only) == 1 and len(next(iter(only))) == 1:
        return _bars_figure(curves, marks, look)
    (width, height), letters = look.shape, NAME_LETTERS if look.shape[0] > LOG_SIZE[0] else NAME_LETTERS // 2
    with drawing():
        limits = _y_range(curves.values(), look.percent) if curves else (0, 1)
        y_ticks = ticker.MaxNLocator(6, steps=STEPS)
        numbers = ["0.001"] if look.y_log else [_number(y, 0) for y in y_ticks.tick_values(*limits)]
        margins = (
            text_width(numbers) + (0.35 if look.axis_names[1] else 0.15),
            names_margin(curves, letters),
            0.38,
            0.5,
        )
        axes = framed((width, max(height, 0.9 + 0.2 * len(curves))), margins, title=look.title + look.over)
        axes.set(xlabel=look.axis_names[0], ylabel=look.axis_names[1])
        if not curves:
            return _not_measured(axes)
        axes.set(xscale="log" if look.x_log else "linear", yscale="log" if look.y_log else "linear")
        if not look.x_log:
            axes.xaxis.set_major_locator(ticker.MaxNLocator(6, steps=STEPS, integer=True, min_n_ticks=1))
        if not look.y_log:
            axes.yaxis.set_major_locator(y_ticks)
            axes.yaxis.set_major_formatter(_number)
            axes.set_ylim(*limits)
        drawn = _alternating(curves, marks, axes.get_ylim())
        for label, curve in curves.items():
            _draw_curve(axes, curve, drawn[label])
        if drawn != marks:
            figure_of(axes).set_label("Lines that lie on each other alternate in colour.")
        axes.autoscale_view(scaley=look.y_log)
        label_ends(axes, {label: (curve.x[-1], curve.mean[-1]) for label, curve in curves.items()}, marks, letters)
    return figure_of(axes)


def _number(value: float, _: float) -> str:
    """Return the label of a tick."""
    return f"{0.0 if abs(value) < 1e-12 else value:.4g}".replace("-", "\N{MINUS SIGN}")


def _y_range(curves: Iterable[Curve], percent: bool) -> tuple[float, float]:
    """Return the limits of the y axis, which span at least `MIN_SPAN` percentage points or `MIN_SPAN_OF_VALUE` of the largest value."""
    known = list(curves)
    low, high = (float(fn([fn(ends) for ends in found])) for fn, found in (
        (min, [curve.low for curve in known]), (max, [curve.high for curve in known]),
    ))  # fmt: skip
    least = MIN_SPAN if percent else MIN_SPAN_OF_VALUE * max(abs(low), abs(high)) or 1.0
    middle, span = (low + high) / 2, max(1.08 * (high - low), least)
    if percent:  # the axis does not show impossible values
        middle = min(max(middle, span / 2 - 1), 101 - span / 2)
    return middle - span / 2, middle + span / 2


def _alternating(
    curves: Mapping[str, Curve], marks: Mapping[str, Stroke], limits: tuple[float, float]
) -> dict[str, Stroke]:
    """Return the strokes of curves. Curves that coincide have alternating dashes, because the last would otherwise hide the others."""
    bundles: list[list[str]] = []
    for label, curve in curves.items():
        bundle = next((names for names in bundles if _same(curves[names[0]], curve, limits)), None)
        if bundle is None:
            bundles.append([label])
        else:
            bundle.append(label)
    found = dict(marks)
    for names in (bundle for bundle in bundles if len(bundle) > 1):
        for place, label in enumerate(names):
            dashes = (3.0 * (len(names) - place), (3.0, 3.0 * (len(names) - 1)))
            found[label] = marks[label]._replace(dash=dashes)
    return found


def _same(one: Curve, other: Curve, limits: tuple[float, float]) -> bool:
    """Return whether two curves cannot be distinguished on an axis with these limits."""
    if len(one.x) < 2 or not np.array_equal(one.x, other.x):
        return False
    return bool(np.abs(one.mean - other.mean).max() < SAME * (limits[1] - limits[0]))


def _bars_figure(curves: Mapping[str, Curve], marks: Mapping[str, Stroke], look: Look) -> Figure:
    """Draw one bar for each curve, which has one point: the mean over seeds, with a stroke from the lowest to the highest seed."""
    labels, values = list(curves), [float(curve.mean[0]) for curve in curves.values()]
    number = next(iter(curves.values())).x[0]
    title = f"{look.title}, {look.axis_names[0]} {number:g}"
    least, most = min(0.0, *(c.low[0] for c in curves.values())), max(0.0, *(c.high[0] for c in curves.values()))
    with drawing():
        axes = _rows_axes(labels, 0.3, look.shape[0], title=title, xlabel=look.axis_names[1])
        axes.barh(range(len(labels)), values, 0.62, color=[marks[label].colour for label in labels])
        for row, (value, curve) in enumerate(zip(values, curves.values(), strict=True)):
            axes.hlines(row, curve.low[0], curve.high[0], color=INK, linewidth=1.2)
            text = f"{value:.1f}" if look.percent else significant(value)
            end = (max(float(curve.high[0]), 0.0), row)
            axes.annotate(text, end, (4, 0), textcoords="offset points", fontsize=8, verticalalignment="center")
        axes.set_xlim(1.25 * least, most + 0.25 * (most - least) if most > least else 1)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(4, steps=STEPS))
        _name_rows(axes, labels)
    return figure_of(axes)


def _rows_axes(names: Sequence[str], row: float, width: float = WIDTH, **labels: str) -> Axes:
    """Return the axes of a figure with one row for each of `names`. A row has the height `row`, in inches."""
    return framed((width, 1.0 + row * len(names)), (_rows_margin(names), 0.15, 0.38, 0.5), **labels)


def _rows_margin(names: Iterable[str]) -> float:
    return text_width(shorten(name, 30) for name in names) + 0.15


def _draw_curve(axes: Axes, curve: Curve, mark: Stroke) -> None:
    if curve.x[0] == curve.x[-1]:  # the curve has one point, or nothing was sent
        axes.plot(curve.x[-1:], curve.mean[-1:], "o", color=mark.colour)
        axes.vlines(curve.x[-1], curve.low[-1], curve.high[-1], color=mark.colour)
    else:
        axes.plot(curve.x, curve.mean, linestyle=mark.dash, color=mark.colour, dash_capstyle="butt")
        axes.fill_between(curve.x, curve.low, curve.high, color=mark.colour, alpha=0.16, linewidth=0)


def _spans(values: Iterable[float], ratio: float) -> bool:
    """Return whether all values are positive, and the largest is more than `ratio` times the smallest."""
    known = list(values)
    return bool(known) and min(known) > 0 and max(known) > ratio * min(known)


def _not_measured(axes: Axes) -> Figure:
    axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color=MUTED)
    axes.set(xticks=[], yticks=[])
    return figure_of(axes)


def _name_rows(axes: Axes, labels: Sequence[str]) -> None:
    """Write the names of the rows at the left, from top to bottom, and draw no horizontal grid lines."""
    axes.set_yticks(range(len(labels)), [shorten(label, 30) for label in labels], color=INK)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)


def _draw_spread(axes: Axes, row: int, members: Group, primary: Primary, colour: str) -> bool:
    """Draw one method. Return whether there were any values to draw."""
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
    """Return the sorted values (clients of all seeds,) at each run's last evaluation, in the form in which they are shown."""
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
    """Return the mean numbers of bytes (up, down) by kind, the largest kind first."""
    tables = [table for record in members.counted if (table := (record.summary or {}).get("bytes_by_kind"))]
    kinds = dict.fromkeys(kind for table in tables for way in ("uplink", "downlink") for kind in table.get(way, {}))

    def mean(way: str, kind: str) -> float:
        return float(np.mean([table.get(way, {}).get(kind, 0) for table in tables]))

    return dict(
        sorted(((kind, (mean("uplink", kind), mean("downlink", kind))) for kind in kinds), key=lambda row: -sum(row[1]))
    )
