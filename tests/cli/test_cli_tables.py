"""Tables in narrow terminals, and streams that cannot encode every character."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys

import pytest
from rich import box
from rich.console import Console
from rich.table import Table

from fedloom.cli.tables import show

ROWS = (
    ("fedavg", "94.0 ±3.1", "a sentence of several words", "88.2 ±9.2"),
    ("scaffold", "93.2 ±3.0", "an unbreakable-long-word-of-thirty", "1.5 ±0.1"),
)


def printed(width: int, no_wrap: str = "") -> list[str]:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, title="The title", caption="The caption.")
    for header in ("method", "accuracy", "meaning", "worst"):
        table.add_column(header, no_wrap=header == no_wrap)
    for row in ROWS:
        table.add_row(*row)
    out = io.StringIO()
    show(Console(file=out, width=width), table)
    return [line.rstrip() for line in out.getvalue().splitlines()]


@pytest.mark.parametrize("width", [44, 50, 60, 70, 80, 120])
def test_no_word_is_broken_and_no_line_is_too_long(width):
    lines = printed(width)
    text = " ".join(lines)
    assert max(map(len, lines)) <= width
    assert all(word in text.split() for row in ROWS for cell in row for word in cell.split())
    assert (lines[0], lines[-1]) == ("The title", "The caption.")


def test_a_table_that_does_not_fit_is_split_and_repeats_row_names():
    assert sum("scaffold" in line for line in printed(100)) == 1
    assert sum("scaffold" in line for line in printed(50)) == 2
    assert sum("The title" in line for line in printed(50)) == 1


def test_a_column_that_must_not_wrap_does_not():
    assert any("a sentence of several words" in line for line in printed(50, no_wrap="meaning"))


def test_a_word_wider_than_the_terminal_is_broken_rather_than_cut():
    lines = printed(30)
    assert max(map(len, lines)) <= 30
    assert "unbreakable-long-word-of-thirty" in "".join("".join(lines).split())


@pytest.mark.parametrize(
    "words", [("list", "methods"), ("list", "methods", "fedvtc"), ("list", "models"), ("list", "datasets")]
)
def test_listings_fit_sixty_columns(cli, monkeypatch, words):
    wide = cli(*words).out
    monkeypatch.setenv("COLUMNS", "60")
    narrow = cli(*words).out
    table = narrow[narrow.index("───") :] if len(words) == 3 else narrow
    assert max(map(len, table.splitlines())) <= 60
    assert set(wide.split()) - {word for word in wide.split() if "─" in word} <= set(narrow.split())


def test_results_fit_sixty_columns(tiny, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    done = tiny("compare", "method=local,fedavg", "seed=0,1,2", "rounds=1", "out=both")
    assert max(map(len, done.out.splitlines())) <= 60
    for word in ("personal", "worst", "10%", "server", "downlink", "±", "time"):
        assert word in done.out
    assert len(re.findall(r"^(?:local|fedavg) +\d+\.\d ±\d", done.out, re.MULTILINE)) >= 2, (
        "a number and its spread stay on one line"
    )


@pytest.mark.parametrize("words", ["list methods fedrir", "run --help", "list methods"])
@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_stream_that_cannot_show_a_character_gets_another(words, encoding):
    command = [sys.executable, "-m", "fedloom.cli", *words.split()]
    done = subprocess.run(command, env=os.environ | {"PYTHONIOENCODING": encoding}, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert len(done.stdout.decode(encoding)) > 500
