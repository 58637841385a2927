"""FedNova: clients with more steps do not have more influence, on losses with known results."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from fedloom import FedNova, from_arrays, tree
from rig import Quadratic
from small import spied


@dataclass(frozen=True)
class Linear(Quadratic, FedNova):
    """Clients with constant gradients, which are the means of their inputs."""

    def loss(self, nets, batch, down, memory):
        return (batch.x.mean(0) * nets.params["model.w"]).sum()


@pytest.fixture
def one_round(experiment):
    """Return the model after one round from 0 of two clients with constant gradients, and its experiment."""
    x = np.repeat([[1.0, 2.0], [-3.0, 1.0]], [12, 40], 0)
    dataset = from_arrays(x, np.arange(52) % 2, columns={"owner": np.repeat(["few", "many"], [12, 40])})

    def go(method):
        natural = {"name": "natural", "column": "owner", "min_examples": 2}
        run = experiment(
            method, dataset=dataset, rounds=1, batch_size=4, model="logistic", clients=2, partition=natural
        )
        sent = spied(run)
        run.run()
        return run.server["weights"]["params"]["model.w"].numpy(), run, sent[0].replies

    return go


def effective(steps, momentum):
    """Return the sum of the coefficients of the gradients in a change, found by simulation."""
    velocity = total = 0.0
    for _ in range(steps):
        velocity = momentum * velocity + 1
        total += velocity
    return total


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_with_constant_gradients_the_step_is_the_mean_gradient_times_the_mean_number_of_steps(one_round, momentum):
    """x = -lr (sum p_k a_k) sum p_k g_k for any numbers of steps; FedAvg's would be -lr sum p_k a_k g_k."""
    w, run, replies = one_round(Linear(lr=0.1, momentum=momentum, local_epochs=2))
    n = np.array([run.data.n_train(i) for i in range(2)])
    gradients = np.stack([run.data.train(i)[0].double().mean(0).numpy() for i in range(2)])
    steps = np.array([effective(reply.steps["train"], momentum) for reply in replies])
    assert steps[0] != steps[1]
    np.testing.assert_allclose([float(one.uplink["effective_steps"]) for one in replies], steps, rtol=1e-12)
    share = n / n.sum()
    np.testing.assert_allclose(w, -0.1 * (share @ steps) * (share @ gradients), rtol=1e-9)
    assert np.abs(w + 0.1 * (share * steps) @ gradients).max() > 0.1


def test_with_equal_steps_it_is_fedavg_also_for_running_statistics(experiment):
    settings = {"model": "fedrir_cnn", "width": 8, "clients": 2, "partition.name": "iid", "data.rows": 60}
    settings |= {"rounds": 1, "method.momentum": 0.5}
    one, other = (experiment(name, **settings) for name in ("fednova", "fedavg"))
    one.run(), other.run()
    tree.map_tree(lambda a, b: torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12) or a, one.server, other.server)


def test_a_slow_client_counts_the_steps_that_it_took(experiment):
    slow = {"devices.stragglers": "partial", "devices.slow": 0.5, "devices.slowdown": 4}
    run = experiment("fednova", clients=2, rounds=1, **{"partition.name": "iid", **slow})
    sent = spied(run)
    run.run()
    taken = [(float(reply.uplink["effective_steps"]), reply.steps["train"]) for reply in sent[0].replies]
    assert all(effective == steps for effective, steps in taken)
    assert taken[0] != taken[1]


def test_local_adam_and_impossible_numbers_of_steps_are_refused():
    with pytest.raises(ValueError, match=r"optimizer=adam: fednova needs SGD; use optimizer=sgd"):
        FedNova(optimizer="adam")
    assert FedNova().uplink_fault({"effective_steps": torch.tensor(0.5)}, None) == "'effective_steps' is below 1"
