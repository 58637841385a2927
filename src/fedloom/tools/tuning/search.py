"""Which settings run: the whole grid or draws from it, successive halving, and Optuna's TPE."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from fedloom.config.settings import Values
from fedloom.errors import UsageError
from fedloom.rng import Stream
from fedloom.tools.tuning.cells import Cells, Tried
from fedloom.tools.tuning.plan import Tuning
from fedloom.tools.tuning.space import Arm, Range, Space

ASKS = 50  # suggestions per setting that is wanted, before TPE ends with fewer different ones
STARTUP = 1 / 3  # fraction of TPE's settings that are drawn at random before its model is used

Search = Callable[[Tuning, Arm, Cells], list[Tried]]


def halved(tuning: Tuning, arm: Arm, cells: Cells) -> list[Tried]:
    """Run all settings up to the first rung, the better half of them up to the next one, and so on. Return them in their first order.

    Every method has the same rungs and the same number of settings at each, so it gets the same number of rounds.
    """
    chosen = tuning.chosen(arm)
    rows = arm.rows(chosen)
    tried = [Tried(label=row.label, values=values) for row, values in zip(rows, chosen, strict=True)]
    left = list(range(len(tried)))
    for place, until in enumerate(tuning.rungs()):
        if place:
            best = cells.ranked([tried[i] for i in left])[: math.ceil(len(left) / 2)]
            left = [i for i in left if any(tried[i] is one for one in best)]
        for i in left:
            cells.score(tried[i], rows[i], until)
    return tried


def with_tpe(tuning: Tuning, arm: Arm, cells: Cells) -> list[Tried]:
    """Let Optuna's TPE choose the settings one after another.

    On a resume, it is asked again from the start, and receives the scores of the runs that are done, so it chooses the same settings.
    """
    optuna = import_optuna()
    rules, metric = tuning.rules, cells.metric
    seed = Stream(rules.seed, "tune", arm.label).torch_seed() % 2**32
    n = min(tuning.size, arm.size)
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=max(2, round(STARTUP * n)))
    study = optuna.create_study(direction="maximize" if metric.better == "higher" else "minimize", sampler=sampler)
    tried = list[Tried]()
    space = _distributions(optuna, arm.space)
    for _ in range(ASKS * tuning.size):
        trial = study.ask(space)
        values = _values(arm.space, trial.params)
        one = next((known for known in tried if known.values == values), None)
        if one is None:
            row = arm.setting(values)
            one = Tried(label=row.label, values=values)
            cells.score(one, row, tuning.settings.rounds)
            tried.append(one)
        known = cells.ranked([each for each in tried if each.mean is not None])
        if not known:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:  # a setting that failed counts like the worst one that did not
            study.tell(trial, known[-1].mean if one.mean is None else one.mean)
        if len(tried) == n:
            break
    return tried


def import_optuna() -> Any:
    """Return the package Optuna, which logs only warnings. Raise UsageError if it is not installed."""
    try:
        import optuna
    except ImportError:
        raise UsageError("tune.search=tpe: needs Optuna: pip install 'fedloom[tune]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _distributions(optuna: Any, space: Space) -> dict[str, Any]:
    """Return the space in Optuna's terms: a place from 0 to 1 for a range, the index of a value for a list of words, and else its place.

    The values of a list of numbers are ordered, so TPE can use that neighbours are similar.
    """
    found = {}
    for key, values in space.items():
        if isinstance(values, Range):
            found[key] = optuna.distributions.FloatDistribution(0.0, 1.0)
        elif all(type(value) in (int, float) for value in values):
            found[key] = optuna.distributions.IntDistribution(0, len(values) - 1)
        else:
            found[key] = optuna.distributions.CategoricalDistribution(list(range(len(values))))
    return found


def _values(space: Space, params: Mapping[str, Any]) -> Values:
    found: Values = {}
    for key, values in space.items():
        if isinstance(values, Range):
            found[key] = values.value(params[key])
        elif all(type(value) in (int, float) for value in values):
            found[key] = sorted(values)[params[key]]
        else:
            found[key] = values[params[key]]
    return found


SEARCHES: Mapping[str, Search] = MappingProxyType({"grid": halved, "halving": halved, "tpe": with_tpe})
