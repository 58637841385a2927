"""Start Ray once for all tests of a session; one engine after another borrows its workers."""

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest

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
        """Let `engine=ray` borrow the session's workers."""
        monkeypatch.setattr("fedloom.engines.ray.engine.Cluster", lambda *_: request.getfixturevalue("workers"))
