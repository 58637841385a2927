"""Compare rounds with input layers in dual form (`training/fast/gram_layer.py`) and in the original form, and check the rule that chooses.

The two forms alternate round by round.

python benchmarks/dual_form.py [rounds=12]      two worker processes; an MLP on the shape of MNIST, 6,000 examples per round
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch

from fedloom.config.settings import make_settings
from fedloom.experiment.loop import GivenObjects
from fedloom.tools.bench import WORKLOADS, Stepped, dataset_for
from fedloom.training.fast.gram_layer import PhaseWork


class Case(NamedTuple):
    """The local update of one client, with `lanes` clients side by side."""

    rows: int
    passes: int = 1
    hidden: int = 200
    batch: int = 10
    lanes: int = 1

    @property
    def is_taken(self) -> bool:
        """Return whether the rule chooses the dual form."""
        work = PhaseWork(self.rows, self.rows * self.passes, self.passes * -(-self.rows // self.batch), self.lanes)
        return work.is_less_by_gram_matrix(torch.empty(self.hidden, 784))


CASES = (
    *(Case(60, lanes=lanes) for lanes in (1, 4, 10, 25, 50)),
    *(Case(60, passes=5, lanes=lanes) for lanes in (1, 10)),
    *(Case(60, hidden=1000, lanes=lanes) for lanes in (1, 10)),
    *(Case(300, lanes=lanes) for lanes in (1, 10)),
    *(Case(600, passes=5, lanes=lanes) for lanes in (1, 5)),
    *(Case(600, passes=5, batch=50, lanes=lanes) for lanes in (1, 5)),
)
WARM_UP = 2


def main(words: Sequence[str]) -> None:
    """Print one line per case."""
    key, _, value = (words or ["rounds=12"])[0].partition("=")
    if len(words) > 1 or key != "rounds" or not value.isdigit() or int(value) <= WARM_UP:
        sys.exit(f"benchmarks: error: {' '.join(words)}: give rounds=N with more than {WARM_UP} rounds, or nothing")
    rounds = int(value)
    for case in CASES:
        low, median, high = np.quantile(gains(case, rounds), [0.25, 0.5, 0.75])
        told = ", ".join(f"{name} {value}" for name, value in case._asdict().items())
        taken = "taken" if case.is_taken else "not taken"
        print(f"{told}: {median:.2f} ({low:.2f}-{high:.2f}) times as fast in dual form; {taken}", flush=True)


def gains(case: Case, rounds: int) -> np.ndarray:
    """Return the training time in the original form, divided by that in dual form, for each round (rounds,)."""
    work = WORKLOADS["w4-mlp"]
    n_clients = 60_000 // case.rows
    values = {
        **work.values(1.0),
        "method": {"name": "fedavg", "lr": 0.05, "local_epochs": case.passes},
        "model": {"name": "mlp", "hidden": case.hidden},
        "clients": n_clients,
        "cohort": n_clients // 10,
        "batch_size": case.batch,
        "rounds": 10_000,
        "checkpoint_every": 0,
        "eval_every": 10_000,
        "engine": {"name": "processes", "workers": 2, "lanes": case.lanes if case.lanes > 1 else None},
    }
    dataset = dataset_for(work, 1.0)
    with ExitStack() as open_things:
        folder = Path(open_things.enter_context(tempfile.TemporaryDirectory(prefix="fedloom-dual-")))
        runs = []
        for form in (False, True):
            with patch.object(
                PhaseWork, "is_less_by_gram_matrix", lambda _, weight, form=form: form and weight.numel() > 1e5
            ):
                settings = make_settings({**values, "out": folder / str(form)})
                runs.append(
                    Stepped(settings, GivenObjects(dataset=dataset))
                )  # its workers are forked here and inherit the patched rule
            open_things.callback(runs[-1].engine.close)
        times = [[_round(run) for run in runs[:: 1 if k % 2 else -1]][:: 1 if k % 2 else -1] for k in range(rounds)]
    written, dual = np.array(times[WARM_UP:]).T
    return written / dual


def _round(run: Stepped) -> float:
    return run.round(run.next_cohort()).train


if __name__ == "__main__":
    main(sys.argv[1:])
