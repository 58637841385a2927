"""The settings of `fedloom tune` that a run does not have: the table `tune`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ValidationError

from fedloom.config.errors import explain
from fedloom.config.settings import Section
from fedloom.errors import ConfigError
from fedloom.ranges import Count, Whole


class TuneSettings(Section):
    """How hyper-parameters are searched (docs/tuning.md)."""

    search: Literal["grid", "halving", "tpe"] = "grid"
    """`grid`: every setting runs for all rounds; `halving`: after a few rounds, the worse half of a method's settings stops, and so on;
    `tpe`: Optuna's tree-structured Parzen estimator chooses each setting from the scores of those before."""
    settings: Count | None = None
    """Number of settings of every method, drawn at random (grid, halving) or chosen by `tpe`. Default: the whole grid."""
    seed: Whole = 0
    """Seed of the draws of settings."""


def make_tune_settings(table: Any) -> TuneSettings:
    """Return validated settings of the table `tune`. Raise ConfigError for an unknown key or an invalid value."""
    if not isinstance(table, Mapping):
        raise ConfigError(f"tune={table}: is a table; set its keys one by one, such as tune.search=halving")
    try:
        return TuneSettings.model_validate(dict(table))
    except ValidationError as error:
        raise ConfigError(explain(error, "tune.", TuneSettings)) from None
