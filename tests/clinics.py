"""Tables of two clinics on two nodes, and the same rows as one table, for simulations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fedloom.config.settings import make_settings
from fedloom.data import Partition
from fedloom.data.preprocess import Given, Preprocess
from fedloom.deploy.rows import read_own
from fedloom.experiment.loop import Experiment, GivenObjects

SPLITS = ("train", "valid", "test")


def write_clinics(folder: Path) -> dict[str, Path]:
    """Write the tables `server`, `clinic-0` and `clinic-1` (a number with gaps, yes or no, categories, a text), and `both`."""
    rng, found = np.random.default_rng(0), dict[str, Path]()
    parts = {"server": [0, 0] * 20, "clinic-0": [0] * 40, "clinic-1": [1] * 50}
    both = ["client,age,job,smokes,note,risk,days"]
    for name, clients in parts.items():
        lines = []
        for n, client in enumerate(clients):
            age, smokes = ("" if n % 9 == 4 else int(rng.integers(20, 80))), ("no", "yes")[int(rng.integers(2))]
            job = ("clerk", "nurse", "cook")[int(rng.integers(3))]
            risk = ("high", "low")[int((age or 50) < 50)]
            note = f"a {('bad', 'good')[risk == 'low']} day for the {job}"
            lines.append(f"{age},{job},{smokes},{note},{risk},{(age or 50) / 7 + n % 3}")
            both += [f"{client},{lines[-1]}"] if name != "server" else []
        found[name] = folder / f"{name}.csv"
        found[name].write_text("\n".join([both[0].removeprefix("client,"), *lines]) + "\n")
    (folder / "both.csv").write_text("\n".join(both) + "\n")
    return found | {"both": folder / "both.csv"}


def simulated_clinics(deployed: Experiment, files: dict[str, Path], values: dict[str, Any]) -> Experiment:
    """Return the simulation of a deployed run: the rows of both clinics in one table, with the nodes' own splits. It has not run yet."""
    settings = make_settings(values | {"engine": {"name": "sequential", "threads": 1}})
    preprocess = Preprocess.read(deployed.folder.path / "preprocess.json")
    given = Given(preprocess=preprocess, where="p", accepts_unknown=True)
    splits: dict[str, list[Any]] = {split: [] for split in SPLITS}
    start = 0
    for i in range(2):
        own = read_own(files[f"clinic-{i}"], [i], settings, given)
        for split in SPLITS:
            splits[split].append(getattr(own.partition, split)[i] + start)
        start += own.dataset.n_rows
    everything = {split: tuple(parts) for split, parts in splits.items()}
    partition = Partition(**everything, common=np.empty(0, np.int64), scheme={})
    (deployed.folder.path.parent / "p.json").write_text(preprocess.text())
    kept = {key: values["data"][key] for key in ("name", "drop", "normalise") if key in values["data"]}
    chosen = values | {
        "data": {**kept, "path": str(files["both"]), "preprocess": str(deployed.folder.path.parent / "p.json")},
        "engine": {"name": "sequential", "threads": 1},
        "partition": {"name": "given"},
        "clients": None,
        "out": str(deployed.folder.path.parent / "simulated"),
    }
    return Experiment(make_settings(chosen), GivenObjects(partition=partition))
