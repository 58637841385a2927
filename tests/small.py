"""Settings of small runs, and runs that are recorded, interrupted, or lose clients."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fedloom import Client, Downlink, tree
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
"""Short fine-tuning for FedVTC, long enough to compare two runs."""


QUICK_SERVER = {
    "fedbuff": {"method.buffer_size": 2},
    "fedtgp": {"method.server_epochs": 3},
    "fedgen": {"method.server_steps": 3, "method.n_synthetic": 8},
    "ccvr": {"method.calibration_epochs": 1, "method.virtual_features": 10, "width": 8},
}
"""Options for short runs: the server trains long enough to compare two runs, and takes steps in every round."""


WEAK = {"method.moment_weight": 1e-3}
"""For `fedrir_moments`. Adam turns rounding errors of gradients that are 0 in theory into steps, and a strong term increases them."""


FEW_STEPS = {"method.local_steps": 3, "method.inner_steps": 2}
"""Short local updates for pFedMe, whose local updates are measured in batches instead of epochs."""


KINDS = (
    "fedavg",
    "scaffold",
    "fedmr",
    "fedper",
    "fedrir",
    "fedvtc",
    "fedproto",
    "ditto",
    "fedpac",
    "fedfomo",
    "ifca",
    "fedkd",
    "ccvr",
)
"""One method of each kind: what clients send and keep, what the server keeps, and how often they exchange messages."""


def kinds_first(methods: Collection[str]) -> list[Any]:
    """Return methods as parameters of a test whose subject is the framework. Those not in `KINDS` run only with `pytest -m slow`."""
    return [pytest.param(method, marks=[] if method in KINDS else pytest.mark.slow) for method in methods]


def brief(method: str) -> dict[str, Any]:
    """Return the settings that make a method's runs short, or comparable between engines (`WEAK`)."""
    return {"fedvtc": BRIEF, "fedrir_moments": WEAK, "pfedme": FEW_STEPS}.get(method, QUICK_SERVER.get(method, {}))


def changed(values: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """Return the values, overridden by settings (named as for `fedloom.run`). The input does not change."""
    found = {key: dict(v) if isinstance(v, dict) else v for key, v in values.items()}
    for key, value in settings.items():
        set_dotted(found, key, value)
    return found


class Turns(NamedTuple):
    """The messages of one round."""

    down: Downlink
    replies: list[Reply]

    @property
    def sent(self) -> list[Tree]:
        """The messages to the members of the cohort."""
        return [self.down.to(reply.slot) for reply in self.replies]


def spied(run: Experiment) -> list[Turns]:
    """Record the run's rounds while it runs."""
    rounds: list[Turns] = []
    train = run.engine.train

    def watched(number, cohort, down):
        replies = train(number, cohort, down)
        kept = [
            replace(reply, uplink=tree.clone(reply.uplink)) for reply in replies
        ]  # engines reuse their memory in the next round
        rounds.append(Turns(down, kept))
        return replies

    run.engine.train = watched  # type: ignore[method-assign]
    return rounds


def initial_weights(run: Experiment, i: int = 0) -> Weights:
    """Return all weights of client `i` before its first local update."""
    problem = run.problem
    with arithmetic(run.settings):
        return problem.initial(i, read_weights(problem.modules(problem.arch_of[i]))).weights


def interrupted_after(run: Experiment, last: int) -> Path:
    """Stop the run after round `last` and return its folder."""

    def stop(done, rounds, row):
        if done == last:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.run(stop)
    return run.folder.path


def losing(
    run: Experiment, lost: Mapping[int, Collection[int]], refused: Mapping[int, Collection[int]] | None = None
) -> Experiment:
    """Undo the local updates of the clients `lost[number]` in round `number`. Updates of `refused` clients are kept but do not count."""
    engine, train = run.engine, run.engine.train

    def fewer(number, cohort, down):
        gone = lost.get(number, ())
        before = {i: Client(**tree.clone(engine.client(i)._asdict())) for i in gone}
        replies = train(number, cohort, down)
        for i, client in before.items():
            engine.restore(i, client)
        return [r for r in replies if r.client not in (*gone, *(refused or {}).get(number, ()))]

    engine.train = fewer  # type: ignore[method-assign]
    return run
