"""The robust rules that settings can name. `fedloom.combining.robust` contains their computation; this module does not need torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from fedloom.errors import suggest


@dataclass(frozen=True, kw_only=True)
class RuleKind:
    """A rule that can be named in the settings."""

    summary: str
    example: str
    number: str = ""  # name of the parameter after the colon
    allowed: Callable[[float], bool] = bool
    limits: str = ""  # `allowed` in words
    cohort: Callable[[float], int] = lambda _: 1  # size of the smallest cohort with which the rule keeps its guarantee
    least: int = 1  # minimum number of uplinks that it can combine


def _is_count(number: float) -> bool:
    return number >= 1 and number == int(number)


def _for_krum(hostile: float) -> int:
    return 2 * int(hostile) + 3


RULES: Mapping[str, RuleKind] = MappingProxyType(
    {
        "median": RuleKind(summary="the median of each coordinate", example="median"),
        "trimmed": RuleKind(
            summary="the mean of each coordinate, without the largest and the smallest FRACTION of its values",
            example="trimmed:0.2",
            number="FRACTION",
            allowed=lambda fraction: 0 < fraction < 0.5,
            limits="above 0 and below 0.5",
        ),
        "krum": RuleKind(
            summary="the one update that is closest to its neighbours, if at most F clients are malicious",
            example="krum:1",
            number="F",
            allowed=_is_count,
            limits="an integer of at least 1",
            cohort=_for_krum,
            least=_for_krum(1),
        ),
        "multikrum": RuleKind(
            summary="the mean of the updates, without the F updates that are farthest from their neighbours",
            example="multikrum:1",
            number="F",
            allowed=_is_count,
            limits="an integer of at least 1",
            cohort=_for_krum,
            least=_for_krum(1),
        ),
        "geometric": RuleKind(
            summary="the geometric median: the point with the smallest mean distance to the updates",
            example="geometric",
        ),
        "norm-bound": RuleKind(
            summary="the mean, after updates of more than C times the median norm are scaled down to that norm",
            example="norm-bound:1",
            number="C",
            allowed=lambda bound: bound > 0,
            limits="above 0",
        ),
        "clip": RuleKind(
            summary="centred clipping: steps from the median towards the mean, with each update limited to C times the median distance",
            example="clip:1",
            number="C",
            allowed=lambda bound: bound > 0,
            limits="above 0",
        ),
    }
)


class Rule(NamedTuple):
    """A rule and its parameter, which is 0 if the rule has none."""

    name: str
    number: float

    @property
    def cohort(self) -> int:
        """The size of the smallest cohort with which the rule keeps its guarantee."""
        return RULES[self.name].cohort(self.number)

    @property
    def least(self) -> int:
        """The minimum number of uplinks that the rule can combine."""
        return RULES[self.name].least


def parse_rule(word: str) -> Rule:
    """Parse a rule, such as `median` or `trimmed:0.2`.

    Raises:
        ValueError: the word is not a rule; the message states the allowed values.
    """
    name, _, text = word.partition(":")
    if name not in RULES:
        known = ", ".join(kind.example for kind in RULES.values())
        raise ValueError(f"unknown rule '{name}'{suggest(name, RULES) or f'; choose one of {known}'}")
    kind = RULES[name]
    form = f"{name}:{kind.number}" if kind.number else name
    try:
        number = float(text) if kind.number else 0.0
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or (":" in word) != bool(kind.number):
        raise ValueError(f"'{word}' is not of the form {form}, such as {kind.example}")
    if kind.number and not kind.allowed(number):
        raise ValueError(f"{kind.number} of {form} must be {kind.limits}")
    return Rule(name, number)
