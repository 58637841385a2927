"""MOON: its contrastive term on known answers, and when it equals FedAvg."""

import math

import pytest
import torch

from fedloom import Moon, tree


def test_the_contrast_has_known_values():
    """cos = (1, -1) with T = 1/2 gives ln(1 + e^-4).

    Equal references give ln 2 without a gradient. Features of 0 give ln 2 and a finite gradient.
    """
    method, z = Moon(), torch.tensor([[3.0, 0.0]], requires_grad=True)
    value = method.contrast(z, torch.tensor([[2.0, 0.0]]), torch.tensor([[-1.0, 0.0]]))
    assert float(value.detach()) == pytest.approx(math.log(1 + math.exp(-4)), rel=1e-5)
    other = torch.tensor([[1.0, 2.0]])
    value = method.contrast(z, other, other)
    assert float(value.detach()) == pytest.approx(math.log(2))
    assert torch.autograd.grad(value, z)[0].abs().max() < 1e-7
    dead = torch.zeros(1, 2, requires_grad=True)
    value = method.contrast(dead, other, -other)
    assert float(value.detach()) == pytest.approx(math.log(2))
    assert not torch.autograd.grad(value, dead)[0].any()
    pulled = method.contrast(z, other, torch.tensor([[1.0, -2.0]]))
    assert torch.autograd.grad(pulled, z)[0][0, 1] < 0  # a step of descent turns z towards the received model


def test_the_first_update_is_fedavgs_and_later_ones_are_not(experiment):
    """A client without a previous model has no contrastive term. With mu = 0, there is none in any round."""
    settings = {"rounds": 2, "clients": 3, "eval.fitted": True}
    runs = {name: experiment(name.partition(" ")[0], **settings, **({"method.mu": mu} if mu is not None else {}))
            for name, mu in (("fedavg", None), ("moon", 5.0), ("moon off", 0.0))}  # fmt: skip
    for run in runs.values():
        run.run()
    plain, full, off = (runs[name] for name in runs)
    accuracies = [{k: v for k, v in run.rows[0].items() if "accuracy" in k} for run in (plain, full)]
    assert accuracies[0] == accuracies[1]
    assert full.rows[0]["train.contrast"] == 0
    assert full.rows[1]["train.contrast"] > 0
    tree.map_tree(lambda a, b: torch.testing.assert_close(a, b) or a, plain.server["weights"], off.server["weights"])
    assert not tree.equal(plain.server["weights"], full.server["weights"])
    previous = full.engine.client(0).memory["previous"]["params"]
    assert all(
        not torch.equal(previous[n], p) for n, p in full.server["weights"]["params"].items() if n.endswith("weight")
    )


def test_the_projection_is_part_of_the_model(experiment):
    run = experiment("moon", rounds=1, **{"method.projection": 6, "data.rows": 60})
    run.run()
    shapes = {name: tuple(p.shape) for name, p in run.server["weights"]["params"].items()}
    assert shapes["model.head.weight"] == (10, 6)
    assert shapes["model.body.projection.2.weight"] == (6, 12)
