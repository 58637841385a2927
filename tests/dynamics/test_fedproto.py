"""FedProto: prototypes are the mean features of classes, and predictions are nearest prototypes."""

import numpy as np
import pytest
import torch

from fedloom import Batch, ConfigError, FedProto, Nets, Round, Stream, from_arrays, tree
from fedloom.method import Arrival
from fedloom.models import arch
from fedloom.nets import read_weights


@pytest.fixture(autouse=True)
def _wide(float64):
    """Run all tests of this file in float64."""


def features(run, i):
    """Return the features of a client's training examples from its own body after its last local update, and their labels."""
    nets = Nets(run.problem.modules(run.problem.arch_of[i]), **run.engine.client(i).weights)
    x, y = run.data.train(i)
    return nets.body(x).numpy(), y.numpy()


def round_of(*clients):
    arrivals = tuple(Arrival(i, slot, 1 / len(clients)) for slot, i in enumerate(clients))
    return Round(0, 9, arrivals, Stream(0))


def test_the_prototypes_are_the_means_over_all_examples_of_a_class(experiment):
    run = experiment(FedProto(), rounds=2)
    run.run()
    z, y = (np.concatenate(part) for part in zip(*(features(run, i) for i in range(4)), strict=True))
    for label in range(10):
        assert run.server["counts"][label] == (y == label).sum()
        if (y == label).any():
            np.testing.assert_allclose(run.server["prototypes"][label], z[y == label].mean(0), rtol=1e-9, atol=1e-12)


def test_a_uniform_mean_counts_clients_not_examples():
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 6.0], [5.0, 5.0]])
    uplinks = [
        {"prototypes": a, "counts": torch.tensor([1.0, 0.0, 0.0])},
        {"prototypes": b, "counts": torch.tensor([3.0, 2.0, 0.0])},
    ]
    old = {"prototypes": torch.full((3, 2), 9.0), "counts": torch.tensor([0.0, 0.0, 7.0])}
    weighted = FedProto().aggregate(old, uplinks, round_of(0, 1))
    uniform = FedProto(prototype_mean="uniform").aggregate(old, uplinks, round_of(0, 1))
    assert weighted["prototypes"].tolist() == [[2.5, 5.0], [5.0, 5.0], [9.0, 9.0]]
    assert uniform["prototypes"].tolist() == [[2.0, 4.0], [5.0, 5.0], [9.0, 9.0]]
    assert (
        weighted["counts"].tolist() == uniform["counts"].tolist() == [4.0, 2.0, 7.0]
    )  # no client holds the last class: its prototype is kept


def test_the_pull_is_the_squared_distance_of_examples_with_a_prototype():
    method, choice = FedProto(prototype_weight=2.0), arch("mlp", (1, 8, 8), 4)
    modules = {"body": choice.body(), "head": choice.head()}
    nets = Nets(modules, **read_weights(modules))
    batch = Batch(torch.randn(6, 1, 8, 8), torch.tensor([0, 1, 2, 3, 0, 1]))
    down = {"prototypes": torch.randn(4, choice.features), "counts": torch.tensor([3.0, 0.0, 1.0, 0.0])}
    loss, logs = method.loss(nets, batch, down, {})
    z = nets.body(batch.x)
    each = [((z[i] - down["prototypes"][batch.y[i]]) ** 2).mean().item() for i in (0, 2, 4)]
    assert logs["distance"].item() == pytest.approx(sum(each) / 6)
    assert loss.item() == pytest.approx((logs["cross_entropy"] + 2 * logs["distance"]).item())
    unknown = method.loss(nets, batch, down | {"counts": torch.zeros(4)}, {})
    assert unknown[0] == unknown[1]["cross_entropy"]


