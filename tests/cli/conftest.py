"""The command line, called in this process from an empty folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from fedloom.cli import main
from fedloom.report import style

TINY = (
    "rounds=2",
    "clients=4",
    "model=mlp",
    "model.hidden=8",
    "data.rows=200",
    "engine=sequential",
    "engine.threads=1",
)


class Result(NamedTuple):
    """The exit code and the output of a command."""

    code: int
    out: str
    err: str


Cli = Callable[..., Result]


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the drawing of a page's figures, which takes most of the time of a short run. The tests of the report check figures."""
    monkeypatch.setattr(style, "plain_svg", lambda _: "<svg></svg>")


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Return a function: `cli("run", "rounds=1")` returns the exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("FEDLOOM_CACHE", str(tmp_path / "no-cache"))
    monkeypatch.delenv("FEDLOOM_DATA", raising=False)

    def call(*words: str) -> Result:
        capsys.readouterr()
        code = main(words)
        return Result(code, *capsys.readouterr())

    return call


@pytest.fixture
def tiny(cli: Cli) -> Cli:
    """Return `cli` with the settings of a very short run."""

    def call(command: str, *words: str) -> Result:
        return cli(command, *TINY, *words)

    return call
