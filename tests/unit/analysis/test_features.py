"""Probes on synthetic features, and the features of real nets."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

from fedloom import FedAvg, FedRIR, Stream
from fedloom.analysis import features
from fedloom.analysis.features import Table
from fedloom.analysis.subject import Subject
from fedloom.errors import ConfigError, UsageError

RNG = np.random.default_rng(0)
N = 400
CLASSES, CLIENTS = RNG.integers(0, 4, N), RNG.integers(0, 5, N)


def measured(x, clients=CLIENTS):
    return features.measure_features(Table({"x": x}, CLASSES, clients, np.arange(N)), Stream(0))["x"]


def one_hot(numbers):
    return np.eye(numbers.max() + 1)[numbers] + 0.01 * RNG.normal(size=(N, numbers.max() + 1))


def test_a_probe_finds_what_is_there_and_nothing_else():
    found = measured(one_hot(CLASSES))
    assert found["class_probe"] == 1.0
    assert found["client_probe"] < 0.3  # 0.2 by chance, for five clients
    assert found["class_silhouette"] > 0.9
    assert abs(found["client_silhouette"]) < 0.1
    found = measured(one_hot(CLIENTS))
    assert found["client_probe"] == 1.0
    assert found["class_probe"] < 0.4


def test_noise_holds_nothing():
    found = measured(RNG.normal(size=(N, 10)))
    assert found["class_probe"] < 0.4
    assert found["class_chance"] == pytest.approx(np.bincount(CLASSES).max() / N)


def test_skewed_classes_tell_of_the_client():
    clients = CLASSES // 2  # each client holds two classes that no other holds
    found = measured(one_hot(CLASSES), clients)
    assert found["client_probe"] == found["client_from_class"] == 1.0
    assert found["client_chance"] < 0.6


def test_copies_of_a_row_are_never_split():
    rows = np.repeat(np.arange(40), 10)
    classes = np.random.default_rng(1).integers(0, 4, 40)[rows]
    noise = np.random.default_rng(2).normal(size=(40, 60))[
        rows
    ]  # the same for all copies, so a split would memorise the class
    found = features.measure_features(Table({"x": noise}, classes, np.tile(np.arange(10), 40), rows), Stream(0))["x"]
    assert found["class_probe"] < 0.5


def test_the_plane_of_a_line():
    line = np.outer(np.linspace(-1, 1, 50), [3.0, 4.0, 0.0])
    found = features.plane(line)
    assert found.explained == pytest.approx((1.0, 0.0))
    assert np.ptp(found.points[:, 0]) == pytest.approx(10.0)


@pytest.mark.parametrize("name", ["fedper", "ditto", "fedproto"])
def test_features_are_those_of_the_body_that_predicts(experiment, name):
    subject = Subject(experiment(name, precision="fp32"))
    owner, (x, _) = subject.owner(1), subject.data.test(1)
    net = {"fedper": "model", "ditto": "personal", "fedproto": "body"}[name]
    found = features.features_of(subject.method, owner, x)["body"]
    module = owner.nets.modules[net]
    body = module if net == "body" else module.body
    expected = nn.Sequential(body)(x)  # before training, the modules hold the client's weights
    assert torch.allclose(found, expected, atol=1e-6)


def test_fedrirs_two_kinds(experiment):
    subject = Subject(experiment("fedrir", precision="fp32"))
    x, _ = subject.data.test(0)
    found = features.features_of(subject.method, subject.owner(0), x)
    assert {name: tuple(f.shape) for name, f in found.items()} == {"f_g": (len(x), 12), "f_cs": (len(x), 12)}
    subject = Subject(experiment(FedRIR(mcsl="off"), precision="fp32"))
    assert list(features.features_of(subject.method, subject.owner(0), x)) == ["f_g"]


def test_equal_examples_through_one_model_reveal_nothing_about_the_client(experiment):
    run = experiment("fedavg", precision="fp32", rounds=1)
    run.run()
    table = features.same_rows(Subject(run))
    assert set(np.bincount(table.rows)[table.rows]) == {4}  # every example, once per client
    found = features.measure_features(table, Stream(0))["body"]
    assert found["client_probe"] <= found["client_chance"] == 0.25


class Bare(FedAvg):
    """FedAvg that predicts without a body."""

    def predictors(self):
        return {"personal": self.first_pixels}

    def first_pixels(self, nets, x, down, memory):
        return x.flatten(1)[:, :10]


def test_a_method_without_a_body_is_refused(experiment):
    subject = Subject(experiment(Bare(), precision="fp32"))
    with pytest.raises(ConfigError, match="Bare's predictor uses no module named 'body'"):
        features.features_of(subject.method, subject.owner(0), subject.data.test(0)[0])


def test_a_missing_scikit_learn_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(UsageError, match=r"needs scikit-learn: pip install 'fedloom\[analyse\]'"):
        measured(one_hot(CLASSES))


def test_a_known_client_factor_is_read_from_the_features_that_hold_it(experiment, monkeypatch):
    monkeypatch.setattr(features, "FACTOR_ROWS", 120)
    settings = {"data": {"name": "coloured-digits", "rows": None}, "partition": {"name": "natural", "merge": False}}
    run = experiment("fedavg", **settings, clients=None, rounds=1, **{"model.hidden": 16})
    run.run()
    subject = Subject(run)
    monkeypatch.setattr(features, "features_of", lambda _, __, x: {"colour": x[:, :, 0, 0], "ink": x.amin((1, 2))})
    found = features.measure_factor(subject)
    assert found["colour"]["factor_mlp"] > 0.6
    assert found["colour"]["class_linear"] < 0.3
    assert found["colour"]["factor_from_class"] < 0.3
    assert 0.1 <= found["colour"]["factor_chance"] < 0.25


def test_there_are_no_probes_without_a_known_factor(experiment):
    run = experiment("fedavg", rounds=1)
    run.run()
    assert features.measure_factor(Subject(run)) is None
