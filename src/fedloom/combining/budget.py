"""The privacy that a run spends: epsilon of the Gaussian mechanism for Poisson cohorts and for known cohorts, by `dp-accounting`.

Only the functions import dp-accounting, which belongs to the extra `privacy`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fedloom.errors import ConfigError


@dataclass(frozen=True)
class Releases:
    """A sequence of noisy sums over cohorts. Each cohort contains every client independently with probability `rate`.

    Two neighbouring federations differ in one client, which is present in only one of them. If it is absent, all its contributions are
    zero.
    """

    noise: float  # standard deviation, divided by the maximum norm of a client's contribution
    rate: float  # above 0, at most 1
    delta: float

    def epsilon(self, n: int) -> float:
        """Return epsilon after `n` releases, for an observer who does not know the members of the cohorts; infinity without noise."""
        if n == 0 or self.noise == 0:
            return math.inf if n else 0.0
        if self.rate == 1:
            return self.epsilon_known(n)
        with _quiet() as dp:
            event = dp.PoissonSampledDpEvent(self.rate, dp.GaussianDpEvent(self.noise))
            accountant = dp.pld.PLDAccountant(neighboring_relation=dp.NeighboringRelation.ADD_OR_REMOVE_ONE)
            return float(accountant.compose(event, n).get_epsilon(self.delta))

    def epsilon_known(self, turns: int) -> float:
        """Return epsilon for a client that was in `turns` cohorts, for an observer who knows in which cohorts it was."""
        if turns == 0 or self.noise == 0:
            return math.inf if turns else 0.0
        with _quiet() as dp:
            return float(dp.get_epsilon_gaussian(self.noise / math.sqrt(turns), self.delta))

    def within(self, epsilon: float, most: int) -> int:
        """Return the number of releases, at most `most`, that stay within a budget of `epsilon`."""
        if self.epsilon(most) <= epsilon:
            return most
        low, high = 0, most
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.epsilon(middle) <= epsilon else (low, middle)
        return low


def noise_for(epsilon: float, rate: float, delta: float, n: int) -> float:
    """Return the smallest noise multiplier, to three decimals, with which `n` releases stay within a budget of `epsilon`."""

    def fits(thousandths: int) -> bool:
        return Releases(thousandths / 1000, rate, delta).epsilon(n) <= epsilon

    high = 1000
    while not fits(high):
        high *= 2
    low = high // 2
    while low > 1 and fits(low):
        low, high = low // 2, low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high / 1000


def require_accountant() -> None:
    """Raise ConfigError if dp-accounting is not installed."""
    try:
        with _quiet():
            pass
    except ImportError:
        raise ConfigError("privacy: needs dp-accounting; pip install 'fedloom[privacy]'") from None


@contextmanager
def _quiet() -> Iterator[Any]:
    """Yield the package, and suppress its warnings about orders that do not converge."""
    import dp_accounting

    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel("ERROR")
    try:
        yield dp_accounting
    finally:
        logger.setLevel(before)
