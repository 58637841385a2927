"""The table `tune`: the settings of `fedloom tune` that runs do not have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ValidationError

from fedloom.config.errors import explain
from fedloom.config.settings import Section
from fedloom.errors import ConfigError
from fedloom.ranges import Count, Whole


class TuneSettings(Section):
    """The search for hyper-parameters (docs/tuning.md)."""

    search: Literal["grid", "halving", "tpe"] = "grid"
    """`grid`: every candidate runs for all rounds; `halving`: the worse half of a method's candidates stops after a few rounds, half of the
    others after twice as many, and so on; `tpe`: Optuna's tree-structured Parzen estimator chooses each candidate by the previous
    scores."""
    candidates: Count | None = None
    """Number of candidates of every method, which are drawn at random (`grid`, `halving`) or chosen by `tpe`. Default: the whole grid."""
    seed: Whole = 0
    """Seed of the random draws of candidates."""


def make_tune_settings(table: Any) -> TuneSettings:
    """Return validated settings of the table `tune`. Raise ConfigError if a key is unknown or a value is invalid."""
    if not isinstance(table, Mapping):
        raise ConfigError(f"tune={table}: is a table; set its keys one by one, such as tune.search=halving")
    try:
        return TuneSettings.model_validate(dict(table))
    except ValidationError as error:
        raise ConfigError(explain(error, "tune.", TuneSettings)) from None
