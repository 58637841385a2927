"""Style of figures: colours, fonts, and conversion of matplotlib figures to SVG that supports the page's dark mode."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from fedloom.errors import UsageError
from fedloom.report.groups import Group

try:
    import matplotlib
    from matplotlib import colors, ticker
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as missing:
    raise UsageError("plots need matplotlib: pip install 'fedloom[report]'") from missing

# Other modules import matplotlib's names from here, so that there is one error message if it is missing.
__all__ = ["Axes", "Figure", "Stroke", "colors", "drawing", "label_ends", "shorten", "strokes", "svg", "ticker"]
__all__ += ["ACCENT", "CSS_NAMES", "INK", "MUTED", "RULE", "SERIES"]

INK, MUTED, RULE, ACCENT = "#1f2430", "#667085", "#d5dae2", "#2f6db5"
# Six hues after Okabe & Ito (2008), darkened so that thin lines are visible on white. Further series differ by dashes.
SERIES = ("#0072b2", "#d55e00", "#00875f", "#b14a8b", "#b58300", "#4aa3df")
# Each colour has a CSS variable, so that a page can lighten the colours for a dark background.
CSS_NAMES: Mapping[str, str] = MappingProxyType(
    {INK: "--ink", MUTED: "--muted", RULE: "--rule", ACCENT: "--accent"}
    | {colour: f"--series-{place}" for place, colour in enumerate(SERIES, start=1)}
)

SETTINGS: Mapping[Any, object] = MappingProxyType(
    {
        "axes.axisbelow": True,
        "axes.edgecolor": RULE,
        "axes.grid": True,
        "axes.labelcolor": MUTED,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlelocation": "left",
        "axes.titlepad": 10,
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "figure.constrained_layout.use": True,
        "figure.facecolor": "white",
        "font.size": 9,
        "grid.color": RULE,
        "grid.linewidth": 0.6,
        "lines.linewidth": 1.8,
        "savefig.dpi": 160,
        "svg.fonttype": "none",
        "svg.hashsalt": "fedloom",
        "text.color": INK,
        "text.parse_math": False,
        "xtick.color": MUTED,
        "xtick.major.size": 3,
        "ytick.color": MUTED,
        "ytick.major.size": 0,
    }
)


class Stroke(NamedTuple):
    """The colour and line style of one method in all figures."""

    colour: str
    dash: str


@contextmanager
def drawing() -> Iterator[None]:
    """Apply the style of the report during the block, in which a figure is built or saved."""
    with matplotlib.rc_context(dict(SETTINGS)), warnings.catch_warnings():
        # Method names may have glyphs that matplotlib's font lacks; browsers have them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def strokes(groups: Sequence[Group]) -> dict[str, Stroke]:
    """Return one stroke per label, by position in `groups`."""
    dashes = ("-", "--", ":", "-.")
    return {
        member.label: Stroke(SERIES[place % len(SERIES)], dashes[place // len(SERIES) % len(dashes)])
        for place, member in enumerate(groups)
    }


def shorten(label: str, width: int = 26) -> str:
    """Shorten `label` to `width` characters."""
    return label if len(label) <= width else f"{label[: width - 1]}…"


def label_ends(axes: Axes, ends: Mapping[str, tuple[float, float]], marks: Mapping[str, Stroke]) -> None:
    """Write each label next to the axes at the height of its line's end (in data units), moved apart to avoid overlap."""
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = {label: float(to_axes.transform(end)[1]) for label, end in ends.items()}
    figure_height = axes.get_figure(root=True).get_size_inches()[1]  # type: ignore[union-attr]
    places = _spread(heights, gap=0.19 / max(figure_height - 1.0, 0.5))
    for label, place in places.items():
        line = {
            "arrowstyle": "-",
            "color": marks[label].colour,
            "linewidth": 0.9,
            "shrinkA": 1,
            "shrinkB": 2,
            "relpos": (0, 0.5),
        }
        axes.annotate(
            shorten(label, 22),
            xy=ends[label],
            xytext=(1.04, place),
            textcoords="axes fraction",
            verticalalignment="center",
            arrowprops=line,
            annotation_clip=False,
        )


def _spread(heights: Mapping[str, float], gap: float) -> dict[str, float]:
    """Return the heights in the same order, at least `gap` apart and at most 1, moved equally up and down."""
    order = sorted(heights, key=lambda label: heights[label])
    wanted = np.array([heights[label] for label in order])
    steps = gap * np.arange(len(order))
    upwards = np.maximum.accumulate(wanted - steps)
    downwards = np.minimum.accumulate((wanted - steps)[::-1])[::-1]
    highest = 1 - steps[-1]
    places = np.minimum((upwards + downwards) / 2, highest) + steps
    return dict(zip(order, places.tolist(), strict=True))


def svg(figure: Figure, name: str, description: str) -> str:
    """Return `figure` as an `<svg>` element for a page.

    Colours become CSS variables, ids are made unique with `name`, and there are no external references.
    """
    buffer = io.StringIO()
    with drawing():
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", text[text.index("<svg") :], flags=re.DOTALL)
    body = re.sub(r"<[^>]*>", lambda tag: _inlined(tag.group(), name), text).split(">", 1)[1]
    width, height = figure.get_size_inches() * 72
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{_attribute(description)}">{body}'


def _inlined(tag: str, name: str) -> str:
    tag = re.sub(r'\bid="', f'id="{name}-', tag)
    tag = re.sub(r'\b(?:xlink:)?href="#', f'href="#{name}-', tag)
    tag = tag.replace("xlink:href=", "href=").replace("url(#", f"url(#{name}-")
    for colour, variable in CSS_NAMES.items():
        tag = tag.replace(colour, f"var({variable})")
    # The page sets the font. Most ids, and rotations by 0, are not needed.
    return re.sub(r""" id="[^"]*_\d+"| transform="rotate\(-?0 [^"]*"|font-family: [^;"]*; ?""", "", tag)


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
