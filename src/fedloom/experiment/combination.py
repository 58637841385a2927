"""The input of a round's aggregation: the uplinks, or one uplink that represents all of them (see `combination_of`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedloom.combining.additive import Additive
from fedloom.combining.robust import combine_robustly
from fedloom.combining.rules import Rule
from fedloom.errors import MethodError
from fedloom.method import Downlink, Method, Round
from fedloom.tree import Tree


class Combination:
    """A combination that leaves the uplinks as they are."""

    always = False  # whether a round without uplinks is also aggregated
    shows_uplinks = True  # whether `server_logs` may see the uplinks

    def announce(self) -> None:
        """Log facts that may surprise users, before the first round."""

    def cohort(self, number: int) -> list[int] | None:
        """Return the cohort of round `number`, or None if the method chooses it."""
        return None

    def combined(self, uplinks: Sequence[Tree], round: Round, down: Downlink) -> tuple[Sequence[Tree], Round]:
        """Return the uplinks to aggregate, and the round. `down` is the decoded downlink of the round."""
        return uplinks, round

    def events(self) -> list[dict[str, Any]]:
        """Return lines about the latest round for events.jsonl, without the number of the round."""
        return []

    def state(self) -> dict[str, Any]:
        """Return the state for the checkpoint."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore an earlier result of `state`."""

    def summary(self) -> dict[str, Any]:
        """Return facts for the run's summary."""
        return {}


class RobustCombination(Combination):
    """Combines the uplinks with a robust rule."""

    def __init__(self, method: Method, rule: Rule) -> None:
        self._method, self._rule = method, rule

    def combined(self, uplinks: Sequence[Tree], round: Round, down: Downlink) -> tuple[Sequence[Tree], Round]:
        """Return one combined uplink, repeated as often as uplinks arrived, with equal shares."""
        vectors = Additive(self._method, uplinks, received_by_all(self._method, down))
        one = vectors.stand_in(combine_robustly(self._rule, vectors))
        equal = tuple(arrival._replace(share=1 / len(uplinks)) for arrival in round.arrivals)
        return [one] * len(uplinks), replace(round, arrivals=equal)


def received_by_all(method: Method, down: Downlink) -> Tree:
    """Return the message that all clients received. Raise MethodError if they received different messages."""
    if down.each is not None:
        raise MethodError(
            f"{type(method).__name__}: a rule cannot combine the uplinks of clients that received different weights;"
            ' set combines to "individual" in the class'
        )
    return down.common
