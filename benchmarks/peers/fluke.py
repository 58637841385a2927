"""fluke: FedAVG on the workload's examples, which its own splitter divides into equal clients.

pip install fluke-fl
python benchmarks/peers/fluke.py w4-mlp --scale 0.1
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

HERE = str(Path(__file__).parent)
sys.path[:] = [entry for entry in sys.path if str(Path(entry).resolve()) != HERE] + [
    HERE
]  # this file has the same name as the package

import numpy as np  # noqa: E402
from federation import need, options, problem_of, tell  # noqa: E402

HINT = "pip install fluke-fl"


def main() -> None:
    """Run the peer and report its times."""
    given = options("fluke", ["w4", "w4-mlp"])
    fluke, data, evaluation = (need(name, HINT) for name in ("fluke", "fluke.data", "fluke.evaluation"))
    fedavg = need("fluke.algorithms.fedavg", HINT)
    containers = need("fluke.data.datasets", HINT) if not hasattr(data, "DataContainer") else data
    problem = problem_of(given.workload, given.scale)
    task = problem.task
    train = problem.data.rows(np.concatenate(problem.data.partition.train))
    container = containers.DataContainer(*train, *problem.data.common(), task.n_classes)
    fluke.FlukeENV().set_evaluator(evaluation.ClassificationEval(eval_every=1, n_classes=task.n_classes))
    hyper_parameters = fluke.DDict(
        model=problem.modules(0)["model"].requires_grad_(True),
        client=fluke.DDict(
            batch_size=problem.plan.batch_size,
            local_epochs=problem.method.local_epochs,
            loss="CrossEntropyLoss",
            optimizer=fluke.DDict(name="SGD", lr=problem.method.lr),
            scheduler=fluke.DDict(gamma=1, step_size=1),
        ),
        server=fluke.DDict(weighted=True),
    )
    algorithm = fedavg.FedAVG(task.n_clients, data.DataSplitter(container, distribution="iid"), hyper_parameters)
    seconds = []
    for _ in range(given.rounds + 1):
        started = time.perf_counter()
        algorithm.run(1, task.max_cohort / task.n_clients, finalize=False)
        seconds.append(time.perf_counter() - started)
    tell("fluke", given, seconds, "training and the server's accuracy on the common rows")


if __name__ == "__main__":
    main()
