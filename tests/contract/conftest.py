"""Fixtures that all runs of a session share: one start of Ray, whose workers serve one engine after another, and operation counts."""

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fedloom.engines import Problem
from fedloom.experiment.costs import Costs

counted: dict[Any, Costs] = {}


class CountedOnce(Costs):
    """Costs that are counted once for all engines, because they depend only on the problem. Counting takes half of a short run."""

    def __init__(self, problem: Problem) -> None:
        p, data = problem, problem.data
        rows = data.name, data.partition.hash(), p.arch_of, p.plan, p.slowdowns
        key = p.method, p.task, p.archs, rows, p.seed, p.same_init, repr(p.codec), torch.get_default_dtype()
        known = counted.setdefault(key, self)
        if known is self:
            super().__init__(problem)
        self.__dict__ = known.__dict__

    def peak_client_bytes(self) -> int:
        """Return the peak memory of a client's tensors."""
        if "peak" not in self.__dict__:
            self.peak = super().peak_client_bytes()
        return self.peak


@pytest.fixture(autouse=True)
def counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use `CountedOnce` in all runs of these tests."""
    monkeypatch.setattr("fedloom.experiment.accounting.Costs", CountedOnce)


if importlib.util.find_spec("ray"):
    from fedloom.engines.ray.engine import Cluster

    class Lent(Cluster):
        """Workers that outlive the engines that use them."""

        def close(self) -> None:
            """Keep the workers for the next engine."""

    @pytest.fixture(scope="session")
    def workers() -> Iterator[Any]:
        """Return a cluster of two workers."""
        cluster = Lent(None, 2, 2)
        yield cluster
        Cluster.close(cluster)

    @pytest.fixture(autouse=True)
    def lent(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        """Make `engine=ray` use the session's workers."""
        monkeypatch.setattr("fedloom.engines.ray.engine.Cluster", lambda *_: request.getfixturevalue("workers"))