def test_only_classes_that_exist_are_predicted():
    method, choice = FedProto(), arch("mlp", (1, 8, 8), 4)
    modules = {"body": choice.body(), "head": choice.head()}
    nets, x = Nets(modules, **read_weights(modules)), torch.randn(50, 1, 8, 8)
    z = nets.body(x)
    prototypes = z[:4].detach()
    down = {"prototypes": prototypes, "counts": torch.tensor([1.0, 0.0, 5.0, 1.0])}
    logits = method.predict(nets, x, down, {})
    assert torch.isfinite(logits).all()  # a logit that is not finite would count as wrong
    expected = (z[:, None] - prototypes[[0, 2, 3]]).square().sum(2).argmin(1)
    assert torch.equal(logits.argmax(1), torch.tensor([0, 2, 3])[expected])


def test_architectures_may_differ(experiment):
    run = experiment(
        FedProto(), engine="debug+bytes+sequential", models=["mlp", "fedavg_cnn", "resnet8"], width=12, rounds=3
    )
    summary = run.run()
    assert set(summary["bytes_by_kind"]["uplink"]) == {"prototypes", "counts", "header"}
    held = [int((run.data.train(i)[1].bincount() > 0).sum()) for i in range(4)]
    assert summary["bytes_by_kind"]["uplink"]["prototypes"] == 3 * sum(held) * 12 * 8
    assert run.rows[-1]["train.cross_entropy"] < run.rows[0]["train.cross_entropy"]
    assert run.rows[-1]["personal_accuracy"] > 0.3


def test_different_widths_are_refused(experiment):
    with pytest.raises(ConfigError, match=r"has \d+ features, but another architecture has \d+; set one width"):
        experiment(FedProto(), models=["mlp", "resnet8"])


def test_clients_that_never_trained_are_scored_too(experiment):
    run = experiment(FedProto(), cohort=1, rounds=1)
    run.run()
    assert len([row for row in run.client_rows if "personal_accuracy" in row]) == 4
    assert run.rows[-1]["personal_accuracy"] < run.rows[-1]["personal_accuracy_trained"]


def test_a_client_with_a_single_class_and_one_row_of_it(experiment):
    y = np.repeat([0, 1, 2], 8)
    dataset = from_arrays(np.random.default_rng(0).standard_normal((24, 5)), y, columns={"owner": y.astype(str)})
    partition = {"name": "natural", "column": "owner", "min_examples": 2}
    run = experiment(FedProto(), dataset=dataset, clients=3, partition=partition, engine="debug+sequential")
    run.run()
    assert (run.server["counts"] > 0).all()


def test_the_log_is_the_mean_cosine_class_by_class():
    uplinks = [
        {"prototypes": torch.tensor([[1.0, 0.0], [1.0, 0.0]]), "counts": torch.tensor([1.0, 4.0, 0.0])},
        {"prototypes": torch.tensor([[0.0, 2.0], [3.0, 0.0], [7.0, 1.0]]), "counts": torch.tensor([1.0, 2.0, 1.0])},
    ]
    logs = FedProto().server_logs({}, uplinks, round_of(0, 1))
    assert logs == pytest.approx({"prototype_cosine": 0.5})  # orthogonal, equal, and held by one client only
    assert FedProto().server_logs({}, uplinks[:1], round_of(0)) == {}


def test_three_rules_of_prediction(experiment):
    """The rules are the nearest prototype of all classes, that of the client's own classes, and the head."""
    run = experiment("fedproto", clients=3, rounds=2, **{"partition.alpha": 0.1, "data.rows": 120})
    run.run()
    x, own = run.data.test(0)[0].double(), run.data.train(0)[1].bincount(minlength=10) > 0
    assert not own.all()
    outputs = {}
    for rule in ("prototypes", "own_prototypes", "head"):
        other = experiment(
            "fedproto", clients=3, rounds=2, **{"partition.alpha": 0.1, "data.rows": 120, "method.predict_by": rule}
        )
        other.run()
        assert tree.equal(other.server, run.server)
        outputs[rule] = other.personal_model(0)(x)
    assert own[outputs["own_prototypes"].argmax(1)].all()
    torch.testing.assert_close(outputs["own_prototypes"][:, own], outputs["prototypes"][:, own])
    client = run.engine.client(0)
    nets = Nets(run.problem.modules(0), **client.weights)
    torch.testing.assert_close(outputs["head"], nets.head(nets.body(x)))
