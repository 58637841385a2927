"""The round loop for every method: participation, arithmetic and trackers."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from contract import assert_same, left_by
from fedloom import FedAvg, Train, tree
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


def test_a_part_that_changes_stays_in_its_range(experiment):
    settings = {**SETTINGS, "rounds": 12, "eval_every": 12, "model.hidden": 4, "method.local_epochs": 1}
    runs = {name: experiment(name, participation="0.2-0.8", **settings) for name in ("fedavg", "fedmr")}
    for run in runs.values():
        run.run()
    cohorts = {
        name: [
            [row["client"] for row in run.client_rows if row["round"] == number and "steps" in row]
            for number in range(1, 13)
        ]
        for name, run in runs.items()
    }
    assert cohorts["fedavg"] == cohorts["fedmr"]
    assert len({tuple(cohort) for cohort in cohorts["fedavg"]}) == 12
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


@dataclass(frozen=True)
class Noting(FedAvg):
    """FedAvg with two phases that record their random draws: their own numbers, the order of examples, and the mirrored examples."""

    noted: ClassVar[list[tuple[float, list[list[float]]]]] = []

    def phases(self):
        return tuple(Train(name, self.loss, ("model",), self.local_optimizer(), draw=self.note) for name in "ab")

    def note(self, batch, task, rng):
        if len(batch.y) > 18:  # operations are counted with fewer
            Noting.noted.append((float(rng.uniform((1,))), batch.x.flatten(1).tolist()))
        return {}


def test_every_round_client_and_phase_has_draws_of_its_own(experiment, float64):
    Noting.noted.clear()
    settings = {"clients": 2, "rounds": 2, "batch_size": 1000, "partition": {"name": "iid"}, "data.augment": "flip"}
    run = experiment(Noting(), **settings)
    run.run()
    noted = Noting.noted[:8]  # the others are drawn at the end, when memory is counted
    turns = [noted[start : start + 2] for start in range(0, 8, 2)]
    orders, mirrored = set(), set()
    for turn, (x, _) in zip(turns, [run.data.train(i) for i in (0, 1)] * 2, strict=True):
        rows = [sorted(row) for row in x.flatten(1).tolist()]  # flips do not change these images
        for _, seen in turn:
            order = [rows.index(sorted(row)) for row in seen]
            assert sorted(order) == list(range(len(x)))
            orders.add(tuple(order))
            mirrored.add(tuple(x.flatten(1)[i].tolist() != row for i, row in zip(order, seen, strict=True)))
    assert len(orders) == len(mirrored) == len({own for own, _ in noted}) == 8


def test_the_server_draws_anew_in_every_round(experiment):
    drawn = []

    @dataclass(frozen=True)
    class Drawing(FedAvg):
        def aggregate(self, server, uplinks, round):
            drawn.append(float(round.rng.uniform((1,))))
            return super().aggregate(server, uplinks, round)

    experiment(Drawing(), **{**SETTINGS, "rounds": 3}).run()
    assert len(set(drawn)) == 3


def test_general_accuracy_is_every_clients_model_on_the_common_rows(experiment, float64):
    run = experiment("fedper", **{**SETTINGS, "clients": 4, "method.lr": 0.2, "eval.general_every": 1})
    run.run()
    x, y = run.data.common()
    each = [float((run.personal_model(i)(x).argmax(1) == y).double().mean()) for i in range(4)]
    assert run.rows[-1]["general_accuracy"] == pytest.approx(sum(each) / 4)
    assert run.rows[-1]["general_accuracy"] != pytest.approx(run.rows[-1]["personal_accuracy"], abs=0.02)


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
