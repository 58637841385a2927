"""Schedules of the learning rate: known factors, and equal results on all engines and after a resume."""

import math

import pytest

import fedloom
from contract import Left, assert_close, assert_same, left_by
from fedloom import tree
from fedloom.config.parsing import from_words
from fedloom.config.settings import make_settings
from fedloom.errors import ConfigError
from fedloom.experiment.loop import Experiment
from fedloom.experiment.schedule import lr_scales
from fedloom.method import Turn
from fedloom.methods import FedAvg
from fedloom.training.turn import lr_scale, turn_of
from small import interrupted_after

COSINE = {"schedule.name": "cosine", "schedule.warmup": 1, "schedule.floor": 0.25}
SHORT = {"clients": 3, "rounds": 3, "data.rows": 120, "checkpoint_every": 1, "engine.workers": 2}


def scales(*words, rounds=6):
    settings = make_settings(from_words([*words, f"rounds={rounds}"]))
    return lr_scales(settings.schedule, settings.rounds)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ([], ()),
        (["schedule=constant", "schedule.warmup=3"], (1 / 4, 2 / 4, 3 / 4, 1, 1, 1)),
        (["schedule=step", "schedule.at=2,5", "schedule.factor=0.5"], (1, 1, 0.5, 0.5, 0.5, 0.25)),
        (["schedule=step", "schedule.every=2", "schedule.factor=0.5"], (1, 1, 0.5, 0.5, 0.25, 0.25)),
        (["schedule=step", "schedule.at=1", "schedule.warmup=1"], (0.5, 0.1, 0.1, 0.1, 0.1, 0.1)),
        (["schedule=cosine"], tuple((1 + math.cos(math.pi * t / 6)) / 2 for t in range(6))),
        (["schedule=cosine", "schedule.warmup=2", "schedule.floor=0.5"],
         (1 / 3, 2 / 3, *(0.5 + (1 + math.cos(math.pi * t / 4)) / 4 for t in range(4)))),
    ],
)  # fmt: skip
def test_the_factor_of_every_round(words, wanted):
    assert scales(*words) == pytest.approx(wanted)


def test_the_decay_of_the_method_applies_in_addition(experiment):
    task = experiment(**SHORT, **COSINE).problem.task
    assert [lr_scale(FedAvg(lr_decay=0.5), task, number) for number in range(3)] == pytest.approx(
        [0.5, 0.5, 0.25 * 0.625]
    )
    assert turn_of(FedAvg(), task, 3, 7) == Turn(3, 2, 7, closing=True, lr_scale=task.lr_scales[-1])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["schedule=linear"], "schedule=linear: must be one of constant, step, cosine"),
        (["schedule=cos"], "schedule=cos: there is no such value; write schedule=cosine"),
        (["schedule=step"], "schedule=step: needs either schedule.at, .* or schedule.every"),
        (["schedule=step", "schedule.at=2", "schedule.every=2"], "schedule=step: needs either"),
        (["schedule=step", "schedule.at=4,2"], "schedule.at=4,2: must be rounds in increasing order"),
        (["schedule=step", "schedule.at=0"], "schedule.at=0: must be at least 1"),
        (["schedule=step", "schedule.at=6"], "schedule.at=6: must be below rounds=6"),
        (["schedule.warmup=6"], "schedule.warmup=6: must be below rounds=6"),
        (["schedule=cosine", "schedule.every=3"], "schedule.every=3: applies only to schedule=step, not schedule=cosine"),
        (["schedule=step", "schedule.at=2", "schedule.floor=0.1"], "schedule.floor=0.1: applies only to schedule=cosine"),
        (["schedule=step", "schedule.at=2", "schedule.factor=0"], "schedule.factor=0: must be above 0"),
    ],
)  # fmt: skip
def test_schedules_that_are_refused(words, message):
    from fedloom.cli.words import read_values

    with pytest.raises(ConfigError, match=message):
        make_settings(read_values([*words, "rounds=6"]))


@pytest.mark.parametrize(
    ("method", "options"), [("scaffold", {}), ("ditto", {}), ("fedper", {"method.optimizer": "adam"})]
)
def test_a_round_in_the_warm_up_is_a_round_with_a_lower_learning_rate(experiment, method, options):
    """In the first of three rounds of warm-up, the learning rate is a quarter; the result has the same bits as with that learning rate."""
    start = experiment(method, **{**SHORT, **options, "rounds": 4, "method.lr": 0.08, "schedule.warmup": 3})
    interrupted_after(start, 1)
    lower = experiment(method, **{**SHORT, **options, "rounds": 1, "method.lr": 0.02})
    lower.run()
    assert tree.equal(start.server, lower.server)
    assert tree.equal(start.engine.client(0)._asdict(), lower.engine.client(0)._asdict())


references: dict[str, Left] = {}


@pytest.mark.parametrize(
    ("engine", "method"),
    [
        ("vectorised", "scaffold"),
        ("vectorised", "fedavg_ft"),
        ("debug+bytes+processes", "scaffold"),
        ("ray", "scaffold"),
    ],
)
def test_every_engine_follows_the_schedule(experiment, engine, method):
    if engine == "ray":
        pytest.importorskip("ray")
    if method not in references:
        references[method] = left_by(experiment(method, **SHORT, **COSINE, engine="sequential"))
    found = left_by(experiment(method, **SHORT, **COSINE, engine=engine))
    (assert_close if engine == "vectorised" else assert_same)(found, references[method])


def test_a_run_resumes_in_the_middle_of_a_schedule(experiment):
    whole = left_by(experiment("scaffold", **SHORT, **COSINE, engine="sequential"))
    assert whole.rows[-1] != left_by(experiment("scaffold", **SHORT, engine="sequential")).rows[-1]
    path = interrupted_after(experiment("scaffold", **SHORT, **COSINE, engine="sequential"), 2)
    assert_same(left_by(Experiment.resume(path)), whole)
    with pytest.raises(ConfigError, match=r"rounds=5: schedule=cosine depends on the number of rounds \(3\)"):
        Experiment.resume(path, rounds=5)


def test_newcomers_start_at_the_beginning_of_the_schedule(tmp_path):
    """The only local update of each new client is in the warm-up, so it equals the update with half of the learning rate."""
    about = {"model": "mlp", "clients": 4, "join": {"clients": 1, "turns": 1}, "progress": False, "rounds": 2}
    about |= {"data.rows": 160, "partition": {"alpha": 0.5}, "precision": "fp64"}
    halved = fedloom.run(fedloom.Local(lr=0.02), schedule={"warmup": 1}, out=tmp_path / "a", **about)
    full = fedloom.run(fedloom.Local(lr=0.01), out=tmp_path / "b", **about)
    joined = [run.summary["new_clients"]["joined"] for run in (halved, full)]
    assert joined[0] == joined[1]
