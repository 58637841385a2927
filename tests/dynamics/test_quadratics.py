"""Two clients with quadratic losses, whose fixed points are known in closed form.

Client i minimises 1/2 sum_d a_id (w_d - b_id)^2 with E steps of size eta: w -> b_i + (1 - eta a_i)^E (w - b_i).
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from fedloom import FedAvg, FedMR, FedProx, PerFedAvg, PFedMe, Scaffold, tree
from rig import BIASED, ETA, OPTIMUM, A, B, E, Quadratic, Vector, near


@dataclass(frozen=True)
class QuadraticFedAvg(Quadratic, FedAvg):
    """FedAvg on quadratics."""

    def loss(self, nets, batch, down, memory):
        return self.error(nets, batch)


@dataclass(frozen=True)
class QuadraticFedMR(Quadratic, FedMR):
    """FedMR on quadratics."""

    loss = QuadraticFedAvg.loss


@dataclass(frozen=True)
class QuadraticFedProx(Quadratic, FedProx):
    """FedProx on quadratics, with its own proximal term and the error from `Quadratic`."""

    def loss(self, nets, batch, down, memory):
        proximal = super().loss(_Zero(nets), batch, down, memory)
        return self.error(nets, batch) + proximal


@dataclass(frozen=True)
class QuadraticScaffold(Quadratic, Scaffold):
    """SCAFFOLD on quadratics, with its own correction and the error from `Quadratic`."""

    def loss(self, nets, batch, down, memory):
        return self.error(nets, batch) + super().loss(_Zero(nets), batch, down, memory)


@dataclass(frozen=True, kw_only=True)
class QuadraticPFedMe(Quadratic, PFedMe):
    """pFedMe on quadratics."""

    def nets(self, arch, task):
        return {"model": Vector(), "personal": Vector()}

    def loss(self, nets, batch, down, memory):
        theta = nets.with_params(nets.renamed("personal", "model"))
        return self.error(theta, batch) + super().loss(_Zero(nets), batch, down, memory)


@dataclass(frozen=True, kw_only=True)
class QuadraticPerFedAvg(Quadratic, PerFedAvg):
    """Per-FedAvg on quadratics: the meta-step is the method's, and the error is that of this file."""


class _Zero:
    """Nets whose logits give a constant cross-entropy."""

    def __init__(self, nets) -> None:
        self.params, self.loss, self.renamed = nets.params, nets.loss, nets.renamed

    def model(self, x):
        return torch.zeros(len(x), 2)

    personal = model


@dataclass(frozen=True)
class WrongSign(QuadraticScaffold):
    """SCAFFOLD with the wrong sign of the correction."""

    def loss(self, nets, batch, down, memory):
        correct = super().loss(nets, batch, down, memory)
        return 2 * self.error(nets, batch) - correct


@dataclass(frozen=True)
class WrongMemory(QuadraticScaffold):
    """SCAFFOLD that stores its negated control variate."""

    def uplink(self, client, received, down, turn):
        message, memory = super().uplink(client, received, down, turn)
        return message, tree.map_tree(torch.neg, memory)


def test_the_two_answers_differ():
    assert np.abs(BIASED - OPTIMUM).max() > 0.1


def test_fedavg_settles_at_its_biased_fixed_point(settle):
    w, _ = settle(QuadraticFedAvg(lr=ETA, local_epochs=E))
    assert near(w, BIASED)


def test_fedavg_with_one_step_settles_at_the_optimum(settle):
    w, _ = settle(QuadraticFedAvg(lr=ETA, local_epochs=1), rounds=400)
    assert near(w, OPTIMUM)


def test_one_round_is_the_closed_form(settle):
    w, _ = settle(QuadraticFedAvg(lr=ETA, local_epochs=E), rounds=1)
    assert near(w, ((1 - (1 - ETA * A) ** E) * B).mean(0), 1e-12)


def test_the_learning_rate_decays_by_round(settle):
    w, _ = settle(QuadraticFedAvg(lr=ETA, lr_decay=0.5), rounds=2)
    expected = np.zeros(2)
    for rate in (ETA, ETA / 2):
        expected = (expected + rate * A * (B - expected)).mean(0)
    assert near(w, expected, 1e-12)


def test_scaffold_settles_at_the_optimum(settle):
    w, run = settle(QuadraticScaffold(lr=ETA, local_epochs=E), rounds=200)
    assert near(w, OPTIMUM, 1e-6)
    controls = [run.engine.client(i).memory["control"]["model.w"].numpy() for i in range(2)]
    first = [int(run.data.train(i)[0][0, 0] != A[0, 0]) for i in range(2)]
    for control, i in zip(
        controls, first, strict=True
    ):  # c_i equals the client's own gradient at the optimum, sign included
        np.testing.assert_allclose(control, A[i] * (OPTIMUM - B[i]), atol=1e-5)
    np.testing.assert_allclose(run.server["control"]["model.w"].numpy(), np.mean(controls, 0), atol=1e-12)


