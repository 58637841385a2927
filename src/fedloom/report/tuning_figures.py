"""Figures of a tuning: the validation score over each hyper-parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedloom.report.page_figures import FigureSection, for_page
from fedloom.report.primary import Primary, read_primary
from fedloom.report.style import (
    NAME_LETTERS,
    SERIES,
    Axes,
    Figure,
    Stroke,
    drawing,
    figure_of,
    framed,
    label_ends,
    names_margin,
    ticker,
)

SIZE = (4.9, 3.1)  # width and height of a figure in inches
LOG_FROM = 4  # minimum ratio of the largest to the smallest value for a logarithmic axis
MOST_TICKS = 6
NOTE = "Dot: a candidate, mean over seeds; line: the best candidate with each value."
HALVED = " Candidates that stopped have the scores of earlier rounds."


def tuning_figures(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the section of figures, one for each hyper-parameter that is a number, as the values of the page's template."""
    primary = read_primary(found["primary"], "tune.json")
    keys = dict.fromkeys(key for method in found["methods"] for key in method["keys"])
    points = {key: {m["label"]: _points(m["tried"], key, primary) for m in found["methods"]} for key in keys}
    points = {key: {label: each for label, each in lines.items() if len(each) > 1} for key, lines in points.items()}
    figures = [(_figure(key, lines, primary, list(found["methods"])), "") for key, lines in points.items() if lines]
    note = NOTE + HALVED * (len(found["rungs"]) > 1)
    return for_page([FigureSection("Score by hyper-parameter", "tuning", figures, note)] if figures else [])


def _points(tried: Sequence[Mapping[str, Any]], key: str, primary: Primary) -> dict[float, list[float]]:
    """Return the scores of the candidates, in the units of the report, by the value of a hyper-parameter in increasing order.

    Return an empty dictionary if the hyper-parameter is not a number.
    """
    by_value: dict[float, list[float]] = {}
    for one in tried:
        value = one["values"].get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return {}
        if one["mean"] is not None:
            by_value.setdefault(value, []).append(primary.scale * one["mean"])
    return dict(sorted(by_value.items()))


def _figure(
    key: str,
    lines: Mapping[str, Mapping[float, Sequence[float]]],
    primary: Primary,
    methods: Sequence[Mapping[str, Any]],
) -> Figure:
    labels = [method["label"] for method in methods]
    marks = {label: Stroke(SERIES[labels.index(label) % len(SERIES)], "-") for label in lines}
    with drawing():
        margins = (0.75, names_margin(lines, NAME_LETTERS), 0.38, 0.5)
        axes = framed(
            (SIZE[0], max(SIZE[1], 0.9 + 0.2 * len(lines))), margins, title=f"Validation {primary.name} by {key}"
        )
        axes.set(xlabel=key, ylabel=primary.label)
        _scale(axes, [value for line in lines.values() for value in line])
        ends = {}
        for label, line in lines.items():
            best = [primary.best(scores) for scores in line.values()]
            dots = [(value, score) for value, scores in line.items() for score in scores]
            axes.plot(
                *zip(*dots, strict=True), "o", color=marks[label].colour, markersize=4, markeredgewidth=0, alpha=0.7
            )
            axes.plot(list(line), best, color=marks[label].colour)
            ends[label] = (list(line)[-1], best[-1])
        axes.autoscale_view()  # the positions of names depend on the limits of the axes
        label_ends(axes, ends, marks)
    return figure_of(axes)


def _scale(axes: Axes, values: Sequence[float]) -> None:
    """Set the scale of the axis of values. If there are few values, each one has a tick."""
    each = sorted(set(values))
    if each[0] > 0 and each[-1] >= LOG_FROM * each[0]:
        axes.set(xscale="log")
        axes.xaxis.set_minor_locator(ticker.NullLocator())
    if len(each) <= MOST_TICKS:
        axes.xaxis.set_major_locator(ticker.FixedLocator(each))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:g}"))
