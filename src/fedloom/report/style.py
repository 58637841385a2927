"""The style of figures: colours, fonts, and the conversion of matplotlib figures to SVG that supports the page's dark mode."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
except ImportError as missing:
    raise UsageError("plots need matplotlib: pip install 'fedloom[report]'") from missing

# Other modules import matplotlib's names from here, so that one error message covers a missing matplotlib.
__all__ = ["Axes", "Figure", "Line2D", "Stroke", "blank", "colors", "drawing", "figure_of", "framed", "label_ends"]
__all__ += ["names_margin", "placed", "plain_svg", "shorten", "strokes", "svg", "text_width", "ticker"]
__all__ += ["ACCENT", "CSS_NAMES", "INK", "MUTED", "NAME_LETTERS", "RULE", "SERIES"]

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
        "legend.fontsize": 8,
        "legend.frameon": False,
        "legend.labelcolor": MUTED,
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


LETTER = 0.078  # mean width of a letter at the normal font size, in inches
NAME_AT = 0.46  # distance between the axes and the names of lines, in inches
NAME_LETTERS = 22  # maximum number of letters of such a name


class Stroke(NamedTuple):
    """The colour and line style of one method in all figures."""

    colour: str
    dash: str | tuple[float, tuple[float, ...]]


@contextmanager
def drawing() -> Iterator[None]:
    """Apply the style of the report within the context, in which a figure is built or saved."""
    with matplotlib.rc_context(dict(SETTINGS)), warnings.catch_warnings():
        # Method names may contain glyphs that matplotlib's font lacks but browsers have.
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
    """Return `label`, shortened to `width` characters."""
    return label if len(label) <= width else f"{label[: width - 1]}…"


def framed(size: tuple[float, float], margins: tuple[float, float, float, float], **labels: Any) -> Axes:
    """Return the axes of a new figure with fixed margins. This is several times as fast as a layout that measures all text.

    Args:
        size: width and height of the figure in inches.
        margins: left, right, top and bottom margin in inches.
        labels: title and labels of the axes.
    """
    return placed(blank(size), margins, **labels)


def blank(size: tuple[float, float]) -> Figure:
    """Return a figure whose axes will be placed manually. `size` is its width and height in inches."""
    figure = Figure(figsize=size)
    figure.set_layout_engine("none")
    return figure


def placed(figure: Figure, margins: tuple[float, float, float, float], **labels: Any) -> Axes:
    """Add axes with fixed margins (left, right, top, bottom) in inches to a figure, and return the axes."""
    (width, height), (left, right, top, bottom) = figure.get_size_inches(), margins
    box = (left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height)
    return figure.add_axes(box, **labels)


def text_width(texts: Iterable[str]) -> float:
    """Return the approximate width of the longest text at the normal font size, in inches."""
    return LETTER * max(map(len, texts), default=0)


def figure_of(axes: Axes) -> Figure:
    """Return the figure to which axes belong."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    return figure


def names_margin(names: Iterable[str], letters: int) -> float:
    """Return the right margin, in inches, that `label_ends` needs for these names, shortened to `letters` letters."""
    return NAME_AT + text_width(shorten(name, letters) for name in names) + 0.05


def label_ends(
    axes: Axes, ends: Mapping[str, tuple[float, float]], marks: Mapping[str, Stroke], letters: int = NAME_LETTERS
) -> None:
    """Write the name of each line next to the axes, with a sample of its stroke, at the height of its end (in data units).

    Names are moved apart to avoid overlap. A dotted grey leader connects the end and the sample. Names are shortened to `letters` letters.
    """
    figure = figure_of(axes)
    width, height = axes.get_position().size * figure.get_size_inches()
    places = {label: axes.transAxes.inverted().transform(axes.transData.transform(end)) for label, end in ends.items()}
    heights = _spread({label: float(place[1]) for label, place in places.items()}, gap=0.19 / height)
    for label, y in heights.items():
        start, sample = 1 + 0.12 / width, (1 + 0.16 / width, 1 + 0.4 / width)
        leader = (places[label][0] + 0.04 / width, start), (places[label][1], y)
        for line, style in (
            (leader, {"color": MUTED, "linestyle": (0, (1, 2)), "linewidth": 0.9}),
            ((sample, (y, y)), {"color": marks[label].colour, "linestyle": marks[label].dash}),
        ):
            figure.add_artist(Line2D(*line, transform=axes.transAxes, **style))
        axes.text(1 + NAME_AT / width, y, shorten(label, letters), transform=axes.transAxes, verticalalignment="center")


def _spread(heights: Mapping[str, float], gap: float) -> dict[str, float]:
    """Return the heights in the same order, moved up and down equally so that they are at least `gap` apart and at most 1."""
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

    Colours become CSS variables, `name` makes ids unique, and there are no external references.
    """
    text = plain_svg(figure)
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", text[text.index("<svg") :], flags=re.DOTALL)
    body = re.sub(r"<[^>]*>", lambda tag: _inlined(tag.group(), name), text).split(">", 1)[1]
    width, height = figure.get_size_inches() * 72
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{_attribute(description)}">{body}'


def plain_svg(figure: Figure) -> str:
    """Return `figure` as an SVG file without a background."""
    buffer = io.StringIO()
    for patch in (figure.patch, *(axes.patch for axes in figure.axes)):
        patch.set_visible(False)
    with drawing():  # `savefig` would draw twice
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})  # type: ignore[no-untyped-call]
    return buffer.getvalue()


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
