"""The searches, which choose the candidates that run: a grid or draws from it, successive halving, and Optuna's TPE."""

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
from fedloom.tools.tuning.space import Contender, Range, Space

ASKS = 50  # maximum number of suggestions per requested candidate; TPE may then end with fewer different candidates
STARTUP = 1 / 3  # fraction of TPE's candidates that are drawn at random before its model is used

Search = Callable[[Tuning, Contender, Cells], list[Tried]]


def halved(tuning: Tuning, contender: Contender, cells: Cells) -> list[Tried]:
    """Run all candidates up to the first rung, then the better half of them up to the next rung, and so on.

    Return all candidates in their initial order. All methods have the same rungs and the same number of candidates at each rung, and so the
    same total number of rounds.
    """
    chosen = tuning.chosen(contender)
    rows = contender.rows(chosen)
    tried = [Tried(label=row.label, values=values) for row, values in zip(rows, chosen, strict=True)]
    left = list(range(len(tried)))
    for place, until in enumerate(tuning.rungs()):
        if place:
            best = cells.ranked([tried[i] for i in left])[: math.ceil(len(left) / 2)]
            left = [i for i in left if any(tried[i] is one for one in best)]
        for i in left:
            cells.score(tried[i], rows[i], until)
    return tried


def with_tpe(tuning: Tuning, contender: Contender, cells: Cells) -> list[Tried]:
    """Let Optuna's TPE choose the candidates one after another.

    If a tuning is resumed, TPE starts again from the beginning. It chooses the same candidates, because it receives the scores of the runs
    that are finished.
    """
    optuna = import_optuna()
    rules, metric = tuning.rules, cells.metric
    seed = Stream(rules.seed, "tune", contender.label).torch_seed() % 2**32
    n = min(tuning.size, contender.size)
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=max(2, round(STARTUP * n)))
    study = optuna.create_study(direction="maximize" if metric.better == "higher" else "minimize", sampler=sampler)
    tried = list[Tried]()
    space = _distributions(optuna, contender.space)
    for _ in range(ASKS * tuning.size):
        trial = study.ask(space)
        values = _values(contender.space, trial.params)
        one = next((known for known in tried if known.values == values), None)
        if one is None:
            row = contender.candidate(values)
            one = Tried(label=row.label, values=values)
            cells.score(one, row, tuning.settings.rounds)
            tried.append(one)
        known = cells.ranked([each for each in tried if each.mean is not None])
        if not known:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:  # a candidate that failed gets the worst score of the candidates that did not fail
            study.tell(trial, known[-1].mean if one.mean is None else one.mean)
        if len(tried) == n:
            break
    return tried


def import_optuna() -> Any:
    """Return the module `optuna`, set to log only warnings. Raise UsageError if it is not installed."""
    try:
        import optuna
    except ImportError:
        raise UsageError("tune.search=tpe: needs Optuna: pip install 'fedloom[tune]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _distributions(optuna: Any, space: Space) -> dict[str, Any]:
    """Return Optuna's distributions for a space.

    A range becomes a place from 0 to 1. A list of numbers becomes an integer, the index in the sorted list, so that TPE can use the order
    of the values. Any other list becomes a category, the index in the list.
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
