"""FedMR as its authors released it, from a clone: their training loop with the workload's exact split.

    git clone https://github.com/HMHelloWorld/FedMR && pip install torchvision matplotlib
    python benchmarks/peers/fedmr.py w3 --scale 0.05 --clone FedMR

Examples are passed as tensors, so that torchvision's decoding is not timed. Every tenth round also evaluates; these rounds are not
counted.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from federation import need, options, problem_of, tell
from torch.utils.data import TensorDataset

HINT = "clone https://github.com/HMHelloWorld/FedMR, pip install torchvision matplotlib, and give --clone"
EVALUATED = 10  # every tenth round evaluates


def main() -> None:
    """Run the peer and report its times."""
    given = options("the released FedMR", ["w3"], clone="path of a clone of HMHelloWorld/FedMR")
    sys.path.insert(0, str(Path(given.clone).resolve()))
    algorithm, nets, parser = (
        need(name, HINT) for name in ("Algorithm.Training_FedMR", "models.Nets", "utils.options")
    )
    problem = problem_of(given.workload, given.scale)
    method, plan, task = problem.method, problem.plan, problem.task
    splits = [problem.data.train(i) for i in range(task.n_clients)]
    train = TensorDataset(*(torch.cat([split[k] for split in splits]) for k in (0, 1)))
    clients, first = {}, 0
    for i, (_, y) in enumerate(splits):
        clients[i] = range(first, first + len(y))
        first += len(y)
    flags = {
        "--epochs": given.rounds + 1, "--num_users": task.n_clients, "--frac": task.max_cohort / task.n_clients,
        "--local_ep": method.local_epochs, "--local_bs": plan.batch_size, "--lr": method.lr, "--momentum": method.momentum,
        "--algorithm": "FedMR", "--model": "resnet20", "--dataset": "cifar10", "--gpu": -1,
    }  # fmt: skip
    sys.argv[1:] = [str(word) for pair in flags.items() for word in pair]
    its_args = parser.args_parser()
    its_args.device, its_args.ensemble_alpha = torch.device("cpu"), 0.0  # its code reads these, but no option sets them
    ends, recombine = [time.perf_counter()], algorithm.recombination

    def timed(*parts: Any) -> Any:
        mixed = recombine(*parts)
        ends.append(time.perf_counter())
        return mixed

    algorithm.recombination = timed
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # it writes files to the working directory
        algorithm.FedMR(its_args, nets.ResNet20_cifar(its_args), train, TensorDataset(*problem.data.common()), clients)
    seconds = [end - start for start, end in zip(ends, ends[1:], strict=False)]
    tell("the released FedMR", given, [s for k, s in enumerate(seconds, start=1) if k % EVALUATED], "training alone")


if __name__ == "__main__":
    main()
