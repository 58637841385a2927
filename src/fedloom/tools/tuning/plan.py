"""A tuning: the methods, their spaces of settings, and the settings that all runs share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fedloom.config.settings import Settings, Values, make_settings
from fedloom.config.tuning import TuneSettings, make_tune_settings
from fedloom.errors import ConfigError
from fedloom.experiment.build import make_dataset, make_federation
from fedloom.experiment.loop import NOTHING, GivenObjects
from fedloom.rng import Stream
from fedloom.tools.compare import Comparison, PlannedRun
from fedloom.tools.compare_rows import Row, draft, seeds_of
from fedloom.tools.tuning.space import Arm, Range, arm_of, draws, whole_grid

VALID = 0.2  # default fraction of training examples that are held out for validation


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """A description of a tuning."""

    values: Values  # as given by the user, without `out`
    base: Values  # the settings that all runs share
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    rules: TuneSettings

    @cached_property
    def settings(self) -> Settings:
        """The settings of a run of the first method."""
        arm = self.arms[0]
        return self.job(arm.setting(next(self.extremes(arm))), self.seeds[0], Path()).settings

    def job(self, row: Row, seed: int, folder: Path) -> PlannedRun:
        """Return the run of one setting with one seed."""
        (job,) = Comparison(base=self.base, rows=(row,), seeds=(seed,)).jobs(folder)
        return job

    @property
    def size(self) -> int:
        """The number of settings of every method."""
        return self.rules.settings or int(self.arms[0].size)

    def extremes(self, arm: Arm) -> Iterator[Values]:
        """Yield the setting of an arm with the first values of all hyper-parameters, and that with the last values."""
        for place in (0, -1):
            yield {key: v.value(float(-place)) if isinstance(v, Range) else v[place] for key, v in arm.space.items()}

    @property
    def budget(self) -> int:
        """The total number of rounds of all settings of a method, with one seed."""
        total, before, left = 0, 0, self.size
        for until in self.rungs():
            total, before, left = total + left * (until - before), until, math.ceil(left / 2)
        return total

    def chosen(self, arm: Arm) -> list[Values]:
        """Return the settings of an arm that are known before the first run, for `grid` and `halving`."""
        if self.rules.settings is None or self.rules.settings == arm.size:
            return whole_grid(arm.space)
        return draws(arm.space, self.rules.settings, Stream(self.rules.seed, "tune", arm.label))

    def check(self, parts: GivenObjects = NOTHING) -> None:
        """Check the data, partition, model and engine of the settings, so that errors appear before the first run.

        Raises:
            UsageError: a run would raise this error, or there are no validation examples.
        """
        rows = [
            row
            for arm in self.arms
            for row in arm.rows(self.chosen(arm) if self.rules.search != "tpe" else list(self.extremes(arm)))
        ]
        settings = self.settings
        dataset = parts.dataset or make_dataset(settings)
        Comparison(base=self.base, rows=tuple(rows), seeds=self.seeds).check(replace(parts, dataset=dataset))
        if not any(map(len, make_federation(settings, dataset, parts.partition).partition.valid)):
            raise ConfigError(
                "tune: there are no validation examples to choose on; set eval.valid, such as eval.valid=0.2"
            )

    def rungs(self) -> list[int]:
        """Return the numbers of rounds after which settings are ranked.

        With `halving`, each number is about twice the previous one. The last one is the number of all rounds.
        """
        rounds, every = self.settings.rounds, self.settings.eval_every
        if self.rules.search != "halving":
            return [rounds]
        early = [rounds // 2**k for k in range(int(math.log2(self.size)), 0, -1)]
        return [*dict.fromkeys([*(max(every, n // every * every) for n in early), rounds])]


def plan_tuning(values: Mapping[str, Any]) -> Tuning:
    """Return the tuning that a config file and `key=value` arguments describe.

    The keys are those of a comparison, and those of the table `tune` (`fedloom.config.tuning`). A hyper-parameter may have several values
    (`method.lr=0.01,0.1`) or a range (`method.lr=0.001..1`).

    Raises:
        ConfigError: a key or value is invalid, or methods would have different numbers of settings.
    """
    rules = make_tune_settings(values.get("tune", {}))
    base, rows = draft(values, own_keys=("tune",))
    arms = tuple(map(arm_of, rows))
    _check_sizes(arms, rules)
    kept = {key: value for key, value in values.items() if key != "out"}
    seeds = seeds_of(values.get("seed", 0))
    return Tuning(values=kept, base=_for_tuning(base, rules, arms), arms=arms, seeds=seeds, rules=rules)


def _for_tuning(base: Values, rules: TuneSettings, arms: Sequence[Arm]) -> Values:
    """Return the settings of all runs, with validation examples by default, and by default with scores only when settings are ranked."""
    found, settings = {**base}, make_settings(base)
    given = base.get("eval", {})
    if "valid" not in given and settings.partition.name != "file":
        found["eval"] = {**given, "valid": VALID}
    if "eval_every" not in base and settings.stop.patience is None:
        n = rules.settings or int(arms[0].size)
        rungs = int(math.log2(n)) if rules.search == "halving" else 0
        found["eval_every"] = max(1, settings.rounds // 2**rungs)
    return found


def _check_sizes(arms: Sequence[Arm], rules: TuneSettings) -> None:
    """Raise ConfigError unless all methods can have the same number of settings, which must be at least 2."""
    unbounded = [(arm, key) for arm in arms for key, values in arm.space.items() if isinstance(values, Range)]
    if rules.settings is None and (unbounded or rules.search == "tpe"):
        what = f"{unbounded[0][0].label}.{unbounded[0][1]}: has a range" if unbounded else "tune.search=tpe"
        raise ConfigError(f"{what}: set tune.settings=N, the number of settings of every method")
    sizes = {arm.label: arm.size for arm in arms}
    least = min(sizes, key=lambda label: sizes[label])
    if max(sizes.values()) < 2:
        raise ConfigError("tune: no hyper-parameter has several values; list some, such as method.lr=0.01,0.1")
    if rules.settings is None and len(set(sizes.values())) > 1:
        counts = ", ".join(f"{label} {size:g}" for label, size in sizes.items())
        raise ConfigError(
            f"tune: methods have different numbers of settings ({counts}), so the choice would not be fair; "
            f"list more values of {least}, or set tune.settings={max(2, int(sizes[least]))}, which draws as many from each grid"
        )
    wanted = rules.settings or 2
    if wanted < 2:
        raise ConfigError(f"tune.settings={wanted}: must be at least 2")
    if wanted > sizes[least]:
        raise ConfigError(
            f"tune.settings={wanted}: {least} has only {sizes[least]:g} settings; list more values, or lower it"
        )
