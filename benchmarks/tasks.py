"""Federated learning of tasks other than classification, compared with chance and with centralised training.

    python benchmarks/tasks.py [TASK ...]     # diabetes, digit-labels, text-lstm, text-transformer; default: all

Each cell (task, method, seed) is written to benchmarks/results/tasks.json as soon as it is complete. Cells that are in the file are
skipped. The script prints one Markdown table per task: the mean over three seeds of the final value on the clients' own test examples,
with the largest and the smallest value.

- diabetes: regression of disease progression, with 442 patients divided among 6 clients by quantile bins of the target (Dirichlet 0.5).
  Chance is the mean of the training targets.
- digit-labels: three labels of each handwritten digit (odd, five or more, has a loop), with 10 clients by rarest label (Dirichlet 0.5).
  Chance is every label always, which is the best constant answer.
- text-lstm, text-transformer: the next byte of the source code of ten modules of Python's standard library, with one client per module.
  Chance is always the most frequent byte, a space.
"""

from __future__ import annotations

import difflib
import importlib
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import fedloom
from fedloom.data import Dataset, load

RESULTS = Path(__file__).parent / "results" / "tasks.json"
METHODS = ("centralised", "fedavg", "fedavg_ft", "fedper", "fedmr", "local")
SEEDS = (0, 1, 2)
MODULES = ("argparse", "ast", "calendar", "csv", "difflib", "heapq", "shutil", "string", "textwrap", "zipfile")
LENGTH, BYTES = 64, 8000  # length of a block, and number of bytes of a module


class Study(NamedTuple):
    """One task: its data, the settings of all its runs, and the displayed metric."""

    data: Callable[[], Dataset]
    settings: Mapping[str, Any]
    metric: str
    chance: Callable[[Dataset], float]


def diabetes() -> Dataset:
    return load("diabetes")


def digit_labels() -> Dataset:
    digits = load("digits")
    y = digits.labels.numpy()
    labels = np.stack([y % 2 == 1, y >= 5, np.isin(y, [0, 6, 8, 9])], axis=1).astype(int)
    names = ["odd", "five or more", "has a loop"]
    return fedloom.from_arrays(digits.images, labels, name="digit-labels", task="multilabel", classes=names)


def text() -> Dataset:
    inputs, targets, owners = [], [], list[str]()
    for name in MODULES:
        source = Path(str(importlib.import_module(name).__file__)).read_bytes()[: BYTES + 1]
        tokens = np.frombuffer(source, np.uint8).astype(np.int64) + 1  # id 0 is padding
        n = (len(tokens) - 1) // LENGTH
        inputs.append(tokens[: n * LENGTH].reshape(n, LENGTH))
        targets.append(tokens[1 : n * LENGTH + 1].reshape(n, LENGTH))
        owners += [name] * n
    x, y = np.concatenate(inputs), np.concatenate(targets)
    return fedloom.from_arrays(x, y, name="text", task="language", vocabulary=257, columns={"module": owners})


def mean_of_targets(data: Dataset) -> float:
    return float(data.objective.content()["std"][0])


def every_label(data: Dataset) -> float:
    share = float(data.targets.double().mean())
    return 2 * share / (1 + share)


def most_frequent(data: Dataset) -> float:
    return float(torch.bincount(data.targets.flatten()).max() / data.targets.numel())


SKEWED = {"name": "dirichlet", "alpha": 0.5}
STUDIES = {
    "diabetes": Study(
        diabetes,
        {"model": "mlp", "clients": 6, "rounds": 20, "partition": SKEWED, "method.lr": 0.01, "model.hidden": 32},
        "rmse",
        mean_of_targets,
    ),
    "digit-labels": Study(
        digit_labels,
        {"model": "fedavg_cnn", "clients": 10, "rounds": 20, "partition": SKEWED, "method.lr": 0.1},
        "micro_f1",
        every_label,
    ),
    "text-lstm": Study(
        text,
        {"model": "lm_lstm", "model.hidden": 64, "model.layers": 1, "model.dim": 32, "rounds": 25, "batch_size": 8,
         "method.lr": 0.005, "method.optimizer": "adam"},
        "accuracy",
        most_frequent,
    ),
    "text-transformer": Study(
        text,
        {"model": "lm_transformer", "model.dim": 48, "model.heads": 4, "model.depth": 1, "model.hidden": 96,
         "rounds": 25, "batch_size": 8, "method.lr": 0.005, "method.optimizer": "adam"},
        "accuracy",
        most_frequent,
    ),
}  # fmt: skip


def main(names: list[str]) -> None:
    """Run the cells that are not in the file yet, and print a table per task."""
    unknown = [name for name in names if name not in STUDIES]
    if unknown:
        close = difflib.get_close_matches(unknown[0], STUDIES, 1)
        sys.exit(
            f"tasks.py: no task '{unknown[0]}'; choose from {', '.join(STUDIES)}{f' ({close[0]}?)' if close else ''}"
        )
    record = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for name in names or STUDIES:
        study = STUDIES[name]
        cells = record.setdefault(name, {})
        for method in METHODS:
            for seed in SEEDS:
                key = f"{method}-{seed}"
                if key not in cells:
                    cells[key] = cell(study, method, seed)
                    record["environment"] = {"command": "python benchmarks/tasks.py", "torch": torch.__version__,
                                             "python": platform.python_version(), "fedloom": fedloom.__version__}  # fmt: skip
                    RESULTS.write_text(json.dumps(record, indent=1) + "\n")
        show(name, study, cells)


def cell(study: Study, method: str, seed: int) -> dict[str, Any]:
    """Run one cell and return its final numbers."""
    data, started = study.data(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        settings = dict(study.settings) | {
            "seed": seed,
            "out": f"{folder}/run",
            "engine": "sequential",
            "eval_every": 5,
        }
        run = fedloom.run(method, data=data, progress=False, **settings)
        last = run.metrics.iloc[-1]
        found = {
            key: float(value)
            for key, value in last.items()
            if str(key).startswith("personal_") and not isinstance(value, list)
        }
    return {
        "personal": found[f"personal_{study.metric}"],
        "worst10": found[f"personal_{study.metric}_worst10"],
        "other": {key: value for key, value in found.items() if study.metric not in key},
        "chance": study.chance(data),
        "seconds": round(time.perf_counter() - started, 1),
    }


def show(name: str, study: Study, cells: Mapping[str, Any]) -> None:
    """Print a task's table."""
    percent = study.metric != "rmse"

    def text_of(value: float) -> str:
        return f"{100 * value:.1f}" if percent else f"{value:.1f}"

    unit = " in %" if percent else " (lower is better)"
    print(f"\n{name}: {study.metric}{unit}; chance {text_of(cells['fedavg-0']['chance'])}\n")
    print("| method | mean | from | to |\n|---|---|---|---|")
    for method in METHODS:
        values = [cells[f"{method}-{seed}"]["personal"] for seed in SEEDS]
        print(f"| {method} | {text_of(float(np.mean(values)))} | {text_of(min(values))} | {text_of(max(values))} |")


if __name__ == "__main__":
    main(sys.argv[1:])
