"""Progress in plain lines, with a clock that the test sets."""

from __future__ import annotations

import io
import threading

import pytest
from rich.console import Console

from fedloom.config.settings import make_settings
from fedloom.experiment import progress
from fedloom.experiment.loop import Experiment
from fedloom.experiment.progress import LOOK_S, MOST_S, Overall, PlainLines, facts, live


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def lines():
    return []


def test_rounds_tell_the_time_left_and_never_more_than_a_line_every_ten_seconds(clock, lines):
    show = PlainLines("fedavg", lines.append, clock=clock)
    for done in range(1, 11):
        clock.now += 4
        show(done, 10, {"personal_accuracy": 0.5, "lost": 2})
    assert lines == [
        "fedavg: round 3/10  about 28 s left  personal 0.500  lost 2",
        "fedavg: round 6/10  about 16 s left  personal 0.500  lost 2",
        "fedavg: round 9/10  about 4 s left  personal 0.500  lost 2",
        "fedavg: round 10/10  personal 0.500  lost 2",
    ]


def test_a_line_comes_at_least_every_thirty_seconds_also_where_no_round_ends(clock, lines):
    times = []
    show = PlainLines("fedavg", lambda line: (lines.append(line), times.append(clock.now)), clock=clock)
    for second in range(1, 400):
        clock.now += 1
        if second == 200:
            show(1, 3, {})
        if second % LOOK_S == 0:
            show.tick()
    gaps = [after - before for before, after in zip([100.0, *times], times, strict=False)]
    assert max(gaps) <= MOST_S
    assert lines[0] == "fedavg: no round has finished yet  25 s so far"
    assert lines[-1] == "fedavg: round 1/3  about 4 min left"


def test_a_resumed_run_takes_the_pace_of_this_time(clock, lines):
    show = PlainLines("fedavg", lines.append, done=90, clock=clock)
    clock.now += 20
    show(92, 100, {})
    assert lines == ["fedavg: round 92/100  about 80 s left"]


def test_of_several_runs_the_round_is_the_runs_and_the_time_is_that_of_all(clock, lines):
    show = PlainLines("compare", lines.append, clock=clock)
    clock.now += 30
    show(2, 2, {}, "[1/2] local, seed 0", Overall(2, 4))
    assert lines == ["[1/2] local, seed 0: round 2/2  about 30 s left"]


def test_a_round_that_takes_longer_than_those_before_slows_the_pace(clock, lines):
    show = PlainLines("fedavg", lines.append, clock=clock)
    clock.now += 10
    show(1, 4, {})
    clock.now += 30
    show.tick()  # the second round has taken thirty seconds so far: twenty per round
    assert lines == ["fedavg: round 1/4  about 30 s left", "fedavg: round 1/4  about 30 s left"]


@pytest.mark.parametrize(("seconds", "words"), [(99, "99 s"), (100, "2 min"), (5000, "83 min"), (9000, "2.5 h")])
def test_durations(seconds, words):
    assert progress._duration(seconds) == words


def test_off_a_terminal_a_thread_checks_whether_a_line_is_due(monkeypatch):
    came = threading.Event()
    monkeypatch.setattr(progress, "LOOK_S", 0.001)
    monkeypatch.setattr(progress.PlainLines, "tick", lambda _: came.set())
    with live("fedavg", Console(file=io.StringIO())):
        assert came.wait(60)
    assert not any(thread.name == "fedloom-progress" for thread in threading.enumerate())


def test_on_a_terminal_there_is_a_bar_with_the_rounds_of_the_run():
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=100)
    with live("compare", console) as show:
        show(2, 8, {"personal_accuracy": 0.25}, "[2/4] local, seed 0", Overall(10, 32))
    assert "round 2/8" in shown.getvalue()
    assert "[2/4] local, seed 0" in shown.getvalue()
    assert "personal 0.250" in shown.getvalue()


@pytest.mark.parametrize(
    ("settings", "clients", "steps"),
    [
        ({}, "4, all in a round", "about 16 in a round"),
        ({"cohort": 2}, "4, 2 in a round", "about 8 in a round"),
        ({"participation": "0.2-0.5"}, "4, at most 2 in a round", "about 8 in a round"),
        ({"method": {"name": "ditto", "personal_epochs": 2}}, "4, all in a round", "about 48 in a round"),
    ],
)
def test_facts_are_what_the_run_then_does(tmp_path, settings, clients, steps):
    base = {
        "clients": 4, "rounds": 1, "model": {"name": "mlp", "hidden": 8}, "data": {"name": "digits", "rows": 200},
        "partition": {"name": "iid"}, "batch_size": 10, "engine": {"name": "sequential"}, "out": tmp_path / "run",
    }  # fmt: skip
    experiment = Experiment(make_settings(base | settings))
    about = facts(experiment)
    assert about == {
        "data": "digits, 148 training examples", "clients": clients, "steps": steps, "rounds": "1",
        "engine": "sequential", "folder": str(tmp_path / "run"),
    }  # fmt: skip
    experiment.run()
    taken = sum(row.get("steps", 0) for row in experiment.client_rows)
    if "participation" not in settings:  # which gives an upper limit only
        assert about["steps"] == f"about {taken} in a round"
