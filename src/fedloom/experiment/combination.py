"""Applies the robust rule in the settings to the uplinks of a round, before the method aggregates them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedloom.combining.additive import Additive
from fedloom.combining.robust import combine_robustly
from fedloom.combining.rules import Rule, parse_rule
from fedloom.config.settings import Settings
from fedloom.errors import MethodError
from fedloom.method import Downlink, Method, Round
from fedloom.tree import Tree


@dataclass(frozen=True)
class Combination:
    """The robust rule of an experiment, or none."""

    method: Method
    rule: Rule | None

    @classmethod
    def of(cls, settings: Settings, method: Method) -> Combination:
        """Return the rule that the settings name."""
        return cls(method, parse_rule(settings.aggregate) if settings.aggregate else None)

    @property
    def least(self) -> int:
        """The fewest uplinks that can be combined."""
        return self.rule.least if self.rule else 1

    def combined(self, uplinks: Sequence[Tree], round: Round, down: Downlink) -> tuple[Sequence[Tree], Round]:
        """Return what to aggregate: the uplinks; or, with a rule, as many references to one that stands for all, with equal shares.

        `down` is the decoded downlink of the round.
        """
        if self.rule is None:
            return uplinks, round
        if down.each is not None:
            raise MethodError(
                f"{type(self.method).__name__}: a rule cannot combine the uplinks of clients that received different weights;"
                ' set combines to "individual" in the class'
            )
        vectors = Additive(self.method, uplinks, down.common)
        one = vectors.stand_in(combine_robustly(self.rule, vectors))
        equal = tuple(arrival._replace(share=1 / len(uplinks)) for arrival in round.arrivals)
        return [one] * len(uplinks), replace(round, arrivals=equal)
