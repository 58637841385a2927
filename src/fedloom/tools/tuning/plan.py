"""A tuning: the methods, their spaces of candidates, and the settings that all runs share."""

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
from fedloom.tools.tuning.space import Contender, Range, contender_of, draws, whole_grid

VALID = 0.2  # default fraction of training examples that are held out for validation


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """A description of a tuning."""

    values: Values  # as given by the user, without `out`
    base: Values  # the settings that all runs share
    contenders: tuple[Contender, ...]
    seeds: tuple[int, ...]
    rules: TuneSettings

    @cached_property
    def settings(self) -> Settings:
        """The settings of a run of the first method."""
        contender = self.contenders[0]
        return self.job(contender.candidate(next(self.extremes(contender))), self.seeds[0], Path()).settings

    def job(self, row: Row, seed: int, folder: Path) -> PlannedRun:
        """Return the run of one candidate with one seed."""
        (job,) = Comparison(base=self.base, rows=(row,), seeds=(seed,)).jobs(folder)
        return job

    @property
    def size(self) -> int:
        """The number of candidates of every method."""
        return self.rules.candidates or int(self.contenders[0].size)

    def extremes(self, contender: Contender) -> Iterator[Values]:
        """Yield the candidate of a contender with the first values of all hyper-parameters, and that with the last values."""
        for place in (0, -1):
            yield {
                key: v.value(float(-place)) if isinstance(v, Range) else v[place] for key, v in contender.space.items()
            }

    @property
    def budget(self) -> int:
        """The total number of rounds of all candidates of a method, with one seed."""
        total, before, left = 0, 0, self.size
        for until in self.rungs():
            total, before, left = total + left * (until - before), until, math.ceil(left / 2)
        return total

    def chosen(self, contender: Contender) -> list[Values]:
        """Return the candidates of a contender that are known before the first run, for `grid` and `halving`."""
        if self.rules.candidates is None or self.rules.candidates == contender.size:
            return whole_grid(contender.space)
        return draws(contender.space, self.rules.candidates, Stream(self.rules.seed, "tune", contender.label))

    def check(self, parts: GivenObjects = NOTHING) -> None:
        """Check the data, partition, model and engine of the candidates, so that errors appear before the first run.

        Raises:
            UsageError: a run would raise this error, or there are no validation examples.
        """
        rows = [
            row
            for contender in self.contenders
            for row in contender.rows(
                self.chosen(contender) if self.rules.search != "tpe" else list(self.extremes(contender))
            )
        ]
        settings = self.settings
        dataset = parts.dataset or make_dataset(settings)
        Comparison(base=self.base, rows=tuple(rows), seeds=self.seeds).check(replace(parts, dataset=dataset))
        if not any(map(len, make_federation(settings, dataset, parts.partition).partition.valid)):
            raise ConfigError(
                "tune: there are no validation examples to choose on; set eval.valid, such as eval.valid=0.2"
            )

    def rungs(self) -> list[int]:
        """Return the numbers of rounds after which candidates are ranked.

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
        ConfigError: a key or value is invalid, or methods would have different numbers of candidates.
    """
    rules = make_tune_settings(values.get("tune", {}))
    base, rows = draft(values, own_keys=("tune",))
    contenders = tuple(map(contender_of, rows))
    _check_sizes(contenders, rules)
    kept = {key: value for key, value in values.items() if key != "out"}
    seeds = seeds_of(values.get("seed", 0))
    return Tuning(
        values=kept, base=_for_tuning(base, rules, contenders), contenders=contenders, seeds=seeds, rules=rules
    )


def _for_tuning(base: Values, rules: TuneSettings, contenders: Sequence[Contender]) -> Values:
    """Return the settings of all runs, with validation examples by default, and by default with scores only when candidates are ranked."""
    found, settings = {**base}, make_settings(base)
    given = base.get("eval", {})
    if "valid" not in given and settings.partition.name != "file":
        found["eval"] = {**given, "valid": VALID}
    if "eval_every" not in base and settings.stop.patience is None:
        n = rules.candidates or int(contenders[0].size)
        rungs = int(math.log2(n)) if rules.search == "halving" else 0
        found["eval_every"] = max(1, settings.rounds // 2**rungs)
    return found


def _check_sizes(contenders: Sequence[Contender], rules: TuneSettings) -> None:
    """Raise ConfigError unless all methods can have the same number of candidates, which must be at least 2."""
    unbounded = [f"{c.label}.{key}" for c in contenders for key, values in c.space.items() if isinstance(values, Range)]
    if rules.candidates is None and (unbounded or rules.search == "tpe"):
        what = f"{unbounded[0]}: is a range, so the grid has no end" if unbounded else "tune.search=tpe: has no grid"
        raise ConfigError(f"{what}; set tune.candidates=N, the number of candidates of every method")
    sizes = {contender.label: contender.size for contender in contenders}
    least = min(sizes, key=lambda label: sizes[label])
    if max(sizes.values()) < 2:
        raise ConfigError("tune: no hyper-parameter has several values; give a list, such as method.lr=0.01,0.1")
    if rules.candidates is None and len(set(sizes.values())) > 1:
        counts = ", ".join(f"{label} {size:g}" for label, size in sizes.items())
        raise ConfigError(
            f"tune: methods have different numbers of candidates ({counts}), so the choice would not be fair; "
            f"list more values for {least}, or set tune.candidates={max(2, int(sizes[least]))} to draw so many from each grid"
        )
    wanted = rules.candidates or 2
    if wanted < 2:
        raise ConfigError(f"tune.candidates={wanted}: must be at least 2")
    if wanted > sizes[least]:
        raise ConfigError(
            f"tune.candidates={wanted}: {least} has only {sizes[least]:g} candidates; list more values, or lower it"
        )
