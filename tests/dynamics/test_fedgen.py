"""FedGen: when it equals FedAvg, and what its generator learns from the heads."""

import math

import pytest
import torch

from fedloom import FedGen, Nets, Round, Stream, tree
from fedloom.method import Arrival
from fedloom.methods.fedgen import FeatureGenerator
from fedloom.nets import read_weights
from fedloom.training.turn import fresh_modules

Y, D = 3, 4


class Model(torch.nn.Module):
    """A model with features as inputs."""

    def __init__(self):
        super().__init__()
        self.body, self.head = torch.nn.Identity(), torch.nn.Linear(D, Y)


def test_the_first_round_and_zero_weights_are_fedavg(experiment):
    small = {"clients": 3, "data.rows": 100, "rounds": 2}
    quick = {"method.server_steps": 3, "method.n_synthetic": 6}
    plain, full = experiment("fedavg", **small), experiment("fedgen", **small, **quick)
    off = experiment("fedgen", **small, **quick, **{"method.alpha": 0.0, "method.beta": 0.0})
    for run in (plain, full, off):
        run.run()
    assert full.rows[0]["personal_accuracy"] == plain.rows[0]["personal_accuracy"]
    model = {n: p for n, p in off.server["weights"]["params"].items() if n.startswith("model.")}
    tree.map_tree(lambda a, b: torch.testing.assert_close(a, b) or a, model, plain.server["weights"]["params"])
    assert not torch.equal(full.server["weights"]["params"]["model.head.weight"], model["model.head.weight"])
    assert float(full.hooks.downlink(full.server, 2, [0]).common["strength"]) == pytest.approx(0.98**2)


def test_the_generators_features_are_recognised_by_the_heads_that_hold_the_class_only():
    """The heads of two clients disagree. The client that holds class 0 determines its features; no client holds class 2."""
    method = FedGen(server_steps=150, generator_lr=0.02, noise_size=3, hidden_size=16, n_synthetic=24)
    modules = fresh_modules(lambda: {"model": Model(), "generator": FeatureGenerator(3, Y, 16, D)}, Stream(0))
    weights = read_weights(modules)
    knows = torch.eye(Y, D) * 3
    heads = [knows, knows[[1, 0, 2]]]  # the second client's head swaps classes 0 and 1
    counts = [torch.tensor([5.0, 5, 0]), torch.tensor([0.0, 0, 0])]
    ups = [
        {"weights": {"params": {"model.head.weight": h, "model.head.bias": torch.zeros(Y)}, "buffers": {}}, "counts": c}
        for h, c in zip(heads, counts, strict=True)
    ]
    arrivals = tuple(Arrival(i, i, 0.5) for i in range(2))
    round = Round(0, 2, arrivals, Stream(1), nets=lambda weights: Nets(modules, **weights))
    after = method.aggregate({"weights": weights, "learned": torch.zeros(Y)}, ups, round)
    assert after["learned"].tolist() == [1, 1, 0]
    nets = Nets(modules, **after["weights"])
    y = torch.tensor([0, 1]).repeat(20)
    with torch.no_grad():
        z = nets.generator(Stream(5).normal((40, 3)), torch.eye(Y)[y])
    assert ((z @ knows.T).argmax(1) == y).float().mean() > 0.95
    assert ((z @ heads[1].T).argmax(1) == y).float().mean() < 0.1


def test_the_diversity_term_is_1_for_equal_features_and_alive_for_normal_noise():
    """The term uses the mean squared distance of the noise times the mean absolute distance of the features, over all pairs."""
    method, noise = FedGen(), torch.tensor([[0.0, 2.0], [2.0, 0.0]])
    assert float(method.sameness(noise, torch.zeros(2, 5))) == 1
    z = torch.tensor([[0.0, 1.0], [3.0, 1.0]])
    assert float(method.sameness(noise, z)) == pytest.approx(math.exp(-(4.0 * 1.5) / 2))
    usual = method.sameness(Stream(0).normal((32, 32)), Stream(1).normal((32, 64)).relu())
    assert 0.05 < usual < 0.95


def test_clients_are_asked_only_for_classes_that_the_generator_has_learned(experiment):
    run = experiment("fedgen", clients=2, cohort=1, rounds=1, **{"method.server_steps": 1, "data.rows": 80})
    run.run()
    (trained,) = [i for i in range(2) if any(r["client"] == i and r.get("steps") for r in run.client_rows)]
    held = run.data.train(trained)[1].bincount(minlength=10) > 0
    assert torch.equal(run.server["learned"] > 0, held)
