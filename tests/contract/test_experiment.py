"""The round loop for every method: participation, arithmetic and trackers."""

import pytest
import torch

from contract import assert_same, left_by
from fedloom import tree
from fedloom.experiment.loop import Experiment
from small import brief, interrupted_after

METHODS = ("fedavg", "fedmr", "fedrir")
SETTINGS = {"clients": 10, "rounds": 2, "data.rows": 300}


def test_the_cohort_is_a_fraction_of_the_clients(experiment):
    run = experiment("fedavg", participation=0.3, **SETTINGS)
    run.run()
    assert [row["cohort"] for row in run.rows] == [3, 3]
    assert {
        row["round"]: sum("steps" in r for r in run.client_rows if r["round"] == row["round"]) for row in run.rows
    } == {1: 3, 2: 3}


def test_a_varying_fraction_stays_in_its_range(experiment):
    runs = {name: experiment(name, participation="0.2-0.8", **SETTINGS) for name in METHODS}
    cohorts = {name: [run._cohort(number) for number in range(20)] for name, run in runs.items()}
    assert cohorts["fedavg"] == cohorts["fedmr"] == cohorts["fedrir"]
    sizes = {len(cohort) for cohort in cohorts["fedavg"]}
    assert len(sizes) > 3
    assert 2 <= min(sizes) <= max(sizes) <= 8
    assert all(len(leaf) == 8 for leaf in tree.leaves(runs["fedmr"].server["slots"]))


@pytest.mark.parametrize("method", ["fedavg", "fedrir", "fedvtc"])
def test_bf16_is_for_products_alone(experiment, method):
    def make(precision, engine="sequential"):
        return experiment(
            method,
            precision=precision,
            engine=engine,
            clients=3,
            rounds=1,
            **{"data.rows": 120, "engine.workers": 2, **brief(method)},
        )

    coarse, exact = left_by(make("bf16")), left_by(make("fp32"))
    trees = [coarse.server, *coarse.clients]
    assert {leaf.dtype for each in trees for leaf in tree.leaves(each)} <= {torch.float32, torch.float64, torch.int64}
    assert coarse.summary["bytes_by_kind"] == exact.summary["bytes_by_kind"]
    (name,) = {key for key in exact.rows[0] if key in ("train.loss", "classify.loss", "fit.loss")}
    assert coarse.rows[0][name] == pytest.approx(exact.rows[0][name], rel=0.03)
    assert coarse.rows[0][name] != exact.rows[0][name]
    assert_same(left_by(make("bf16", "processes")), coarse)


def test_a_pooled_method_has_one_model_trained_by_all(experiment):
    run = experiment("centralised", **{**SETTINGS, "eval": {"fitted": True}})
    run.run()
    for row in run.rows:
        assert row["personal_accuracy_trained"] == row["personal_accuracy"] == row["server_accuracy"]
        assert "personal_accuracy_fitted" not in row


@pytest.mark.parametrize("method", ["fedavg_ft", "fedbabu"])
def test_fine_tuning_before_prediction_augments_like_training(experiment, method, monkeypatch):
    run = experiment(method, **SETTINGS, **{"data.augment": "crop-flip"})
    run.run()
    seen = []
    augmented = run.data.augmented
    monkeypatch.setattr(type(run.data), "augmented", lambda _, *given: seen.append(1) or augmented(*given))
    run.personal_model(0)
    assert seen


class Recorder:
    """A tracker that records its calls."""

    def __init__(self):
        self.told, self.closed = [], 0

    def log(self, number, row):
        self.told.append((number, row))

    def close(self):
        self.closed += 1


def test_trackers_receive_every_evaluation_once(experiment, monkeypatch):
    made = []

    def make(names, folder, config):
        assert list(names) == ["wandb"]
        made.append(Recorder())
        return [made[-1]]

    monkeypatch.setattr("fedloom.experiment.loop.check_trackers", lambda _: None)
    monkeypatch.setattr("fedloom.experiment.loop.make_trackers", make)
    run = experiment("fedavg", **{**SETTINGS, "rounds": 5, "eval_every": 2, "checkpoint_every": 2, "log": "wandb"})
    again = Experiment.resume(interrupted_after(run, 3))
    again.run()
    first, second = made
    assert [number for number, _ in first.told] == [2]
    assert [number for number, _ in second.told] == [4, 5]
    assert [row for _, row in (*first.told, *second.told)] == again.rows
    assert (first.closed, second.closed) == (1, 1)
