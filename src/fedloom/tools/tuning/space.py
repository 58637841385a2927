"""The space of candidates in which a method is tuned: values and ranges of its hyper-parameters, and random draws from them."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from fedloom.config.settings import Values
from fedloom.errors import ConfigError
from fedloom.methods.registry import method_class
from fedloom.ranges import at_limit
from fedloom.rng import Stream
from fedloom.tools.compare_rows import Row, grid_of, label_of, spelt_out

NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
RANGE = re.compile(rf"({NUMBER})\.\.({NUMBER})")
LOG_FROM = 10  # minimum ratio of the ends of a range for a logarithmic scale
NEAR_END = 0.05  # fraction of a range: a best value that is closer to an end is at the edge
MOST_DRAWS = 100  # maximum number of draws per requested candidate


class Range(NamedTuple):
    """The numbers from `low` to `high`, rounded to three significant digits, or the integers in this range if `whole`."""

    low: float
    high: float
    whole: bool

    @property
    def log(self) -> bool:
        """Whether the scale is logarithmic: `low` is above 0, and `high` is at least ten times as large."""
        return self.low > 0 and self.high >= LOG_FROM * self.low

    def value(self, place: float) -> float | int:
        """Return the value at a place from 0 (`low`) to 1 (`high`)."""
        ratio, length = self.high / self.low if self.log else 1.0, self.high - self.low
        exact = self.low * ratio**place if self.log else self.low + place * length
        near = min(max(float(f"{exact:.3g}"), self.low), self.high)
        return round(exact) if self.whole else near

    def place(self, value: float) -> float:
        """Return the place of a value, which is the inverse of `value`."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


Space = Mapping[str, Sequence[Any] | Range]
"""The values or the range of each hyper-parameter that is tuned."""


class Contender(NamedTuple):
    """A method (or variant) that is tuned: its row as given by the user, and its space."""

    row: Row
    space: Space

    @property
    def label(self) -> str:
        """The name of the row."""
        return self.row.label

    @property
    def size(self) -> float:
        """The number of different candidates, or infinity if a hyper-parameter has a range."""
        return math.prod(math.inf if isinstance(values, Range) else len(values) for values in self.space.values())

    def rows(self, chosen: Sequence[Values]) -> list[Row]:
        """Return one row for each chosen candidate, with all hyper-parameters. Its name contains the values that differ."""
        return [self.candidate(values) for values in chosen]

    def candidate(self, values: Values) -> Row:
        """Return the row of one candidate."""
        named = {key: value for key, value in values.items() if _varies(self.space[key])}
        label = label_of(self.label, named)
        return spelt_out(self.row._replace(label=label, method={**self.row.method, **values}))

    def edges(self, best: Values) -> Iterator[tuple[str, str]]:
        """Yield each hyper-parameter whose best value is at an edge of its space, and which edge it is: `smallest` or `largest`.

        Edges that are limits of the method, such as `mu=0`, are omitted, because no value beyond them could be tried.
        """
        hints = get_type_hints(method_class(self.row.method["name"]), include_extras=True)
        for key, values in self.space.items():
            which = _edge(values, best[key])
            if which and not at_limit(hints[key], best[key]):
                yield key, which


def contender_of(row: Row) -> Contender:
    """Return a method with the values and ranges of its hyper-parameters. Raise ConfigError if a range is invalid."""
    hints = get_type_hints(method_class(row.method["name"]))
    ranges = {key: found for key, text in row.method.items() if (found := _range(row.label, key, text, hints.get(key)))}
    space = {key: ranges.get(key) or values for key, values in {**row.method, **grid_of(row)}.items()}
    tuned = {key: values for key, values in space.items() if key in ranges or key in grid_of(row)}
    return Contender(row, tuned)


def whole_grid(space: Space) -> list[Values]:
    """Return all candidates of a space without ranges. The last hyper-parameter varies fastest."""
    lists = [list(values) for values in space.values()]
    return [dict(zip(space, chosen, strict=True)) for chosen in itertools.product(*lists)]


def draws(space: Space, n: int, stream: Stream) -> list[Values]:
    """Return `n` different candidates, drawn at random.

    Raises:
        ConfigError: the ranges contain too few different candidates.
    """
    if not any(isinstance(values, Range) for values in space.values()):
        grid = whole_grid(space)
        return [grid[place] for place in sorted(stream.permutation(len(grid))[:n].tolist())]
    found: list[Values] = []
    for _ in range(MOST_DRAWS * n):
        values = {key: _drawn_value(among, stream) for key, among in space.items()}
        if values not in found:
            found.append(values)
        if len(found) == n:
            return found
    raise ConfigError(f"tune.candidates={n}: the ranges have too few different values; lower it, or widen the ranges")


def _drawn_value(among: Sequence[Any] | Range, stream: Stream) -> Any:
    if isinstance(among, Range):
        return among.value(float(stream.numpy.random()))
    return among[int(stream.numpy.integers(len(among)))]


def _range(label: str, key: str, text: Any, hint: Any) -> Range | None:
    """Return the range for `LOW..HIGH`, or None if the value has another form. Raise ConfigError if the range is invalid."""
    ends = RANGE.fullmatch(text) if isinstance(text, str) else None
    if not ends:
        return None
    kinds = {get_origin(part) or part for part in (hint, *get_args(hint))}
    low, high = map(float, ends.groups())
    if not kinds & {int, float} or bool in kinds:
        raise ConfigError(f"{label}.{key}={text}: is a range, but {key} is not a number; list its values")
    whole = float not in kinds
    if not low < high or (whole and not (low.is_integer() and high.is_integer())):
        raise ConfigError(f"{label}.{key}={text}: must be LOW..HIGH with LOW below HIGH{', both integers' * whole}")
    return Range(low, high, whole)


def _varies(values: Sequence[Any] | Range) -> bool:
    return isinstance(values, Range) or len(values) > 1


def _edge(values: Sequence[Any] | Range, best: Any) -> str:
    """Return the edge at which the best value is (`smallest` or `largest`), or "" if it is at neither."""
    if isinstance(values, Range):
        place = values.place(best)
        return "smallest" if place < NEAR_END else "largest" if place > 1 - NEAR_END else ""
    numbers = [value for value in values if type(value) in (int, float)]
    if len(numbers) < max(len(values), 2):
        return ""
    return "smallest" if best == min(numbers) else "largest" if best == max(numbers) else ""
