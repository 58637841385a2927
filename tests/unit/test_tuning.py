"""`fedloom.tools.tuning`: plans, draws, the searches, and the chosen candidates."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from fedloom.config.parsing import from_words, read_toml
from fedloom.config.settings import Named, make_method
from fedloom.errors import ConfigError, RunFolderError, UsageError
from fedloom.objectives import Metric
from fedloom.rng import Stream
from fedloom.tools.compare import plan as plan_comparison
from fedloom.tools.tuning.cells import Tried, best_of
from fedloom.tools.tuning.folder import create_tuning, reopen_tuning, run_tuning
from fedloom.tools.tuning.plan import plan_tuning
from fedloom.tools.tuning.space import Range, draws

ACCURACY = Metric("accuracy", "higher", True, "")
ERROR = Metric("rmse", "lower", False, "")
NO_OPTUNA = pytest.mark.skipif(not importlib.util.find_spec("optuna"), reason="Optuna is not installed")
TINY = (
    "rounds=2",
    "clients=3",
    "model=mlp",
    "model.hidden=8",
    "data.rows=120",
    "engine.name=sequential",
    "engine.threads=1",
)
TWO = ("method=fedavg,fedprox", "method.lr=0.05,0.4")


def tuning(*words: str):
    return plan_tuning(from_words([*TINY, *words]))


def scores(folder: Path):
    found = json.loads((folder / "tune.json").read_text())
    return {m["label"]: [(one["label"], one["scores"], one["rounds"]) for one in m["tried"]] for m in found["methods"]}


def test_a_range_has_points_with_three_digits_on_a_scale_that_fits():
    lr, mu, epochs = Range(0.001, 1, False), Range(0, 0.5, False), Range(1, 5, True)
    assert [lr.value(place) for place in (0, 0.5, 1)] == [0.001, 0.0316, 1]
    assert [mu.value(place) for place in (0, 0.5, 1)] == [0, 0.25, 0.5]
    assert [epochs.value(place) for place in (0, 0.5, 1)] == [1, 3, 5]
    assert type(epochs.value(0.3)) is int
    assert lr.place(0.0316) == pytest.approx(0.5, abs=1e-3)


def test_draws_are_different_and_follow_from_the_seed():
    space = {"lr": Range(0.001, 1, False), "mu": [0.1, 0.2]}
    first = draws(space, 6, Stream(0))
    assert draws(space, 6, Stream(0)) == first != draws(space, 6, Stream(1))
    assert len({tuple(values.items()) for values in first}) == 6
    grid = {"lr": [1, 2, 3], "mu": [4, 5]}
    assert len({tuple(values.items()) for values in draws(grid, 5, Stream(0))}) == 5
    with pytest.raises(ConfigError, match="too few different values"):
        draws({"local_epochs": Range(1, 3, True)}, 4, Stream(0))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("method=fedavg,fedprox",), "no hyper-parameter has several values"),
        (
            (*TWO, "fedprox.mu=0.1,1"),
            r"different numbers of candidates \(fedavg 2, fedprox 4\).* more values for fedavg",
        ),
        ((*TWO, "tune.candidates=3"), "tune.candidates=3: fedavg has only 2 candidates"),
        ((*TWO, "tune.candidates=1"), "tune.candidates=1: must be at least 2"),
        (
            ("method=fedavg", "method.lr=0.01..1"),
            "fedavg.lr: is a range, so the grid has no end; set tune.candidates=N",
        ),
        ((*TWO, "tune.search=tpe"), "tune.search=tpe: has no grid; set tune.candidates=N"),
        (("method=fedavg", "method.lr=1..0.1", "tune.candidates=2"), "fedavg.lr=1..0.1: must be LOW..HIGH"),
        (("method=fedavg", "method.local_epochs=1..2.5", "tune.candidates=2"), "both integers"),
        (("method=fedmr", "method.secure=0..1", "tune.candidates=2"), "secure is not a number"),
        ((*TWO, "tune.search=random"), "tune.search=random: must be one of grid, halving, tpe"),
        ((*TWO, "tune.setings=2"), "unknown key 'tune.setings'.*candidates"),
        ((*TWO, "tune=halving"), "tune=halving: is a table"),
        (("method=fedavg", "method.lr=0.1,x"), "method.lr=x: must be a number"),
        ((*TWO, "rounds=5,10"), "rounds=5,10: all rows share this setting"),
    ],
)
def test_invalid_input_is_refused(tmp_path, words, message):
    with pytest.raises(ConfigError, match=message):
        create_tuning(tuning(*words), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_validation_examples_nothing_is_written(tmp_path):
    with pytest.raises(ConfigError, match="no validation examples to choose on"):
        create_tuning(tuning(*TWO, "eval.valid=0"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_choice_is_the_best_mean_over_seeds():
    def tried(label, rounds, *values, failed=""):
        return Tried(label=label, values={}, rounds=rounds, scores=dict(enumerate(values)), failed=failed)

    found = [tried("a", 4, 0.5, 0.9), tried("b", 4, 0.8, 0.8), tried("c", 4, 0.8, 0.8), tried("d", 2, 0.99, 0.99)]
    assert best_of(found, ACCURACY).label == "b"  # d had fewer rounds; c has the same score, but comes later
    assert best_of(found, ERROR).label == "a"
    assert best_of([tried("a", 4, failed="diverged"), tried("d", 2, 0.1)], ACCURACY).label == "d"
    assert best_of([tried("a", 4, failed="diverged")], ACCURACY) is None


def test_a_value_at_the_edge_is_reported_unless_nothing_lies_beyond():
    (contender,) = tuning(
        "method=fedprox", "method.lr=0.1,0.2,0.4", "method.mu=0,1", "method.optimizer=sgd,adam"
    ).contenders
    assert dict(contender.edges({"lr": 0.4, "mu": 0, "optimizer": "adam"})) == {"lr": "largest"}
    assert dict(contender.edges({"lr": 0.2, "mu": 1, "optimizer": "sgd"})) == {"mu": "largest"}
    assert dict(contender.edges({"lr": 0.1, "mu": 0, "optimizer": "sgd"})) == {"lr": "smallest"}
    (contender,) = tuning("method=fedavg", "method.lr=0.01..1", "tune.candidates=2").contenders
    assert dict(contender.edges({"lr": 0.0101})) == {"lr": "smallest"}
    assert not dict(contender.edges({"lr": 0.1}))


def test_rungs_double_and_give_every_method_the_same_rounds():
    found = tuning(*TWO, "fedavg.momentum=0,0.5", "fedprox.mu=0.1,1", "tune.search=halving", "rounds=20")
    assert (found.size, found.rungs(), found.settings.eval_every) == (4, [5, 10, 20], 5)
    assert found.budget == 4 * 5 + 2 * 5 + 1 * 10
    assert tuning(*TWO, "rounds=20").rungs() == [20]
    assert tuning(*TWO, "tune.search=halving", "rounds=20", "eval_every=6").rungs() == [6, 20]
    assert tuning(*TWO, "tune.search=halving", "rounds=1").rungs() == [1]


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """A finished tuning over a whole grid, with one value that diverges."""
    words = ("method=fedavg,fedprox", "fedavg.lr=0.05,0.4,1e30", "fedprox.lr=0.4", "fedprox.mu=0.1,1,5", "seed=0,1")
    found = tuning(*words, "eval.general_every=1", "title=Mine")
    folder = create_tuning(found, tmp_path_factory.mktemp("tuning") / "grid")
    run_tuning(found, folder)
    return folder


def test_a_grid_is_tried_with_every_seed_and_a_candidate_that_diverges_is_no_end(grid):
    found = json.loads((grid / "tune.json").read_text())
    fedavg, fedprox = found["methods"]
    assert [one["values"] for one in fedavg["tried"]] == [{"lr": 0.05}, {"lr": 0.4}, {"lr": 1e30}]
    assert [set(one["scores"]) for one in fedavg["tried"][:2]] == [{"0", "1"}] * 2
    last = fedavg["tried"][2]
    assert (last["mean"], last["scores"]) == (None, {})
    assert "the model was never trained" in last["failed"]
    for method in found["methods"]:
        means = [one["mean"] for one in method["tried"] if one["mean"] is not None]
        assert method["tried"][method["best"]]["mean"] == max(means)
    rows = [json.loads(line) for line in (grid / "fedavg-lr0.4-seed1/metrics.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == [2]  # scored only in the rounds in which candidates are ranked
    assert fedavg["tried"][1]["scores"]["1"] == rows[-1]["valid_accuracy"]
    assert found["candidates"] == 3
    assert fedprox["keys"] == ["mu"]


def test_the_tuned_config_is_a_comparison_with_the_chosen_values(grid):
    text = (grid / "tuned.toml").read_text()
    found = plan_comparison(read_toml(grid / "tuned.toml"))
    chosen = {
        m["label"]: m["tried"][m["best"]]["values"] for m in json.loads((grid / "tune.json").read_text())["methods"]
    }
    assert {row.label: {key: row.method[key] for key in chosen[row.label]} for row in found.rows} == chosen
    assert (found.seeds, found.title) == ((0, 1), "Mine")
    (settings,) = {job.settings.model_copy(update={"out": None, "label": None, "method": None, "seed": 0}).model_dump_json()
                   for job in found.jobs(Path("x"))}  # fmt: skip
    assert json.loads(settings)["eval"] == {**json.loads(settings)["eval"], "valid": 0.0, "general_every": 1}
    assert json.loads(settings)["eval_every"] == 1
    assert "# Tuned by fedloom tune on valid_accuracy (20 % of each client's training examples)" in text
    assert text.count("<- chosen") == 2
    assert "lr=1e+30" in text


def test_an_interrupted_tuning_continues_with_the_same_numbers_and_repeats_nothing(tmp_path, grid):
    words = ("method=fedavg,fedprox", "fedavg.lr=0.05,0.4,1e30", "fedprox.lr=0.4", "fedprox.mu=0.1,1,5", "seed=0,1")
    found = tuning(*words, "eval.general_every=1", "title=Mine", "checkpoint_every=1")
    folder = create_tuning(found, tmp_path / "cut")
    started = []

    def interrupt(job, until):
        started.append(job.folder.name)

        def stop(done, rounds, row):
            if len(started) == 5 and done == 1:
                raise KeyboardInterrupt

        return stop

    with pytest.raises(KeyboardInterrupt):
        run_tuning(found, folder, interrupt)
    assert not (folder / "tune.json").exists()
    again = []
    run_tuning(reopen_tuning(folder), folder, lambda job, _: again.append(job.folder.name))
    assert again[0] == started[-1]
    assert not set(again[1:]) & set(started)
    assert scores(folder) == scores(grid)
    run_tuning(reopen_tuning(folder), folder, lambda *_: again.append("nothing is left"))
    assert "nothing is left" not in again


def test_halving_pauses_the_worse_half_and_continues_the_better_one(tmp_path, grid):
    words = ("method=fedavg", "fedavg.lr=0.05,0.4,0.01,1e30", "seed=0,1", "eval.general_every=1", "tune.search=halving")
    found = tuning(*words)
    folder = create_tuning(found, tmp_path / "halving")
    run_tuning(found, folder)
    (tried,) = scores(folder).values()
    assert found.rungs() == [1, 2]
    assert sorted(rounds for *_, rounds in tried) == [1, 1, 2, 2]
    assert tried[-1][1:] == ({}, 1)  # it diverged
    whole = {label: values for label, values, _ in scores(grid)["fedavg"]}
    both = [(whole[label], values) for label, values, rounds in tried if rounds == 2 and label in whole]
    assert both
    assert all(one == other for one, other in both)  # the same scores as without a pause
    run_tuning(found, folder, lambda job, _: pytest.fail(f"{job.label} is repeated"))


@NO_OPTUNA
def test_tpe_chooses_the_same_candidates_again(tmp_path):
    words = (
        "method=fedavg,fedprox",
        "method.lr=0.001..1",
        "fedprox.mu=[0.1, 1, 10]",
        "tune.search=tpe",
        "tune.candidates=3",
    )
    found, folders = tuning(*words, "rounds=1"), [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        create_tuning(found, folder)
    run_tuning(found, folders[0])
    stop = iter(range(5))

    def interrupt(job, until):
        if next(stop) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_tuning(found, folders[1], interrupt)
    run_tuning(reopen_tuning(folders[1]), folders[1])
    first, second = map(scores, folders)
    assert first == second
    assert [len({label for label, *_ in tried}) for tried in first.values()] == [3, 3]


def test_without_optuna_tpe_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    found = tuning("method=fedavg", "method.lr=0.01,0.1", "tune.search=tpe", "tune.candidates=2")
    with pytest.raises(UsageError, match=r"tune.search=tpe: needs Optuna: pip install 'fedloom\[tune\]'"):
        create_tuning(found, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_variants_and_early_stopping_are_kept_in_the_tuned_config(tmp_path):
    words = ("method=fedavg,strong", "variant.strong.method=fedprox", "variant.strong.mu=2", "method.lr=0.05,0.4")
    found = tuning(*words, "stop.patience=3", "variant.strong.uplink=int8", "fedprox.momentum=0.1")
    folder = create_tuning(found, tmp_path / "out")
    run_tuning(found, folder)
    tuned = plan_comparison(read_toml(folder / "tuned.toml"))
    fedavg, strong = tuned.rows
    assert (strong.label, strong.run, strong.method["name"]) == ("strong", {"uplink": "int8"}, "fedprox")
    assert (strong.method["mu"], strong.method["momentum"], fedavg.method["momentum"]) == (2.0, 0.1, 0.0)
    assert strong.method["lr"] in (0.05, 0.4)
    settings = tuned.jobs(Path("x"))[0].settings
    assert (settings.eval.valid, settings.stop.patience) == (0.2, 3)
    make_method(Named(**strong.method))


def test_another_folder_is_no_tuning(tmp_path):
    with pytest.raises(RunFolderError, match="is not the folder of a tuning"):
        reopen_tuning(tmp_path)
