"""Paired differences of two methods with the same partition and seed. Pairing removes the variation that the methods share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from fedloom.errors import UsageError, suggest
from fedloom.report.groups import Group, headline, shared_primary
from fedloom.report.read import RunRecord
from fedloom.report.student import t_quantile

MIN_SEEDS_FOR_INTERVAL = 3


@dataclass(frozen=True)
class Difference:
    """The difference between `label` and the baseline over `n_seeds` pairs, in percentage points or in the metric's unit.

    Positive differences are better.

    `interval` is the 95 % t-interval of the mean, or None for fewer than three seeds.
    """

    label: str
    n_seeds: int
    mean: float
    interval: tuple[float, float] | None

    @property
    def clear(self) -> bool:
        """Whether the interval excludes zero."""
        return self.interval is not None and (self.interval[0] > 0 or self.interval[1] < 0)


def choose_baseline(groups: Sequence[Group], name: str | None = None) -> Group:
    """Return the group with the label or method `name`. By default, return FedAvg, or the first group if there is no FedAvg."""
    wanted = name or "fedavg"
    for candidate in groups:
        if wanted in (candidate.label, candidate.method):
            return candidate
    if name is None:
        return groups[0]
    raise UsageError(f"baseline={name}: not among the runs{suggest(name, {g.label for g in groups})}")


def difference(group: Group, baseline: Group, measure: str, statistic: str = "final") -> Difference | None:
    """Return the paired difference in one measure over finished runs with equal data, seed and partition, or None without pairs."""
    ours, theirs = (_by_seed(g, measure, statistic) for g in (group, baseline))
    primary = shared_primary((*group.records, *baseline.records))
    differences = np.array([np.mean(ours[key]) - np.mean(theirs[key]) for key in ours if key in theirs])
    points = primary.sign * primary.scale * differences
    if not len(points):
        return None
    mean = float(points.mean())
    return Difference(group.label, len(points), mean, _interval(mean, points))


def worse_off(record: RunRecord, rival: RunRecord) -> float | None:
    """Return the fraction of clients whose personal model is worse in `record` than in `rival`, after the last evaluation of each.

    Equal values do not count as worse. Return None if the runs are not a pair, or if there are no values for a common client.
    """
    if _pair_key(record) != _pair_key(rival):
        return None
    primary = shared_primary((record, rival))
    ours, theirs = (_last_by_client(one, primary.measure("personal")) for one in (record, rival))
    both = ours.index.intersection(theirs.index)
    return float((primary.sign * (ours[both] - theirs[both]) < 0).mean()) if len(both) else None


def _last_by_client(record: RunRecord, measure: str) -> pd.Series[float]:
    """Return each client's value after the last evaluation, by client. The result is empty if there are no values."""
    table = record.clients
    if table is None or measure not in table.columns:
        return pd.Series(dtype="float64")
    scored = table[table[measure].notna()]
    values: pd.Series[float] = scored[scored["round"] == scored["round"].max()].set_index("client")[measure]
    return values


def _interval(mean: float, points: np.ndarray) -> tuple[float, float] | None:
    n = len(points)
    if n < MIN_SEEDS_FOR_INTERVAL:
        return None
    half = float(t_quantile(0.975, n - 1) * points.std(ddof=1) / math.sqrt(n))
    return mean - half, mean + half


def _by_seed(group: Group, measure: str, statistic: str) -> dict[tuple[object, ...], list[float]]:
    values: dict[tuple[object, ...], list[float]] = {}
    for record in group.records:
        value = headline(record, measure, statistic) if record.finished else None
        if value is not None:
            values.setdefault(_pair_key(record), []).append(value)
    return values


def _pair_key(record: RunRecord) -> tuple[object, ...]:
    """Return a key that is the same for runs that form a pair.

    The key includes the name of the data set, because data sets of equal size may share a partition hash.
    """
    return record.fact("data"), record.seed, record.partition.get("hash")
