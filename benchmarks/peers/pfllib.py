"""PFLlib itself, from a clone: its own main.py with the workload's exact split.

    git clone https://github.com/TsingZ0/PFLlib && pip install h5py calmsize torchvision ...   (its env_cuda_latest.yaml)
    python benchmarks/peers/pfllib.py w1 --scale 0.1 --clone PFLlib

The script writes a data set `fedloom-...` to the dataset folder of the clone. It supports only CNN workloads, because PFLlib's MLP has a
different width.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from federation import options, problem_of, tell

from fedloom.engines import Problem

DATA_NAMES = {
    "w1": "fedloom-Cifar10",
    "w1-100": "fedloom-Cifar10",
    "w4": "fedloom-MNIST",
}  # the name determines the model


def main() -> None:
    """Run the peer and report its times."""
    given = options("PFLlib", sorted(DATA_NAMES), clone="path of a clone of PFLlib")
    system = Path(given.clone) / "system"
    if not (system / "main.py").is_file():
        raise SystemExit(f"--clone {given.clone}: there is no system/main.py; clone https://github.com/TsingZ0/PFLlib")
    problem = problem_of(given.workload, given.scale)
    name = DATA_NAMES[given.workload]
    write_split(problem, system.parent / "dataset" / name)
    task = problem.task
    flags = {
        "-data": name, "-m": "CNN", "-algo": "FedAvg", "-dev": "cpu", "-eg": 1, "-gr": given.rounds,
        "-lbs": problem.plan.batch_size, "-lr": problem.method.lr, "-nc": task.n_clients,
        "-jr": task.max_cohort / task.n_clients,
    }  # fmt: skip
    command = [sys.executable, "main.py", *(str(word) for pair in flags.items() for word in pair)]
    done = subprocess.run(command, cwd=system, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"PFLlib ended with exit code {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
    seconds = [float(found) for found in re.findall(r"time cost\W+([0-9.]+)", done.stdout)]
    if not seconds:
        raise SystemExit("PFLlib printed no 'time cost': has its output changed?")
    tell("PFLlib", given, seconds, "training and its evaluation (accuracy, AUC, training loss)")


def write_split(problem: Problem, folder: Path) -> None:
    """Write PFLlib's layout: train/<client>.npz and test/<client>.npz, each of which contains one dictionary of x and y."""
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True, exist_ok=True)
        for i in range(problem.task.n_clients):
            x, y = getattr(problem.data, split)(i)
            np.savez_compressed(folder / split / f"{i}.npz", data={"x": x.numpy(), "y": y.numpy()})


if __name__ == "__main__":
    main()
