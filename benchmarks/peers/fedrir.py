"""FedRIR as its authors released it, from a clone: their server and clients with the workload's exact split.

    git clone https://github.com/tsmotlp/FedRIR && pip install ujson
    python benchmarks/peers/fedrir.py w2 --scale 0.08 --clone FedRIR

Every round first evaluates (the test examples, and all training examples with the losses of both stages) and then trains. Its loader
excludes clients with fewer examples than a batch from training.
"""

from __future__ import annotations

import sys
import tempfile
from argparse import Namespace
from pathlib import Path

import torch
from federation import need, options, problem_of, tell
from pfllib import write_split

DATA, SPLIT = "Cifar10", "fedloom"  # the first name determines the nets' sizes


def main() -> None:
    """Run the peer and report its times."""
    given = options("the released FedRIR", ["w2"], clone="path of a clone of tsmotlp/FedRIR")
    sys.path.insert(0, given.clone)
    server = need("server", "clone https://github.com/tsmotlp/FedRIR, pip install ujson, and give --clone")
    problem = problem_of(given.workload, given.scale)
    method, plan, n_clients = problem.method, problem.plan, problem.task.n_clients
    with tempfile.TemporaryDirectory() as folder:
        write_split(problem, Path(folder) / DATA / SPLIT)
        its_args = Namespace(
            lr=method.lr, batch_size=plan.batch_size, mask_ratio=method.mask_ratio, local_epochs=method.local_epochs,
            global_epochs=given.rounds + 1, eval_interval=1, join_ratio=1.0, random_join_ratio=False,
            dataset=DATA, experiment_name=SPLIT, base_data_dir=folder, num_clients=n_clients, device=torch.device("cpu"),
        )  # fmt: skip
        federation = server.FedRIRServer(its_args)
    federation.run()
    tell("the released FedRIR", given, federation.Budget, "training and its evaluation (test rows; all training rows)")


if __name__ == "__main__":
    main()
