"""The classifier on shared features: its closed form, sums of clients in any order, limits, and its use in runs."""

import numpy as np
import pytest
import torch

from fedloom import FedPer
from fedloom.engines.shared_head import PENALTY, feature_sums, fitted_head, head_outputs, summed
from fedloom.errors import ConfigError
from fedloom.experiment.metrics import by_held
from fedloom.methods.local import Local
from fedloom.objectives import Classification, Score
from small import interrupted_after

ENGINES = ("vectorised", "processes", "debug+bytes+sequential")


def test_two_points_have_the_closed_form_solution():
    # standardised features are -1 and 1, centred targets are -1/2 and 1/2: the weight is (1/2) / (1 + PENALTY)
    head = fitted_head(feature_sums(torch.tensor([[2.0], [6.0]]), torch.tensor([0, 1]), 2, 1))
    assert head_outputs(torch.tensor([[6.0]]), head)[0].tolist() == pytest.approx(
        [0.5 - 0.5 / (1 + PENALTY), 0.5 + 0.5 / (1 + PENALTY)]
    )


def test_sums_of_clients_give_the_ridge_regression_on_all_examples():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(90, 4)) @ rng.normal(size=(4, 4)) + 3, rng.integers(0, 3, 90)
    parts = [feature_sums(torch.tensor(x[k::3]), torch.tensor(y[k::3]), 3, 3) for k in range(3)]
    head = fitted_head(summed(parts))
    z = (x - x.mean(0)) / x.std(0)
    targets = np.eye(3)[y]
    weight = np.linalg.solve(z.T @ z / 90 + PENALTY * np.eye(4), z.T @ (targets - targets.mean(0)) / 90)
    np.testing.assert_allclose(head_outputs(torch.tensor(x), head), z @ weight + targets.mean(0), atol=1e-6)


def test_the_order_of_clients_does_not_matter():
    parts = [feature_sums(torch.randn(5, 3) * 10.0**k, torch.arange(5) % 2, 2, 4) for k in range(4)]
    one, other = fitted_head(summed(parts)), fitted_head(summed([summed(parts[:0:-1]), parts[0]]))
    assert torch.equal(one["weight"], other["weight"])


def test_a_constant_feature_gets_no_weight():
    features = torch.cat([torch.randn(20, 2), torch.full((20, 1), 7.3)], 1)
    head = fitted_head(feature_sums(features, torch.arange(20) % 2, 2, 1))
    assert head["weight"][2].tolist() == [0, 0]
    assert head["weight"].isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e12])
def test_unusable_features_give_no_classifier(value):
    good = feature_sums(torch.randn(4, 2), torch.arange(4) % 2, 2, 2)
    bad = feature_sums(torch.tensor([[value, 0.0]]), torch.tensor([0]), 2, 2)
    assert fitted_head(summed([good, bad])) is None
    assert fitted_head(good) is not None


def test_general_accuracy_is_split_by_the_classes_held():
    task = Classification.numbered(3)
    scores = [
        Score({"right": np.array([4, 0, 1]), "rows": np.array([4, 4, 2])}),
        Score({"right": np.array([2, 4, 2]), "rows": np.array([4, 4, 2])}),
    ]
    held = np.array([[True, False, False], [True, True, True]])
    row = by_held(task, scores, held, "general")
    assert row == {"general_accuracy_held": (4 / 4 + 8 / 10) / 2, "general_accuracy_not_held": 1 / 6}


def numbers(run):
    row, joined = run.rows[-1], run.folder.summary()["new_clients"]
    return [row["shared_head_accuracy"], row["shared_head_recall"], row["shared_head_bytes"], joined["shared_head"]]


@pytest.fixture(scope="module")
def plain():
    """Return the numbers of the reference run, once it has been run."""
    return {}


SETTINGS = {"eval.shared_head": True, "join.clients": 1, "clients": 5}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", ["fedrir", "fedbabu"])
def test_every_engine_gives_the_same_classifier(experiment, plain, method, engine):
    if method not in plain:
        reference = experiment(method, **SETTINGS)
        reference.run()
        plain[method] = numbers(reference)
    run = experiment(method, **SETTINGS, engine=engine)
    run.run()
    assert numbers(run) == plain[method]


def test_a_resumed_run_has_the_same_numbers(experiment, plain):
    reference = experiment("fedper", **SETTINGS, rounds=3, checkpoint_every=1)
    reference.run()
    again = experiment("fedper", **SETTINGS, rounds=3, checkpoint_every=1)
    path = interrupted_after(again, 2)
    resumed = type(again).resume(path)
    resumed.run()
    assert numbers(resumed) == numbers(reference)


def test_the_classifier_is_also_a_model(experiment):
    run = experiment("fedavg_ft", **{"eval.shared_head": True, "eval.clients": 2})
    run.run()
    x, y = run.data.common()
    right = (run.shared_model(0)(x).argmax(1) == y).double().mean()
    assert run.rows[-1]["shared_head_accuracy"] == pytest.approx(float(right))
    assert experiment("fedper", rounds=1).run()["general_accuracy"]["held"] >= 0


def test_bytes_are_those_of_one_upload_per_client(experiment):
    summary = experiment("fedper", **{"eval.shared_head": True}, rounds=1).run()
    d, y = 12, 10
    per_client = summary["shared_head_bytes"] / 4
    assert per_client - 8 * (d * (d + 1) // 2 + d * y + y + 1) < 700  # the header
    assert summary["shared_head_bytes"] % 4 == 0


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("local", {}, "eval.shared_head=true: clients of Local share no body"),
        ("fedproto", {}, "clients of FedProto share no body"),
        (
            "fedavg",
            {"data": {"name": "diabetes"}, "partition": {"name": "iid"}},
            "needs classes, but data=diabetes is regression",
        ),
    ],
)
def test_others_are_refused_in_one_line(experiment, method, settings, message):
    with pytest.raises(ConfigError, match=message):
        experiment(method, **{"eval.shared_head": True}, **settings)


def test_methods_say_which_features_are_shared():
    assert Local().shared_features() is None
    assert FedPer().shared_features() is not None
