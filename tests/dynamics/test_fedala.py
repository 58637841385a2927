"""FedALA: the mixing weights on known answers, and the methods that it equals at the limits of these weights."""

import pytest
import torch
from torch import nn

from fedloom import Batch, FedALA, Nets, tree


class Squared:
    """The loss (output - target)^2 / 2, for features of 1."""

    def loss(self, outputs, targets):
        return (outputs[:, 0] - targets).square().mean() / 2


@pytest.mark.parametrize(("target", "expected"), [(0.75, 0.75), (-3.0, 0.0), (5.0, 1.0)])
def test_the_mixing_weight_goes_where_the_loss_is_smaller_and_stays_in_0_1(target, expected):
    """With own head 0 and received head 1, the loss (W - t)^2 / 2 has gradient W - t.

    One step with eta = 1 from 1/2 ends at t, clamped.
    """
    method, one = FedALA(eta=1.0), torch.ones(1, 1)
    weights = {"model.head.weight": 0 * one, "mixer.weight": 0.5 * one.clone().requires_grad_()}
    down = {"weights": {"params": {"model.head.weight": one}, "buffers": {}}}
    head = nn.Sequential()
    head.add_module("head", nn.Linear(1, 1, bias=False))
    nets = Nets({"model": head, "mixer": nn.Linear(1, 1, bias=False)}, weights, {}, objective=Squared())  # type: ignore[arg-type]
    loss = method.mixing_loss(nets, Batch(one, torch.tensor([target])), down, {})
    (slope,) = torch.autograd.grad(loss, weights["mixer.weight"])
    assert float(slope) == pytest.approx(0.5 - target)
    train = method.adapt()[1]
    params = {"mixer.weight": weights["mixer.weight"].detach().clone()}
    train.optimizer.step({"mixer.weight": slope}, {}, params, 1.0)  # type: ignore[union-attr]
    assert float(params["mixer.weight"]) == pytest.approx(expected)
    mixed = method.take({"params": {"model.head.weight": 0 * one, **params}, "buffers": {}}, down, {})
    assert float(mixed["params"]["model.head.weight"]) == pytest.approx(expected)


def test_with_frozen_weights_of_1_it_is_fedavg_and_learned_weights_keep_part_of_the_own_head(experiment):
    settings = {"rounds": 3, "clients": 3, "data.rows": 120}
    frozen, plain, learned = (
        experiment("fedala", **settings, **{"method.eta": 0.0}),
        experiment("fedavg", **settings),
        experiment("fedala", **settings),
    )
    for run in (frozen, plain, learned):
        run.run()
    tree.map_tree(lambda a, b: torch.testing.assert_close(a, b) or a, frozen.server["weights"], plain.server["weights"])
    assert frozen.rows[-1]["personal_accuracy"] == plain.rows[-1]["personal_accuracy"]
    mixer = torch.cat([learned.engine.client(i).weights["params"]["mixer.weight"].flatten() for i in range(3)])
    assert mixer.min() < 1
    assert (mixer >= 0).all()
    assert "mix.loss" not in learned.rows[0]
    assert "first mix.loss" in learned.rows[1]
    assert "mix.loss" in learned.rows[2]
