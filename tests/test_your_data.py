"""The commands and the Python code of docs/your-data.md, and examples/your_data.py, as a new user runs them."""

import csv
import io
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from fedloom.cli import main

HOME = Path(__file__).parent.parent
PAGE = (HOME / "docs" / "your-data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(python|bash)\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [line for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()]
CHANCE = {"risk": 0.5, "shapes": 1 / 3, "windows": 1 / 3, "reviews": 0.5}


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDLOOM_CACHE", str(tmp_path / "cache"))
    return tmp_path


def execute(command, capsys, monkeypatch):
    """Run one command of the page. Return its output."""
    program, *words = shlex.split(command)
    capsys.readouterr()
    if program == "python":
        monkeypatch.setattr(sys, "argv", words)
        runpy.run_path(str(HOME / words[0]), run_name="__main__")
    else:
        assert program == "fedloom"
        assert main(words) == 0
    return capsys.readouterr().out


def test_the_first_section_with_one_round(place, capsys, monkeypatch):
    for command in COMMANDS[:3]:
        printed = execute(command.replace("rounds=5", "rounds=1"), capsys, monkeypatch)
    rows = list(csv.DictReader(io.StringIO(printed)))
    assert [row["row"] for row in rows] == ["1", "2", "3"]
    assert {row["prediction"] for row in rows} <= {"high", "low"}


def test_every_key_on_the_page_is_accepted_and_every_section_has_a_prediction():
    assert sum(" predict " in command for command in COMMANDS) == PAGE.count("fedloom predict ") == 6
    assert all("centralised" in command for command in COMMANDS if " compare " in command)


@pytest.mark.slow
def test_the_whole_page(place, capsys, monkeypatch):
    for command in COMMANDS:
        printed = execute(command, capsys, monkeypatch)
        if " predict " in command:
            assert len(printed.splitlines()) >= 2
    for kind, block in BLOCKS:
        if kind == "python":
            exec(block, {})
    for name, chance in CHANCE.items():
        for folder in (place / "runs" / name).glob("*-seed0"):
            summary = json.loads((folder / "summary.json").read_text())
            assert summary["personal_accuracy"]["final"] > chance + 0.1, folder
            assert f"{100 * summary['personal_accuracy']['final']:.1f} %" in PAGE, folder
    for folder in (place / "runs" / "days").glob("*-seed0"):
        rmse = json.loads((folder / "summary.json").read_text())["personal_rmse"]["final"]
        assert rmse < 2.0
        assert f"{rmse:.2f}" in PAGE


@pytest.mark.slow
def test_the_script(place, capsys, monkeypatch):
    execute("python examples/make_files.py my-data", capsys, monkeypatch)
    printed = execute("python examples/your_data.py out", capsys, monkeypatch)
    assert "['square']" in printed
    assert "['walk' 'walk']" in printed
    assert "['good' 'bad']" in printed
