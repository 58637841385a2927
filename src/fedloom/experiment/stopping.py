"""Early stopping: a run ends if the primary metric on validation examples has not improved for some rounds (`stop.patience`).

The decision depends only on the rows of metrics so far, so it is the same on every engine and after a resume.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedloom.config.settings import Settings, StopSettings
from fedloom.data import Partition
from fedloom.errors import ConfigError
from fedloom.method import Method
from fedloom.objectives import Metric


def check_stopping(settings: Settings, method: Method, partition: Partition) -> None:
    """Raise ConfigError if the run cannot stop early."""
    patience = settings.stop.patience
    if patience is None:
        return
    if not any(map(len, partition.valid)):
        raise ConfigError(
            f"stop.patience={patience}: needs validation examples; set eval.valid, such as eval.valid=0.2"
        )
    if method.uses_rounds:
        name = settings.method.name
        raise ConfigError(f"stop.patience={patience}: {name} depends on the number of rounds; remove stop.patience")


def reason_to_stop(rows: Sequence[Mapping[str, Any]], rules: StopSettings, metric: Metric) -> dict[str, Any] | None:
    """Return the reason why a run stops after the round of its latest row of metrics, or None if it does not stop.

    Rounds are counted from the first round with the best value, or from `stop.after` if that is later. An undefined value (None) is not an
    improvement. The result contains `round`, `measure`, `best`, `best_round` (None if no value was defined), `patience`, and `after` if it
    is set.
    """
    if rules.patience is None or not rows:
        return None
    measure, last = f"valid_{metric.name}", int(rows[-1]["round"])
    known = [(row[measure], int(row["round"])) for row in rows if row.get(measure) is not None]
    sign = 1 if metric.better == "higher" else -1
    best, place = max(known, key=lambda one: sign * one[0], default=(None, None))
    if last - max(place or 0, rules.after) < rules.patience:
        return None
    found = {"round": last, "measure": measure, "best": best, "best_round": place, "patience": rules.patience}
    return found | ({"after": rules.after} if rules.after else {})


def stopped_in_words(stopped: Mapping[str, Any], planned: int) -> str:
    """Return the result of `reason_to_stop` in words, without a full stop. `planned` is the planned number of rounds."""
    best = "is undefined" if stopped["best_round"] is None else f"has not improved since round {stopped['best_round']}"
    place = f"stopped after round {stopped['round']} of {planned}"
    after = f", stop.after={stopped['after']}" if "after" in stopped else ""
    return f"{place}: {stopped['measure']} {best} (stop.patience={stopped['patience']}{after})"
