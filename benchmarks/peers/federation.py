"""Shared code of the peer scripts: the workload's federation with fedloom's partition, and the report."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch

from fedloom.engines import Problem
from fedloom.experiment.environment import environment
from fedloom.tools import bench


def options(peer: str, workloads: Sequence[str], **more: str) -> argparse.Namespace:
    """Return the arguments of a peer script: the workload, --scale, --rounds, and `more` as required options --name
    with their meanings.
    """
    parser = argparse.ArgumentParser(description=f"Seconds per round of {peer} on a fedloom workload.")
    parser.add_argument("workload", choices=workloads)
    parser.add_argument("--scale", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=5)
    for name, meaning in more.items():
        parser.add_argument(f"--{name}", required=True, help=meaning)
    return parser.parse_args()


@cache
def problem_of(workload: str, scale: float) -> Problem:
    """Return the workload's clients, model and plan, which are created once per process."""
    return bench.problem_of(bench.WORKLOADS[workload], scale)


def need(module: str, install: str) -> ModuleType:
    """Import a peer's module. If it is missing, print one line that says what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SystemExit(f"{module} cannot be imported ({error}); {install}") from None


def tell(peer: str, given: argparse.Namespace, seconds: Sequence[float], covers: str) -> None:
    """Print the result as JSON. The first round is a warm-up and is not counted."""
    low, median, high = np.quantile(seconds[1:] or seconds, [0.25, 0.5, 0.75])
    result: dict[str, Any] = {"peer": peer, **vars(given), "round_s": {"median": median, "low": low, "high": high}}
    result |= {"covers": covers, "threads": torch.get_num_threads(), "environment": environment()}
    print(json.dumps(result, indent=2))
