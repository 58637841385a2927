"""Figures of partitions: the number of examples by client and class."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedloom.errors import DataError
from fedloom.report.read import printable
from fedloom.report.style import (
    ACCENT,
    INK,
    MUTED,
    Axes,
    Figure,
    Line2D,
    blank,
    colors,
    drawing,
    figure_of,
    framed,
    placed,
    shorten,
    text_width,
    ticker,
)

Floats = NDArray[np.float64]

MAX_NUMBERS = (20, 20)  # maximum numbers of clients and classes in a heat map with numbers
MAX_BUBBLES = (120, 30)
MIN_WIDTH, MAX_WIDTH = 3.2, 10.8  # width of a figure, in inches
BUBBLE_LEVELS = 24  # number of sizes; one marker per size keeps the SVG small
SINGLE_GROUP = ["examples"]  # names of a partition's groups if the task has no groups of examples


def partition_figure(
    class_counts: ArrayLike,
    classes: Sequence[object] | None = None,
    kind: str = "class",
    title: str = "Training examples",
    largest: float | None = None,
) -> Figure:
    """Plot a partition as the number of examples of each class (rows) on each client (columns).

    Up to 20 clients and classes are drawn as a heat map with numbers. Up to 120 clients and 30 classes are drawn as bubbles with area
    proportional to the number of examples. Larger partitions are drawn as shaded cells.

    Args:
        class_counts: numbers of examples (K, Y).
        classes: the Y names. In tasks without classes, they are groups of examples.
        kind: the word for a class.
        largest: the number of examples with the full shade or size; default: the largest number in this partition.

    Raises:
        DataError: the counts are invalid, or the number of names is wrong.
    """
    counts = _checked_counts(class_counts)
    n_clients, n_classes = counts.shape
    names = [str(name) for name in (range(n_classes) if classes is None else classes)]
    if len(names) != n_classes:
        raise DataError(f"classes has {len(names)} names, but class_counts has {n_classes} classes")
    names, most = [shorten(printable(name), 16) for name in names], max(largest or counts.max(), 1.0)
    if n_clients <= MAX_NUMBERS[0] and n_classes <= MAX_NUMBERS[1]:
        draw = _numbers
    else:
        draw = _bubbles if n_clients <= MAX_BUBBLES[0] and n_classes <= MAX_BUBBLES[1] else _shades
    with drawing():
        axes = draw(counts, names, most, title)
        axes.set_xlabel("client")
        if names != SINGLE_GROUP:
            axes.set_ylabel(kind)
    return figure_of(axes)


def _numbers(counts: Floats, names: Sequence[str], most: float, title: str) -> Axes:
    """Draw a heat map with numbers, and a row with the total of each client."""
    n_clients, n_classes = counts.shape
    cell = 0.27 if counts.sum(axis=1).max() < 1000 else 0.36
    left = 0.42 + text_width(names)
    size = (max(left + cell * n_clients + 0.1, MIN_WIDTH), 0.38 + 0.21 * (n_classes + 1.3) + 0.5)
    axes = framed(size, (left, size[0] - left - cell * n_clients, 0.38, 0.5), title=title)
    clients, rows = np.nonzero(counts)
    shares = np.sqrt(np.minimum(counts[clients, rows] / most, 1))  # square roots, so that small counts are visible
    shades = colors.to_rgba_array(ACCENT).repeat(len(clients), axis=0)
    shades[:, 3] = 0.06 + 0.54 * shares
    axes.bar(clients, np.full(len(clients), 0.94), 0.96, rows - 0.47, color=shades)
    for client, row in zip(clients.tolist(), rows.tolist(), strict=True):
        _number(axes, client, row, counts[client, row])
    for place, total in enumerate(counts.sum(axis=1)):
        _number(axes, place, n_classes + 0.3, total, color=MUTED)
    axes.set_yticks([*range(n_classes), n_classes + 0.3], [*names, "all"])
    axes.set_xticks(range(n_clients))
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set(xlim=(-0.5, n_clients - 0.5), ylim=(n_classes + 0.8, -0.55))
    return axes


def _number(axes: Axes, x: float, y: float, count: float, color: str = INK) -> None:
    text = f"{count:.0f}" if count < 10_000 else f"{count / 1000:.3g}k"
    axes.text(x, y, text, fontsize=7.5, color=color, ha="center", va="center")


def _bubbles(counts: Floats, names: Sequence[str], most: float, title: str) -> Axes:
    """Draw bubbles with a legend of sizes, and the total of each client above them."""
    n_clients, n_classes = counts.shape
    left = 0.42 + text_width(names)
    width = min(max(left + 0.1 + 0.19 * n_clients, MIN_WIDTH + 1), MAX_WIDTH)
    cell_points = 72 * min((width - left - 0.1) / n_clients, 0.21)
    main = _with_totals((width, 1.6 + 0.21 * n_classes), left, counts, title)
    levels = np.ceil(BUBBLE_LEVELS * np.sqrt(np.minimum(counts / most, 1))).astype(int)
    for level in range(1, BUBBLE_LEVELS + 1):
        clients, classes = np.nonzero(levels == level)
        if len(clients):
            main.plot(clients, classes, "o", color=ACCENT, markersize=_diameter(level, cell_points), markeredgewidth=0)
    sizes = sorted({max(round(most * share), 1) for share in (1, 0.25, 0.04)})
    handles = [
        Line2D([], [], linestyle="", marker="o", color=ACCENT, markeredgewidth=0, label=f"{n}",
               markersize=_diameter(math.ceil(BUBBLE_LEVELS * math.sqrt(n / most)), cell_points))
        for n in sizes
    ]  # fmt: skip
    figure_of(main).legend(
        handles=handles, loc="upper right", borderaxespad=1.2, ncols=len(handles), handletextpad=0.1, columnspacing=0.8
    )
    _name_axes(main, names, n_clients)
    return main


def _diameter(level: int, cell_points: float) -> float:
    return max(0.98 * cell_points * level / BUBBLE_LEVELS, 1.2)


def _shades(counts: Floats, names: Sequence[str], most: float, title: str) -> Axes:
    """Draw shaded cells with a colour bar, and the total of each client above them."""
    n_clients, n_classes = counts.shape
    main = _with_totals((MAX_WIDTH, min(2.0 + 0.21 * n_classes, 6.5)), 0.42 + text_width(names), counts, title, 0.8)
    clear, full = (colors.to_rgba(ACCENT, alpha) for alpha in (0, 1))
    shades = colors.LinearSegmentedColormap.from_list("shades", [clear, full])
    norm = colors.PowerNorm(0.5, 0, most)  # square-root scale, so that small counts are visible
    image = main.imshow(counts.T, aspect="auto", interpolation="none", cmap=shades, norm=norm)
    box = main.get_position()
    bar = figure_of(main).colorbar(
        image, cax=figure_of(main).add_axes((box.x1 + 0.012, box.y0, 0.012, box.height)), label="examples"
    )
    bar.solids.set_rasterized(True)  # type: ignore[union-attr]
    main.grid(visible=False)
    _name_axes(main, names, n_clients)
    return main


def _with_totals(size: tuple[float, float], left: float, counts: Floats, title: str, right: float = 0.1) -> Axes:
    """Return the main axes of a new figure, which are below axes with the number of examples of each client."""
    figure, n_clients = blank(size), len(counts)
    top = placed(figure, (left, right, 0.38, size[1] - 0.88), title=title)
    top.stairs(counts.sum(axis=1), np.arange(n_clients + 1) - 0.5, fill=True, color=ACCENT, alpha=0.55)
    top.set(ylim=(0, None), xlim=(-0.6, n_clients - 0.4), xticklabels=[])
    top.yaxis.set_major_locator(ticker.MaxNLocator(2, integer=True))
    top.tick_params(bottom=False)
    return placed(figure, (left, right, 1.0, 0.5))


def _name_axes(axes: Axes, names: Sequence[str], n_clients: int) -> None:
    step = math.ceil(len(names) / 30)
    axes.set_yticks(range(0, len(names), step), names[::step])
    axes.set(xlim=(-0.6, n_clients - 0.4), ylim=(len(names) - 0.4, -0.6))
    axes.xaxis.set_major_locator(ticker.MaxNLocator(20, integer=True, min_n_ticks=1))


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
