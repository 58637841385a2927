"""Groups of runs that differ only in their seed, and the metrics that summarise them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from fedloom.errors import UsageError
from fedloom.report.primary import ACCURACY, VIEWS, Primary
from fedloom.report.read import RunRecord, printable

NOT_A_SETTING = ("out", "label", "method.control")  # the label names a control arm


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed. They form one row of a table, or one line of a plot."""

    label: str
    method: str
    records: tuple[RunRecord, ...]

    @property
    def finished(self) -> bool:
        """Whether any of the runs is finished."""
        return any(record.finished for record in self.records)

    @property
    def counted(self) -> tuple[RunRecord, ...]:
        """The runs that are included in means: the finished runs, or all runs if none is finished."""
        return tuple(record for record in self.records if record.finished) or self.records


def group(records: Sequence[RunRecord]) -> list[Group]:
    """Group `records` by method and settings, in order of first appearance.

    The label of a group is the `label` setting of its runs, or its method. Control arms are marked. If groups have the same label, the
    settings in which they differ are added.
    """
    members: dict[tuple[str, str], list[RunRecord]] = {}
    for record in records:
        name = str(record.fact("label") or record.method) + _control(record)
        key = (name, json.dumps(settings(record), sort_keys=True, default=str))
        members.setdefault(key, []).append(record)
    labels = _labels([(name, settings(runs[0])) for (name, _), runs in members.items()])
    return [Group(label, runs[0].method, tuple(runs)) for label, runs in zip(labels, members.values(), strict=True)]


def _control(record: RunRecord) -> str:
    """Return a mark for a control arm (`method.control`), or ""."""
    method = record.config.get("method")
    control = method.get("control", "none") if isinstance(method, Mapping) else "none"
    return "" if control == "none" else f" (control: {control})"


def shared_primary(records: Sequence[RunRecord]) -> Primary:
    """Return the common primary metric of runs that are compared with each other.

    Raises:
        UsageError: the runs have different primary metrics.
    """
    for record in records:
        if record.primary != records[0].primary:
            one, other = (f"{printable(str(r.path))} is measured by {r.primary.label}" for r in (records[0], record))
            raise UsageError(f"{one}, but {other}; report runs with different metrics separately")
    return records[0].primary if records else ACCURACY


def settings(record: RunRecord) -> dict[str, Any]:
    """Return the settings of a run with dotted names (`"method.lr": 0.1`), without its label, folder and seed."""
    flat = flat_settings(record.config)
    return {key: value for key, value in flat.items() if key not in NOT_A_SETTING and key.split(".")[-1] != "seed"}


def flat_settings(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested tables as one table with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flat_settings(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _labels(members: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    labels = []
    for method, own in members:
        others = [other for name, other in members if name == method]
        keys = sorted(key for key in own if any(other.get(key) != own[key] for other in others))
        parts = [method, *(f"{key.removeprefix('method.')}={own[key]}" for key in keys)]
        labels.append(printable(" ".join(parts)))
    return labels


def series(record: RunRecord, key: str) -> pd.Series[float]:
    """Return the finite values of a metric, indexed by round. The result is empty if the metric was never measured."""
    if key not in record.metrics.columns:
        return pd.Series(dtype="float64")
    values = record.metrics.set_index("round")[key]
    return values[values.map(math.isfinite)]


def headline(record: RunRecord, measure: str, statistic: str = "final") -> float | None:
    """Return one number that summarises a run, from its summary or, if the summary lacks it, from the rounds so far.

    `statistic` is `final`, `last10`, `chosen_on_validation`, `best_on_test`, `uniform`, `std`, `worst10`, `held` or `not_held`. Return
    None if the number was not measured.
    """
    known = (record.summary or {}).get(measure)
    value = known.get(statistic) if isinstance(known, Mapping) else known if statistic == "final" else None
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    return _from_rounds(record, measure, statistic)


def _from_rounds(record: RunRecord, measure: str, statistic: str) -> float | None:
    values, primary = series(record, measure), record.primary
    if statistic in ("uniform", "std", "worst10", "held", "not_held"):
        values = series(record, f"{measure}_{statistic}")
    elif statistic == "chosen_on_validation":
        valid = series(record, primary.measure("valid"))
        values = values[values.index == (primary.sign * valid).idxmax()] if len(valid) else valid
    if not len(values):
        return None
    if statistic == "last10":
        return float(values.iloc[-10:].mean())
    return float(primary.best(values) if statistic == "best_on_test" else values.iloc[-1])


def other_metrics(record: RunRecord) -> dict[str, float]:
    """Return the metrics of the task except the primary one, such as `personal_mae`, after the last evaluation."""
    names = [
        key
        for view in VIEWS
        for key in record.metrics.columns
        if key.startswith(f"{view}_") and not key.startswith(record.primary.measure(view))
    ]
    return {name: value for name in names if (value := headline(record, name)) is not None}


def run_total(record: RunRecord, key: str) -> float | None:
    """Return a total of the run: `uplink_bytes`, `downlink_bytes` or `seconds`. For an unfinished run, return the total so far."""
    value = (record.summary or {}).get(key)
    if isinstance(value, int | float):
        return float(value)
    parts = [series(record, part) for part in (("train_seconds", "eval_seconds") if key == "seconds" else (key,))]
    return float(sum(part.iloc[-1] for part in parts if len(part))) if any(map(len, parts)) else None
