"""FedASAM, FedSAM and FedGamma: their steps equal those of the released minimiser, which is reimplemented here."""

from typing import Any

import pytest
import torch
from torch import nn

from fedloom import Batch, FedASAM, FedAvg, FedGamma, FedSAM, Nets, tree
from fedloom.nets import read_weights, write_weights


@pytest.fixture(autouse=True)
def _wide(float64):
    """Compare in float64."""


def climb_and_step(model: nn.Module, x: Any, y: Any, lr: float, rho: float, eta: float | None) -> None:
    """Take one step as in the released ASAM (SAM without `eta`): climb, compute the gradient there, return, and step."""
    nn.functional.cross_entropy(model(x), y).backward()
    named = list(model.named_parameters())
    scale = {
        name: p.detach().abs() + eta if eta is not None and "weight" in name else torch.ones_like(p)
        for name, p in named
    }
    norm = sum((scale[name] * p.grad).square().sum() for name, p in named).sqrt()
    before = {name: p.detach().clone() for name, p in named}
    with torch.no_grad():
        for name, p in named:
            p += rho * scale[name] ** 2 * p.grad / norm
    model.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    with torch.no_grad():
        for name, p in named:
            p.copy_(before[name] - lr * p.grad)
    model.zero_grad()


@pytest.mark.parametrize(
    ("method", "eta"),
    [
        (FedASAM(lr=0.1, rho=0.4, eta=0.1), 0.1),
        (FedASAM(lr=0.1, rho=0.4, eta=0.1, local_epochs=20), 0.1),  # long enough for steps to be replayed
        (FedSAM(lr=0.1, rho=0.4, local_epochs=3), None),
    ],
)
def test_a_client_takes_the_steps_of_the_released_minimiser(experiment, method, eta):
    run = experiment(method, clients=1, rounds=1, batch_size=1000, **{"data.rows": 60})
    modules = run.problem.modules(0)
    model = modules["model"].requires_grad_(True)
    x, y = run.data.train(0)
    run.run()
    for _ in range(method.local_epochs):
        climb_and_step(model, x, y, 0.1, 0.4, eta)
    for name, tensor in run.server["weights"]["params"].items():
        torch.testing.assert_close(tensor, dict(model.named_parameters())[name.removeprefix("model.")].detach())


def test_without_a_climb_it_is_fedavg(experiment):
    one, other = experiment(FedASAM(rho=0.0), model="resnet8"), experiment(FedAvg(), model="resnet8")
    one.run(), other.run()
    tree.map_tree(lambda a, b: torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12) or a, one.server, other.server)


def test_running_statistics_are_those_of_one_pass(experiment):
    run = experiment(FedASAM(), clients=1, rounds=1, model="resnet8", batch_size=1000, **{"data.rows": 60})
    run.run()
    seen = [b for name, b in run.server["weights"]["buffers"].items() if name.endswith("num_batches_tracked")]
    assert seen
    assert all(int(b) == 1 for b in seen)


def test_the_climb_has_length_rho_in_units_of_t(experiment):
    run = experiment("fedavg", clients=1)
    modules = run.problem.modules(0)
    weights = read_weights(modules)
    x, y = run.data.train(0)
    method = FedASAM(rho=0.3, eta=0.05)
    e = method.ascent(Nets(modules, **weights), Batch(x, y))
    units = {n: p.abs() + 0.05 if n.endswith("weight") else torch.ones_like(p) for n, p in weights["params"].items()}
    length = sum((e[name] / units[name]).square().sum() for name in e).sqrt()
    assert float(length) == pytest.approx(0.3)
    moved = {"params": tree.add(weights["params"], e), "buffers": {}}
    before = float(nn.functional.cross_entropy(modules["model"](x), y).detach())
    write_weights(modules, moved)
    assert float(nn.functional.cross_entropy(modules["model"](x), y).detach()) > before


def test_fedgamma_is_scaffold_with_fedsams_gradients(experiment):
    """Without the ascent step, the method is SCAFFOLD. The first step is FedSAM's, and its gradient becomes the control variate."""
    still, plain = experiment(FedGamma(rho=0.0)), experiment("scaffold")
    still.run(), plain.run()
    tree.map_tree(lambda a, b: torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12) or a, still.server, plain.server)
    one = {"clients": 1, "rounds": 1, "batch_size": 1000, "data.rows": 60}
    gamma, sam = experiment(FedGamma(lr=0.1, rho=0.4), **one), experiment(FedSAM(lr=0.1, rho=0.4), **one)
    start = gamma.server["weights"]["params"]
    gamma.run(), sam.run()
    tree.map_tree(torch.testing.assert_close, gamma.server["weights"]["params"], sam.server["weights"]["params"])
    gradient = tree.map_tree(lambda a, b: (a - b) / 0.1, start, sam.server["weights"]["params"])
    tree.map_tree(torch.testing.assert_close, gamma.engine.client(0).memory["control"], gradient)
