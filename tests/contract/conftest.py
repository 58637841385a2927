"""One start of Ray for all tests of a session: its workers are lent to one engine after another."""

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest

if importlib.util.find_spec("ray"):
    from fedloom.engines.ray.engine import Cluster

    class Lent(Cluster):
        """Workers that outlive the engines that use them."""

        def close(self) -> None:
            """They are still needed."""

    @pytest.fixture(scope="session")
    def workers() -> Iterator[Any]:
        """Two workers."""
        cluster = Lent(None, 2, 2)
        yield cluster
        Cluster.close(cluster)

    @pytest.fixture(autouse=True)
    def lent(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        """`engine=ray` borrows the session's workers."""
        monkeypatch.setattr("fedloom.engines.ray.engine.Cluster", lambda *_: request.getfixturevalue("workers"))