@pytest.mark.parametrize("wrong", [WrongSign, WrongMemory])
def test_a_scaffold_with_a_wrong_sign_does_not(settle, wrong):
    w, _ = settle(wrong(lr=ETA, local_epochs=E), rounds=100)
    assert not near(w, OPTIMUM, 0.1)


def test_scaffold_with_partial_participation_settles_too(settle):
    w, _ = settle(QuadraticScaffold(lr=ETA, local_epochs=E), rounds=400, cohort=1)
    assert near(w, OPTIMUM, 1e-3)


def test_scaffolds_control_variate_is_the_mean_over_all_clients_whoever_takes_part(settle):
    _, run = settle(QuadraticScaffold(lr=ETA, local_epochs=E), rounds=5, cohort=1)
    controls = [run.engine.client(i).memory["control"]["model.w"].numpy() for i in range(2)]
    np.testing.assert_allclose(run.server["control"]["model.w"].numpy(), np.mean(controls, 0), atol=1e-12)


def test_after_one_step_scaffolds_control_variate_is_the_gradient_whatever_the_learning_rate(settle):
    method = QuadraticScaffold(lr=ETA, lr_decay=0.5)
    (before, _), (_, run) = settle(method, rounds=1), settle(method, rounds=2)
    found = sorted(tuple(run.engine.client(i).memory["control"]["model.w"].tolist()) for i in range(2))
    np.testing.assert_allclose(found, sorted(map(tuple, A * (before.numpy() - B))), atol=1e-12)


def test_fedprox_without_its_term_is_fedavg_bit_for_bit(settle):
    plain, _ = settle(QuadraticFedAvg(lr=ETA, local_epochs=E))
    w, _ = settle(QuadraticFedProx(lr=ETA, local_epochs=E, mu=0.0))
    assert torch.equal(w, plain)


def test_a_large_mu_keeps_clients_near_the_received_model(settle):
    mu = 50.0
    w, _ = settle(QuadraticFedProx(lr=0.01, local_epochs=2000, mu=mu), rounds=1)
    assert near(w, (A * B / (A + mu)).mean(0), 1e-10)


def test_fedmr_keeps_the_mean_of_the_models(settle):
    """With one unit, a permutation only renumbers the slots, and their mean changes as in FedAvg."""
    slots, run = settle(QuadraticFedMR(lr=ETA, momentum=0.0, local_epochs=E), rounds=1)
    assert slots.shape == (2, 2)
    expected = (1 - (1 - ETA * A) ** E) * B
    np.testing.assert_allclose(np.sort(slots.numpy(), 0), np.sort(expected, 0), atol=1e-12)
    deployed = run.hooks.deploy(run.server, run.done).common["weights"]["params"]["model.w"]
    assert near(deployed, expected.mean(0), 1e-12)


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_pfedme_descends_the_moreau_envelope(settle, beta):
    """min over theta of a/2 (theta - b)^2 + mu/2 (theta - w)^2 has the gradient mu a / (a + mu) (w - b) in w."""
    mu, lr = 2.0, 0.1
    method = QuadraticPFedMe(lr=lr, mu=mu, personal_lr=0.3, inner_steps=30, local_steps=3, beta=beta)
    w, run = settle(method, rounds=1)
    expected = (1 - (1 - lr * mu * A / (A + mu)) ** 3) * B
    assert near(w, beta * expected.mean(0), 1e-8)
    one = int(run.data.train(0)[0][0, 0] != A[0, 0])
    before = (1 - (1 - lr * mu * A[one] / (A[one] + mu)) ** 2) * B[one]
    theta = run.engine.client(0).weights["params"]["personal.w"]  # of the last batch
    assert near(theta, (A[one] * B[one] + mu * before) / (A[one] + mu))


def test_pfedme_without_its_term_never_moves_and_settles_at_the_optimum_of_the_envelopes(settle):
    w, _ = settle(QuadraticPFedMe(mu=0.0, local_steps=2), rounds=2)
    assert near(w, 0)
    w, _ = settle(QuadraticPFedMe(lr=0.5, mu=2.0, personal_lr=0.3, inner_steps=20, local_steps=1), rounds=60)
    weights = A / (A + 2)
    assert near(w, (weights * B).sum(0) / weights.sum(0), 1e-5)


@pytest.mark.parametrize(("variant", "power"), [("fo", 1), ("hf", 2)])
def test_per_fedavg_takes_the_closed_form_of_its_meta_step(settle, variant, power):
    """First order: the gradient is a (1 - alpha a) (w - b); with second derivatives, a (1 - alpha a)^2 (w - b)."""
    alpha = 0.3
    w, _ = settle(QuadraticPerFedAvg(lr=ETA, local_epochs=E, inner_lr=alpha, variant=variant), rounds=1)
    assert near(w, ((1 - (1 - ETA * A * (1 - alpha * A) ** power) ** E) * B).mean(0), 1e-9)


def test_per_fedavg_without_an_inner_step_is_fedavg(settle):
    plain, _ = settle(QuadraticFedAvg(lr=ETA, local_epochs=E), rounds=3)
    w, _ = settle(QuadraticPerFedAvg(lr=ETA, local_epochs=E, inner_lr=0.0), rounds=3)
    assert near(w, plain.numpy(), 1e-12)
