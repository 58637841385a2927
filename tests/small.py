"""Settings of small runs, which tests change; runs that are watched, interrupted, or lose clients."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fedloom import Downlink, tree
from fedloom.config.parsing import set_dotted
from fedloom.engines import Reply
from fedloom.experiment.build import arithmetic
from fedloom.experiment.loop import Experiment
from fedloom.nets import read_weights
from fedloom.tree import Tree, Weights

SMALL: dict[str, Any] = {
    "data": {"name": "digits", "rows": 240},
    "model": {"name": "mlp", "hidden": 12},
    "partition": {"name": "dirichlet", "alpha": 0.5},
    "clients": 4,
    "rounds": 2,
    "batch_size": 16,
}
"""A run that takes a few hundredths of a second."""


BRIEF = {"method.finetune_steps": 3, "method.n_synthetic": 8}
"""Enough of FedVTC's fine-tuning to see whether two runs are the same."""


def brief(method: str) -> dict[str, Any]:
    """`BRIEF`, for the method that has it."""
    return BRIEF if method == "fedvtc" else {}


def changed(values: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """The values with other settings (as `fedloom.run` names them) over them; the given ones stay as they are."""
    found = {key: dict(v) if isinstance(v, dict) else v for key, v in values.items()}
    for key, value in settings.items():
        set_dotted(found, key, value)
    return found


class Turns(NamedTuple):
    """What went between the server and clients in a round."""

    down: Downlink
    replies: list[Reply]

    @property
    def sent(self) -> list[Tree]:
        """To each member of the cohort."""
        return [self.down.to(reply.slot) for reply in self.replies]


def spied(run: Experiment) -> list[Turns]:
    """The run's rounds, noted as they come."""
    rounds: list[Turns] = []
    train = run.engine.train

    def watched(number, cohort, down):
        replies = train(number, cohort, down)
        kept = [replace(reply, uplink=tree.clone(reply.uplink)) for reply in replies]  # they last for a round
        rounds.append(Turns(down, kept))
        return replies

    run.engine.train = watched  # type: ignore[method-assign]
    return rounds


def initial_weights(run: Experiment, i: int = 0) -> Weights:
    """All weights of client `i` before its first turn."""
    problem = run.problem
    with arithmetic(run.settings):
        return problem.initial(i, read_weights(problem.modules(problem.arch_of[i]))).weights


def interrupted_after(run: Experiment, last: int) -> Path:
    """The folder of the run, which is stopped after so many rounds."""

    def stop(done, rounds, row):
        if done == last:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.run(stop)
    return run.folder.path


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
