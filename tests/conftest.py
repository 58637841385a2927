"""Fixtures for all tests."""

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from fedloom.config.settings import make_settings
from fedloom.experiment.loop import Experiment, GivenObjects
from small import SMALL, changed

hypothesis.settings.register_profile("fedloom", deadline=None, derandomize=True, database=None, max_examples=40)
hypothesis.settings.load_profile("fedloom")

ALONE: dict[str, Any] = {**SMALL, "precision": "fp64", "engine": {"name": "sequential", "threads": 1}}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--regenerate-golden`, which rewrites the files of tests/golden/ instead of comparing with them."""
    parser.addoption("--regenerate-golden", action="store_true", help="rewrite tests/golden/*.json")


def pytest_configure() -> None:
    """Restore the default action of Ctrl-C, which the background jobs of a script ignore. Tests of interruptions need it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run tests that share resources on one worker.

    These are the tests of Ray, which starts slowly, and tests that use the same reference run.
    """
    for item in items:
        if re.search(r"test_ray\.py|[-\[]ray[-\]]", item.nodeid):
            item.add_marker(pytest.mark.xdist_group("ray"))
        elif "reference" in getattr(item, "fixturenames", ()):
            given = item.callspec.params  # type: ignore[attr-defined]
            item.add_marker(pytest.mark.xdist_group(given.get("method") or given["variant"]))


@pytest.fixture
def float64() -> Any:
    """Make float64 the default dtype for one test."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def experiment(tmp_path: Path) -> Callable[..., Experiment]:
    """Return a function that creates small experiments.

    Examples are `experiment("fedavg", rounds=3, engine="debug")` and `experiment(Mine(), **{"model": "resnet8"})`. The first argument is a
    method or its name. Settings are those of `fedloom.run` and override those of `ALONE`. `dataset` and `module` are objects that replace
    names.
    """
    made = 0

    def make(method: Any = "fedavg", *, dataset: Any = None, module: Any = None, **settings: Any) -> Experiment:
        nonlocal made
        made += 1
        named = isinstance(method, str)
        chosen = {"method": method if named else type(method).__name__, "out": str(tmp_path / f"run{made}"), **settings}
        values = changed(ALONE, **{"engine.name" if key == "engine" else key: v for key, v in chosen.items()})
        return Experiment(
            make_settings(values), GivenObjects(method=None if named else method, dataset=dataset, model=module)
        )

    return make


@pytest.fixture(autouse=True)
def not_to_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave files in the system's cache: no test needs to survive a power failure, and a flush also waits for writes of other processes."""
    monkeypatch.setattr("os.sync", lambda: None)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real data sets, each in a folder of parquet files.

    It is `$FEDLOOM_DATA`, or `shared/data` next to the repository.
    """
    named = os.environ.get("FEDLOOM_DATA")
    folder = Path(named) if named else Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is not a folder; name one with FEDLOOM_DATA")
    return folder
