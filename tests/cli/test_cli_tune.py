"""`fedloom tune`, and the config that it writes for `fedloom compare`."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

WORDS = ("method=fedavg,fedprox", "method.lr=0.05,0.4", "fedprox.mu=0.5", "rounds=1", "seed=0,1", "out=tuned")


def test_tune_shows_everything_and_its_config_is_compared(tiny, cli):
    done = tiny("tune", *WORDS)
    assert done.code == 0, done.err
    lines = [line.split() for line in done.out.splitlines()]
    shown = [line[0] for line in lines if line and line[0].startswith("lr=")]
    assert shown == ["lr=0.05", "lr=0.4"] * 2
    assert done.out.count("chosen") == 2
    assert done.out.endswith("config  tuned/tuned.toml  (fedloom compare tuned/tuned.toml)\n")
    assert re.search(
        r"^fedloom: warning: fedavg: lr=0\.\d+ is at the edge of what was tried; try", done.err, re.MULTILINE
    )
    assert "valid 0." in done.err
    assert "personal" not in done.err + done.out  # scores on test examples are not shown
    page = Path("tuned/tune.html").read_text()
    HTMLParser().feed(page)
    assert all(
        text in page for text in ("Chosen candidates", "Score by hyper-parameter", "at the edge", "lr=0.4", "seed 1")
    )
    assert "Runs</h2>" not in page
    again = cli("tune", "--resume", "tuned", "--json")
    assert (again.code, len(json.loads(again.out)["methods"])) == (0, 2)
    compared = cli("compare", "tuned/tuned.toml", "engine=sequential", "seed=0", "out=compared", "--json")
    assert compared.code == 0, compared.err
    assert [summary["method"] for summary in json.loads(compared.out)] == ["fedavg", "fedprox"]


def test_a_method_without_a_choice_ends_with_code_1(tiny):
    done = tiny("tune", "method=fedavg", "method.lr=1e30,1e31", "rounds=1", "out=tuned", "--quiet")
    assert (done.code, done.out) == (1, "tuned\n")
    assert "fedloom: error: fedavg: no candidate has a score; " in done.err
    assert not Path("tuned/tuned.toml").exists()
    assert Path("tuned/tune.html").exists()


def test_mistakes_end_with_one_line_and_code_2(tiny, cli):
    for words, message in (
        (["method=fedavg"], "tune: no hyper-parameter has several values"),
        (["method=fedavg", "method.lr=0.1,0.2", "tune.search=random"], "must be one of grid, halving, tpe"),
        (["--resume", "nowhere"], "nowhere is not the folder of a tuning"),
        (["--resume", "nowhere", "rounds=3"], "takes all settings from the folder; remove this argument"),
        (["--accept-changes", "method=fedavg"], "--accept-changes: applies only to fedloom tune --resume FOLDER"),
    ):
        done = cli("tune", *words)
        assert (done.code, done.out) == (2, "")
        assert done.err.count("\n") == 1
        assert message in done.err
    assert "write fedloom tune" in cli("sweep").err
    assert tiny("run", "method.lr=0.1,0.2").err.startswith("fedloom: error: method.lr=0.1,0.2: a run takes one value")


def test_an_early_stop_is_told(tiny):
    done = tiny("run", "rounds=9", "eval.valid=0.3", "stop.patience=1", "method.lr=0.6", "out=run")
    summary = json.loads(Path("run/summary.json").read_text())
    last = summary["stopped_early"]["round"]
    assert last == summary["rounds"] < 9
    assert (
        f"fedloom: run: stopped after round {last} of 9: valid_accuracy has not improved since round {last - 1}"
        in done.err
    )
    assert f"Stopped early, because the validation score had not improved: run (round {last} of 9)." in " ".join(
        done.out.split()
    )
