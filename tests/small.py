"""Settings of small runs, which tests change, and what such a run must come to where clients are lost."""

from collections.abc import Collection, Mapping
from typing import Any

from fedloom.experiment import Experiment
from fedloom.values import assign

SMALL: dict[str, Any] = {
    "data": {"name": "digits", "rows": 240},
    "model": {"name": "mlp", "hidden": 12},
    "partition": {"name": "dirichlet", "alpha": 0.5},
    "clients": 4,
    "rounds": 2,
    "batch_size": 16,
}
"""A run that takes a few hundredths of a second."""


def changed(values: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """The values with other settings (as `fedloom.run` names them) over them; the given ones stay as they are."""
    found = {key: dict(v) if isinstance(v, dict) else v for key, v in values.items()}
    for key, value in settings.items():
        assign(found, key, value)
    return found


def losing(
    run: Experiment, lost: Mapping[int, Collection[int]], refused: Mapping[int, Collection[int]] | None = None
) -> Experiment:
    """The run, with the turns of clients `lost[number]` in round `number` undone; those of refused ones are not, yet do not count."""
    engine, train = run.engine, run.engine.train

    def fewer(number, cohort, down):
        gone = lost.get(number, ())
        before = {i: engine.client(i) for i in gone}
        replies = train(number, cohort, down)
        for i, client in before.items():
            engine.restore(i, client)
        return [r for r in replies if r.client not in (*gone, *(refused or {}).get(number, ()))]

    engine.train = fewer  # type: ignore[method-assign]
    return run
