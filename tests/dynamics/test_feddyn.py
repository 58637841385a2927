"""FedDyn and FedSpeed: the true optimum of two quadratics, h as the mean of all g_k, and their limits."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from fedloom import FedDyn, FedSpeed, tree
from rig import ETA, OPTIMUM, A, B, E, Quadratic, near


@dataclass(frozen=True)
class QuadraticFedDyn(Quadratic, FedDyn):
    """FedDyn with the `error` of quadratics."""


def gradients_of(run):
    return [run.engine.client(i).memory["gradient"]["model.w"].numpy() for i in range(2)]


def test_it_settles_at_the_optimum_where_each_g_is_the_clients_gradient(settle):
    w, run = settle(QuadraticFedDyn(lr=ETA, local_epochs=E, alpha=1.0), rounds=30)
    assert near(w, OPTIMUM, 1e-6)
    first = [int(run.data.train(i)[0][0, 0] != A[0, 0]) for i in range(2)]
    for g, i in zip(gradients_of(run), first, strict=True):
        np.testing.assert_allclose(g, A[i] * (OPTIMUM - B[i]), atol=1e-5)
    assert np.abs(run.server["h"]["model.w"].numpy()).max() < 1e-6


def test_the_first_step_is_twice_fedavgs_for_any_alpha_and_the_mean_is_in_use(settle):
    """So a small alpha is not FedAvg; the scored model is the mean of the clients' models, not x."""
    for alpha in (1e-3, 1.0):
        w, run = settle(QuadraticFedDyn(lr=ETA, alpha=alpha), rounds=1)
        step = ETA * (A * B).mean(0)
        assert near(w, 2 * step, 1e-12)
        assert near(run.hooks.deploy(run.server, 1).common["weights"]["params"]["model.w"], step, 1e-12)


def test_the_first_local_updates_are_the_closed_form(settle):
    """While g = 0, a client minimises f + alpha / 2 ||y||^2 from x = 0: the quadratic term shortens its steps."""
    _, run = settle(QuadraticFedDyn(lr=ETA, local_epochs=E, alpha=2.0), rounds=1)
    y = (1 - (1 - ETA * (A + 2.0)) ** E) * A * B / (A + 2.0)
    assert near(run.hooks.deploy(run.server, 1).common["weights"]["params"]["model.w"], y.mean(0), 1e-12)


def test_h_is_the_mean_over_all_clients_whoever_takes_part(settle):
    _, run = settle(QuadraticFedDyn(lr=ETA, local_epochs=E, alpha=0.5), rounds=3, cohort=1)
    np.testing.assert_allclose(run.server["h"]["model.w"].numpy(), np.mean(gradients_of(run), 0), atol=1e-12)
    assert np.abs(run.server["h"]["model.w"].numpy()).max() > 0.01


def test_alpha_zero_is_refused():
    with pytest.raises(ValueError, match=r"alpha=0.0: must be above 0"):
        FedDyn(alpha=0.0)


def test_fedspeed_is_feddyn_with_fedsams_gradients(experiment):
    """One step of one client: x moves twice as far as FedSAM's model. Without the ascent step, the method is FedDyn, but x is in use."""
    one = {"clients": 1, "rounds": 1, "batch_size": 1000, "data.rows": 60}
    speed, sam = experiment(FedSpeed(rho=0.3), **one), experiment("fedsam", **one, **{"method.rho": 0.3})
    start = sam.server["weights"]["params"]
    speed.run(), sam.run()
    expected = tree.add(start, tree.sub(sam.server["weights"]["params"], start), 2.0)
    tree.map_tree(torch.testing.assert_close, speed.server["weights"]["params"], expected)
    assert speed.hooks.deploy(speed.server, 1).common["weights"] is speed.server["weights"]
    few = {"clients": 2, "data.rows": 60}
    still, plain = experiment(FedSpeed(rho=0.0), **few), experiment(FedDyn(alpha=0.1), **few)
    still.run(), plain.run()
    tree.map_tree(lambda a, b: torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12) or a, still.server, plain.server)
