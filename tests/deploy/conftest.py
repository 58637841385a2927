"""Federations of processes on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from federation import values

from fedloom.config.settings import make_settings
from fedloom.deploy.grid import GridLink
from fedloom.deploy.local import LocalFederation, local_federation
from fedloom.deploy.running import prepare, resume_deployed
from fedloom.experiment.loop import Experiment, OnRound

NODES = 3


class Ran(NamedTuple):
    """A finished run and its messages."""

    experiment: Experiment
    said: list[str]
    seconds: float


class Running:
    """A running federation, and experiments on it."""

    def __init__(self, federation: LocalFederation, folder: Path) -> None:
        self.federation, self.folder = federation, folder
        self.n = 0

    def run(self, on_round: OnRound | None = None, path: Path | None = None, **settings: Any) -> Ran:
        """Run one experiment. With `path`, resume that run."""
        said: list[str] = []
        link = GridLink(self.federation.deployment, said.append)
        self.n += 1
        chosen = values(**settings) | {"out": str(self.folder / f"run-{self.n}")}
        try:
            deployment = self.federation.deployment
            experiment = (
                resume_deployed(deployment, path, link, said.append)
                if path
                else prepare(deployment, chosen, link, said.append)
            )
        except BaseException:
            link.close()
            raise
        started = time.monotonic()
        experiment.run(on_round)
        return Ran(experiment, said, time.monotonic() - started)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Start three nodes with two clients each, for all tests of a module."""
    folder = tmp_path_factory.mktemp("deploy")
    with local_federation(values(), NODES, folder / "federation") as federation:
        yield Running(federation, folder)


@pytest.fixture
def simulated(tmp_path: Path) -> Callable[..., Experiment]:
    """Return a function that runs the same experiment on the sequential engine with one thread."""

    def run(**settings: Any) -> Experiment:
        chosen = values(**settings) | {"engine": {"name": "sequential", "threads": 1}, "out": str(tmp_path / "here")}
        experiment = Experiment(make_settings(chosen))
        experiment.run()
        return experiment

    return run
