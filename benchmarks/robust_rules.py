"""Accuracy with robust rules (`aggregate=RULE`), with two malicious clients of eight, and without malicious clients under label skew.

    python benchmarks/robust_rules.py            # accuracy; takes some minutes
    python benchmarks/robust_rules.py seconds    # CPU seconds of one round with 20 uplinks of 582,000 numbers

The data are the digits, the model is an MLP, and there are 15 rounds without screening. Numbers are means over seeds 0, 1 and 2. The
settings and attacks are those of hostile_uplinks.py.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
import warnings
from typing import Any

import torch

from fedloom import FedAvg, tree
from fedloom.combining.additive import Additive
from fedloom.combining.robust import combine_robustly
from fedloom.combining.rules import parse_rule
from fedloom.config.settings import make_settings
from fedloom.errors import UsageError
from fedloom.experiment.loop import Experiment, GivenObjects
from hostile_uplinks import ATTACKS, VALUES, Attack, Hostile

RULES = (None, "median", "trimmed:0.25", "krum:2", "multikrum:2", "geometric", "norm-bound:1", "clip:1")
CHOSEN = ("none", "x 1e6", "x -10", "x -3", "x -1")
SKEWS: dict[str, dict[str, Any]] = {
    "iid": {"partition": {"name": "iid"}},
    "Dirichlet 0.5": {"partition": {"name": "dirichlet", "alpha": 0.5}},
    "Dirichlet 0.1": {"partition": {"name": "dirichlet", "alpha": 0.1}},
    "two classes each, 10 clients": {"partition": {"name": "pathological", "classes_per_client": 2}, "clients": 10},
}


def accuracies(method: str, rule: str | None, attack: Attack, **more: Any) -> str:
    """Return the mean personal accuracy in percent over all examples and over the worst tenth of clients, or the
    reason why a run ended.
    """
    found = []
    for seed in range(3):
        with tempfile.TemporaryDirectory() as folder:
            values = VALUES | {"method": {"name": method, "lr": 0.2}, "seed": seed, "out": f"{folder}/run", **more}
            settings = make_settings(values | ({"aggregate": rule} if rule else {}))
            try:
                summary = Experiment(settings, GivenObjects(engine=lambda p: Hostile(p, attack))).run()
            except UsageError as error:
                return type(error).__name__
            found.append([summary["personal_accuracy"][key] for key in ("final", "worst10")])
    mean, worst = (100 * sum(column) / len(column) for column in zip(*found, strict=True))
    return f"{mean:.1f} ({worst:.0f})"


def seconds() -> None:
    """Print the CPU seconds of the server in one round."""
    shapes = ((32, 1, 5, 5), (64, 32, 5, 5), (512, 1024), (512,), (10, 512))
    uplinks = [
        {"weights": {"params": {str(shape): torch.randn(shape) for shape in shapes}, "buffers": {}}} for _ in range(20)
    ]
    for rule in RULES:
        start = time.process_time()
        if rule is None:
            tree.mean(uplinks)
        else:
            vectors = Additive(FedAvg(), uplinks, tree.zeros_like(uplinks[0]))
            vectors.stand_in(combine_robustly(parse_rule(rule), vectors))
        print(f"{rule}: {time.process_time() - start:.2f} s")


def main() -> None:
    """Print the tables."""
    warnings.simplefilter("ignore", RuntimeWarning)  # means of logs that overflow
    logging.disable()
    torch.set_num_threads(1)
    if sys.argv[1:] == ["seconds"]:
        seconds()
        return
    for method in ("fedavg", "scaffold"):
        print(f"| {method} |", " | ".join(CHOSEN), "|")
        for rule in RULES:
            print(
                f"| {rule} |", " | ".join(accuracies(method, rule, ATTACKS[name]) for name in CHOSEN), "|", flush=True
            )
    print("| fedavg, no attack |", " | ".join(SKEWS), "|")
    for rule in RULES:
        cells = [accuracies("fedavg", rule, ATTACKS["none"], **skew) for skew in SKEWS.values()]
        print(f"| {rule} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
