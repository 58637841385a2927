"""FedTGP: the margin and the contrast on known answers, and that training moves the prototypes apart."""

import math

import pytest
import torch

from fedloom import FedTGP, Nets, Round, Stream
from fedloom.method import Arrival
from fedloom.methods.fedtgp import PrototypeNet
from fedloom.nets import read_weights
from fedloom.training.turn import fresh_modules

Y, P = 4, 3


def test_the_margin_is_the_largest_gap_of_the_rounds_classes_with_a_limit():
    """Three classes on a line at 0, 1 and 5 have the gaps 1, 1 and 4."""
    line = torch.tensor([[0.0, 0, 0], [1, 0, 0], [5, 0, 0]])
    assert float(FedTGP().gap(line)) == 4
    assert float(FedTGP(margin=7.0).gap(line[:1])) == 7


def test_the_contrast_of_two_classes():
    """The contrast is log(1 + exp(d_own + margin - d_other))."""
    prototypes, z = torch.tensor([[0.0, 0], [3.0, 0]]), torch.tensor([[1.0, 0]])
    value = FedTGP().contrast(prototypes, z, torch.tensor([0]), torch.tensor(0.5))
    assert float(value) == pytest.approx(math.log(1 + math.exp(1 + 0.5 - 2)), rel=1e-5)


def round_of(modules, n):
    arrivals = tuple(Arrival(i, i, 1 / n) for i in range(n))
    return Round(0, n, arrivals, Stream(2), nets=lambda weights: Nets(modules, **weights))


def test_training_separates_the_prototypes_by_the_margin_and_unseen_classes_stay_hidden():
    """Two clients have the overlapping classes 0, 1 and 2. The server's contrast decreases, and class 3 has no prototype."""
    method = FedTGP(server_epochs=60, server_lr=0.05)
    modules = fresh_modules(lambda: {"maker": PrototypeNet(Y, P)}, Stream(0))
    server = {"prototypes": torch.zeros(Y, P), "counts": torch.zeros(Y), "maker": read_weights(modules)["params"]}
    ups = [
        {"prototypes": torch.tensor([[1.0, 0, 0], [0, 1, 0]]), "counts": torch.tensor([3.0, 4, 0, 0])},
        {"prototypes": torch.tensor([[0.0, 1.2, 0], [0, 0, 1]]), "counts": torch.tensor([0.0, 2, 5, 0])},
    ]
    z, y = torch.cat([up["prototypes"] for up in ups]), torch.tensor([0, 1, 1, 2])
    after = method.aggregate(server, ups, round_of(modules, 2))
    margin = method.gap(torch.tensor([[1.0, 0, 0], [0, 1.1, 0], [0, 0, 1]]))
    before = method.contrast(modules["maker"](torch.arange(Y)).detach(), z, y, margin)
    assert method.contrast(after["prototypes"], z, y, margin) < before - 0.5
    assert after["counts"].tolist() == [3, 6, 5, 0]
    assert set(method.downlink(after, (), round_of(modules, 2)).common) == {"prototypes", "counts"}


def test_the_margin_ignores_classes_that_are_absent_from_the_round():
    """The stored prototype of an absent class is far away, but it does not increase the margin."""
    seen = []

    class Watched(FedTGP):
        def contrast(self, prototypes, z, labels, margin):
            seen.append(float(margin))
            return super().contrast(prototypes, z, labels, margin)

    modules = fresh_modules(lambda: {"maker": PrototypeNet(Y, P)}, Stream(0))
    far = torch.zeros(Y, P)
    far[3] = 1000.0
    server = {"prototypes": far, "counts": torch.tensor([0.0, 0, 0, 9]), "maker": read_weights(modules)["params"]}
    up = {"prototypes": torch.tensor([[0.0, 0, 0], [2, 0, 0]]), "counts": torch.tensor([1.0, 1, 0, 0])}
    Watched(server_epochs=1).aggregate(server, [up], round_of(modules, 1))
    assert seen == [2.0]
