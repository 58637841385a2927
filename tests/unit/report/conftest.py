"""A comparison folder for the report tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from synthetic_runs import Scene


@pytest.fixture(scope="session")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a comparison folder with four methods and two seeds each, in which one run is unfinished."""
    folder = tmp_path_factory.mktemp("runs") / "comparison"
    plans = {"fedavg": 0.70, "fedprox": 0.73, "fedrir": 0.86, "fedper": 0.82}
    for method, final in plans.items():
        for seed in (0, 1):
            Scene(
                method=method,
                seed=seed,
                final=final + 0.02 * seed,
                logs=("train.loss", "train.mi", "train.kl") if method == "fedrir" else ("train.loss",),
                server=method in ("fedavg", "fedprox"),
                finished=(method, seed) != ("fedper", 1),
                uplink_per_round=1_900_000 if method in ("fedrir", "fedper") else 2_400_000,
            ).write(folder / f"{method}-seed{seed}")
    return folder
