"""Control arms: as many steps as the method, on real examples, and marked in tables."""

import pytest
import torch

from fedloom import FedAvgFT, FedBABU, FedRIR, FedVTC, Stream
from fedloom.method import trains_of
from fedloom.report import read
from fedloom.report.groups import group
from fedloom.training.batches import Plan
from small import brief, spied

CONTROLS = ("same-steps", "same-steps-balanced")
SETTINGS = {"data": {"name": "digits", "rows": 200}, "clients": 3, "model": {"name": "mlp", "hidden": 12}, "width": 12}


def steps(run):
    """Return the number of optimiser steps of each client in each round."""
    rounds = spied(run)
    run.run()
    return [[sum(reply.steps.values()) for reply in one.replies] for one in rounds]


@pytest.mark.parametrize("method", ["fedvtc", "fedrir"])
def test_a_control_arm_takes_the_steps_of_its_method(experiment, method):
    settings = {**SETTINGS, **brief(method)}
    wanted = steps(experiment(method, **settings))
    for control in CONTROLS:
        assert steps(experiment(method, **settings, **{"method.control": control})) == wanted


@pytest.mark.parametrize(
    ("method", "phases"),
    [
        (FedVTC(finetune="end", control="same-steps"), ["fit", "more", "finetune"]),
        (FedRIR(control="same-steps"), ["classify"]),
        (FedAvgFT(control="same-steps-balanced"), ["train", "tune"]),
        (FedBABU(control="same-steps-balanced"), ["train", "tune"]),
    ],
)
def test_only_real_examples_train(method, phases):
    trains = trains_of((*method.phases(), *method.adapt()))
    assert [train.name for train in trains] == phases
    assert all(train.draw is None for train in trains)
    assert [train.balanced for train in trains if train.name in ("more", "finetune", "classify", "tune")] == [
        "balanced" in method.control
    ] * (len(phases) - (phases[0] in ("fit", "train")))


def test_the_control_of_fedrir_trains_every_net_that_predicts(experiment):
    run = experiment("fedrir", **SETTINGS, rounds=1, **{"method.control": "same-steps"})
    before, rounds = run.problem.initial(0, run.engine.initial(0)).weights["params"], spied(run)
    run.run()
    after = run.engine.client(0).weights["params"] | rounds[0].replies[0].uplink["weights"]["params"]
    moved = {name.partition(".")[0] for name in after if not torch.equal(after[name], before[name])}
    assert moved == {"gfe", "csfe", "head"} == {name.partition(".")[0] for name in before}


@pytest.mark.parametrize("method", ["fedvtc", "fedavg_ft"])
def test_balanced_batches_are_the_same_on_every_engine(experiment, method):
    settings = {**SETTINGS, **brief(method), "method.control": "same-steps-balanced"}
    one, *others = (
        experiment(method, **settings, engine=engine) for engine in ("sequential", "vectorised", "processes")
    )
    one.run()
    for other in others:
        other.run()
        for key in ("personal_accuracy", "general_accuracy", "uplink_bytes"):
            assert other.rows[-1][key] == one.rows[-1][key]


def test_balanced_batches_have_every_class_equally_often():
    classes = torch.tensor([0] * 90 + [3] * 9 + [7])
    plan = Plan(20)
    batches = list(plan.batches(100, 40, None, Stream(0), classes=classes))
    assert list(map(len, batches)) == list(map(len, plan.batches(100, 40, None, Stream(0))))
    share = classes[torch.cat(batches)].bincount(minlength=8) / 4000
    torch.testing.assert_close(share, torch.tensor([1, 0, 0, 1, 0, 0, 0, 1]) / 3, atol=0.03, rtol=0)
    drawn = torch.cat(batches)
    assert drawn[classes[drawn] == 0].unique().numel() == 90
    assert len(list(plan.batches(100, 1, 7, Stream(0), classes=classes))) == 7


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FedVTC(control="same-steps", share_generator=True), "has no generator"),
        (lambda: FedRIR(control="same-steps", mcsl="off"), "no more steps than plain training"),
    ],
)
def test_a_control_without_effect_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_tables_mark_a_control_arm(experiment):
    run = experiment("fedavg_ft", rounds=1, label="mine", **{"method.control": "same-steps-balanced"})
    run.run()
    assert group(read([run.folder.path]))[0].label == "mine (control: same-steps-balanced)"
