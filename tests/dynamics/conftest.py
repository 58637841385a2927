"""The fixture of the two clients with quadratic losses."""

import numpy as np
import pytest

from fedloom import from_arrays
from rig import ROWS, A, B


@pytest.fixture
def settle(experiment):
    """Return a function that runs a method on the two clients, and returns the server's vector and the experiment."""
    y = np.zeros(2 * ROWS, int)
    y[::2] = 1
    x = np.repeat(np.concatenate([A, B], 1), ROWS, 0)
    owner = np.repeat(["first", "second"], ROWS)
    dataset = from_arrays(x, y, columns={"owner": owner})

    def go(method, rounds=60, **settings):
        chosen = {
            "model": "logistic", "clients": 2, "rounds": rounds, "eval_every": rounds, "batch_size": 100,
            "partition": {"name": "natural", "column": "owner", "min_examples": 2}, "checkpoint_every": 0,
        }  # fmt: skip
        run = experiment(method, dataset=dataset, **(chosen | settings))
        run.run()
        server = run.server
        return (
            server["weights"]["params"]["model.w"] if "weights" in server else server["slots"]["params"]["model.w"]
        ), run

    return go
