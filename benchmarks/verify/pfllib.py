"""Compare fedloom's methods with PFLlib's, weight by weight.

    git clone https://github.com/TsingZ0/PFLlib && pip install h5py cvxpy
    python benchmarks/verify/pfllib.py --clone PFLlib                  all methods, and save the results
    python benchmarks/verify/pfllib.py --clone PFLlib scaffold ditto   only these methods

Both tools train the same four clients for three rounds from the same initial weights. Batches contain all examples of a client, so that
nothing is drawn at random, and numbers are in float64. The result is the largest relative difference of the weights on the server and on
the clients after the last round.

The code of PFLlib's servers and clients is that of the clone, with three exceptions. Evaluation and saving are left out. The reader of
data files, which would convert inputs to float32, is replaced. If PFLlib is known to differ from the paper, `Case.switch` removes the
difference, and `Case.cause` names it. The results are in benchmarks/results/verify-pfllib.json, and docs/verification.md shows them.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import importlib
import io
import json
import random
import subprocess
import sys
import tempfile
import types
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import CASES
from torch import nn
from weights import CLIENTS, HIDDEN, LR, ROUNDS, TEST, TRAIN, VALID, Arrays, Case, Net, chosen, fill, parameters

from fedloom.config.settings import make_settings
from fedloom.experiment.environment import environment
from fedloom.experiment.loop import Experiment, GivenObjects
from fedloom.nets import read_weights

RESULTS = Path(__file__).parents[1] / "results" / "verify-pfllib.json"
EQUAL = 1e-6  # models with a smaller relative difference are equal


@contextlib.contextmanager
def federation() -> Iterator[Path]:
    """Write a partition of the digits into four clients of equal size and different classes, and yield its folder."""
    from fedloom.data import load

    labels = load("digits").labels.numpy()
    order = np.argsort(labels[: 2 * CLIENTS * (TRAIN + TEST)], kind="stable")[::2]
    blocks = np.array_split(order, 2 * CLIENTS)  # two blocks of neighbouring classes per client
    rows = [np.concatenate([blocks[i], blocks[i + CLIENTS]]) for i in range(CLIENTS)]
    rows = [np.random.default_rng(i).permutation(mine) for i, mine in enumerate(rows)]
    with tempfile.TemporaryDirectory() as folder:
        for name, n_valid in (("dealt", 0), ("valid", VALID)):
            splits = {
                "train": slice(TRAIN - n_valid),
                "valid": slice(TRAIN - n_valid, TRAIN),
                "test": slice(TRAIN, None),
            }
            dealt = {split: [mine[part].tolist() for mine in rows] for split, part in splits.items()}
            Path(folder, f"{name}.json").write_text(json.dumps(dealt))
        yield Path(folder)


def our_run(name: str, case: Case, folder: Path) -> Experiment:
    """Return our run, before its first round."""
    settings = {
        "method": {"name": name, "lr": LR, "local_epochs": 2, **case.ours},
        "model": {"name": "Net"} if case.norm else {"name": "mlp", "hidden": HIDDEN},
        "data": {"name": "digits"},
        "partition": {"name": "file", "path": str(folder / ("valid.json" if case.valid else "dealt.json"))},
        "engine": {"name": "sequential", "threads": 1},
        "rounds": case.rounds,
        "batch_size": TRAIN,
        "precision": "fp64",
        "out": str(folder / name),
    }
    return Experiment(make_settings(settings), GivenObjects(model=Net if case.norm else None))


# PFLlib's side


def defaults(system: Path) -> dict[str, Any]:
    """Return the defaults of PFLlib's arguments, read from main.py, which itself imports torchvision."""
    parser = argparse.ArgumentParser()
    for node in ast.walk(ast.parse((system / "main.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "parser.add_argument":
            exec(ast.unparse(node), {"parser": parser})
    return vars(parser.parse_args([]))


def their_run(case: Case, run: Experiment, system: Path) -> Any:
    """Return PFLlib's server with its clients, before the first round."""
    data = {
        (i, is_train): [pair for split in splits for pair in zip(*getattr(run.data, split)(i), strict=True)]
        for i in range(CLIENTS)
        for is_train, splits in ((True, ("train", *(["valid"] if case.valid else []))), (False, ("test",)))
    }
    reader = importlib.import_module("utils.data_utils")
    reader.read_client_data = lambda _, i, is_train=True, **__: data[i, is_train]
    base = importlib.import_module("flcore.servers.serverbase")
    for name in ("save_results", "save_global_model"):
        setattr(base.Server, name, lambda *_: None)
    module, cls = case.server.split(":")
    servers = importlib.import_module(f"flcore.servers.{module}")
    values = defaults(system) | {
        "device": "cpu", "dataset": "digits", "num_clients": CLIENTS, "global_rounds": ROUNDS - 1, "batch_size": TRAIN,
        "local_epochs": 2, "local_learning_rate": LR, "feature_dim": HIDDEN, **case.theirs,
    }  # fmt: skip
    args = types.SimpleNamespace(**values)
    weights = read_weights(run.problem.modules(0))["params"]
    args.model = Net(case.norm)
    fill(args.model, chosen(weights, "model"))
    if case.split:
        args.head = copy.deepcopy(args.model.fc)
        args.model.fc = nn.Identity()
        args.model = importlib.import_module("flcore.trainmodel.models").BaseHeadSplit(args.model, args.head)
    server = getattr(servers, cls)(args, 0)
    for name in ("evaluate", "evaluate_personalized", "evaluate_one_step", "avg_generalization_metrics"):
        setattr(server, name, lambda *_, **__: None)
    server.rs_test_acc = server.rs_test_acc_per = [0]
    return server


def difference(ours: Sequence[Arrays], theirs: Sequence[Arrays]) -> float:
    """Return the largest relative difference of two lists of models, which is ||x - y|| / ||y|| for each pair of tensors."""
    if [[x.shape for x in model] for model in ours] != [[x.shape for x in model] for model in theirs]:
        shapes = [[list(x.shape) for x in models[0]] for models in (ours, theirs)]
        raise SystemExit(
            f"the two tools hold different tensors: {len(ours)} x {shapes[0]}, {len(theirs)} x {shapes[1]}"
        )
    pairs = [(x, y) for one, other in zip(ours, theirs, strict=True) for x, y in zip(one, other, strict=True)]
    return max(float((x - y).norm() / y.norm().clamp(min=1e-300)) for x, y in pairs)


def compare(name: str, case: Case, folder: Path, system: Path) -> dict[str, Any]:
    """Run a method in both tools, and return the differences of their weights."""
    torch.set_default_dtype(torch.float64)
    with torch.random.fork_rng(), warnings.catch_warnings(action="ignore"):
        run = our_run(name, case, folder)
        with case.watch() as seen:
            run.run()
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002 (PFLlib uses it)
        torch.manual_seed(0)
        with contextlib.redirect_stdout(io.StringIO()):
            server = their_run(case, run, system)
            server.seen = seen
            if case.starts:
                case.starts(run, server)
            if case.switch:
                case.switch(server)
            start = parameters(server.clients[0].model)
            server.train()
    moved = difference([start], [parameters(server.clients[0].model)])
    found = {what: difference(ours(run), theirs(server)) for what, (ours, theirs) in case.parts.items()}
    return {"moved": moved, "differences": found, "equal": max(found.values()) < EQUAL, "cause": case.cause}


def main() -> None:
    """Compare the methods, print the differences, and save them if all methods were compared."""
    parser = argparse.ArgumentParser(description="Compare fedloom's methods with PFLlib's, weight by weight.")
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"some of {', '.join(CASES)}")
    parser.add_argument("--clone", required=True, help="path of a clone of PFLlib")
    given = parser.parse_args()
    if unknown := set(given.methods) - set(CASES):
        raise SystemExit(
            f"{', '.join(sorted(unknown))}: there is no such comparison; choose some of {', '.join(CASES)}"
        )
    system = Path(given.clone).resolve() / "system"
    if not (system / "main.py").is_file():
        raise SystemExit(f"--clone {given.clone}: there is no system/main.py; clone https://github.com/TsingZ0/PFLlib")
    sys.path.insert(0, str(system))
    results = {}
    with federation() as folder:
        for name in given.methods or CASES:
            results[name] = compare(name, CASES[name], folder, system)
            shown = ", ".join(f"{what} {value:.1e}" for what, value in results[name]["differences"].items())
            print(f"{name:12}{'equal' if results[name]['equal'] else 'differs':9}{shown}", flush=True)
    if not given.methods:
        commit = subprocess.run(
            ["git", "-C", given.clone, "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        )
        facts = {"peer": "PFLlib", "commit": commit.stdout.strip(), "rounds": ROUNDS, "environment": environment()}
        RESULTS.write_text(json.dumps({**facts, "methods": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
