"""Losses: closed forms and naive sums."""

import math

import pytest
import torch
from torch import nn

from fedloom import losses, optim
from fedloom.rng import Stream


@pytest.fixture(autouse=True)
def _wide(float64):
    """Run all tests of this file in float64."""


def naive_vclub(mean, log_variance, target):
    """Return the double sum of the paper, per feature."""
    n, d = target.shape

    def log_q(i, j):
        return -0.5 * ((mean[i] - target[j]) ** 2 / log_variance[i].exp() + log_variance[i]).sum()

    own = sum(log_q(i, i) for i in range(n)) / n
    every = sum(log_q(i, j) for i in range(n) for j in range(n)) / n**2
    return (own - every) / d


def fitted_q(x, c):
    """Fit q(c | x) by its likelihood, with a linear mean and a free variance."""
    net = nn.Linear(x.shape[1], c.shape[1])
    params = {"w": torch.zeros_like(net.weight), "b": torch.zeros_like(net.bias), "v": torch.zeros(c.shape[1])}
    adam = optim.adam(0.05)
    state = adam.init(params)

    def q(p):
        return x @ p["w"].T + p["b"], p["v"].expand(len(x), -1)

    for _ in range(300):
        wanted = {name: p.detach().requires_grad_() for name, p in params.items()}
        grads = torch.autograd.grad(losses.gaussian_nll(*q(wanted), c), list(wanted.values()))
        params, state = adam.update(dict(zip(params, grads, strict=True)), state, params, 1.0)
    return q(params)


def test_gaussian_kl_closed_forms():
    zero = torch.zeros(4, 3)
    assert losses.gaussian_kl(zero, zero).item() == 0
    assert losses.gaussian_kl(torch.ones(4, 3), zero).item() == pytest.approx(1.5)  # 3 features, m^2 / 2 each
    log_variance = torch.full((4, 3), math.log(4.0))
    assert losses.gaussian_kl(zero, log_variance).item() == pytest.approx(3 * 0.5 * (4 - 1 - math.log(4)))


def test_gaussian_kl_equals_torchs():
    mean, log_variance = Stream(0).normal((5, 2)), Stream(1).normal((5, 2))
    q = torch.distributions.Normal(mean, (log_variance / 2).exp())
    expected = torch.distributions.kl_divergence(q, torch.distributions.Normal(torch.zeros(1), torch.ones(1))).sum(1)
    assert losses.gaussian_kl(mean, log_variance).item() == pytest.approx(expected.mean().item())


def test_gaussian_nll_lacks_only_its_constant():
    mean, log_variance, target = (Stream(i).normal((5, 2)) for i in range(3))
    log_p = torch.distributions.Normal(mean, (log_variance / 2).exp()).log_prob(target)
    expected = -log_p.mean().item() - 0.5 * math.log(2 * math.pi)
    assert losses.gaussian_nll(mean, log_variance, target).item() == pytest.approx(expected)


def test_vclub_equals_the_naive_double_sum():
    mean, log_variance, target = (Stream(i).normal((7, 3)) for i in range(3))
    expected = naive_vclub(mean, log_variance, target).item()
    assert losses.vclub(mean, log_variance, target).item() == pytest.approx(expected, rel=1e-12)


def test_the_sampled_vclub_has_the_same_expectation():
    mean, log_variance, target = (Stream(i).normal((6, 2)) for i in range(3))
    whole = losses.vclub(mean, log_variance, target).item()
    shifts = [losses.vclub(mean, log_variance, target, torch.arange(6).roll(k)).item() for k in range(6)]
    assert sum(shifts) / 6 == pytest.approx(whole, rel=1e-12)  # over all shifts, every pair appears once
    drawn = [losses.vclub(mean, log_variance, target, Stream(9, i).permutation(6)).item() for i in range(3000)]
    assert sum(drawn) / 3000 == pytest.approx(whole, abs=4 * torch.tensor(drawn).std().item() / math.sqrt(3000))


def test_vclub_with_itself_as_the_other_is_zero():
    mean, log_variance, target = (Stream(i).normal((6, 2)) for i in range(3))
    assert losses.vclub(mean, log_variance, target, torch.arange(6)).item() == 0


def test_vclub_is_about_zero_for_independent_variables():
    x, c = Stream(0).normal((2000, 1)), Stream(1).normal((2000, 1))
    assert abs(losses.vclub(*fitted_q(x, c), c).item()) < 0.02


def test_vclub_bounds_the_information_of_correlated_gaussians():
    x, noise, rho = Stream(0).normal((2000, 1)), Stream(1).normal((2000, 1)), 0.8
    c = rho * x + math.sqrt(1 - rho**2) * noise
    information = -0.5 * math.log(1 - rho**2)
    bound = losses.vclub(*fitted_q(x, c), c).item()
    assert bound > information
    assert bound == pytest.approx(rho**2 / (1 - rho**2), rel=0.15)  # vCLUB's value for the true q


def test_a_bad_q_makes_vclub_negative():
    c = Stream(0).normal((50, 2))
    assert losses.vclub(-c, torch.zeros_like(c), c) < 0


def test_squared_distance_counts_what_is_common():
    a = {"x": torch.tensor([1.0, 2.0]), "y": torch.tensor(5.0)}
    assert losses.squared_distance(a, {"x": torch.tensor([0.0, 0.0]), "z": torch.tensor(1.0)}).item() == 5.0
    with pytest.raises(ValueError, match="at least one name that both inputs share"):
        losses.squared_distance(a, {"z": torch.tensor(1.0)})


def test_sixteen_bits_are_not_squared_and_summed():
    mean, log_variance, target = (0.1 * Stream(k).normal((50, 64)).bfloat16() for k in range(3))
    for loss, given in [
        (losses.gaussian_kl, (mean, log_variance)),
        (losses.gaussian_nll, (mean, log_variance, target)),
        (losses.vclub, (mean, log_variance, target)),
    ]:
        assert loss(*given).dtype is torch.float32
        assert torch.equal(loss(*given), loss(*(values.float() for values in given)))


def test_cross_entropy_is_in_nats():
    assert losses.cross_entropy(torch.zeros(3, 4), torch.tensor([0, 1, 2])).item() == pytest.approx(math.log(4))


def test_losses_map_over_clients():
    mean, log_variance, target = (Stream(i).normal((3, 5, 2)) for i in range(3))
    other = torch.stack([Stream(4, i).permutation(5) for i in range(3)])
    mapped = torch.func.vmap(losses.vclub)(mean, log_variance, target, other)
    looped = [losses.vclub(mean[i], log_variance[i], target[i], other[i]) for i in range(3)]
    torch.testing.assert_close(mapped, torch.stack(looped))
    torch.testing.assert_close(
        torch.func.vmap(torch.func.grad(losses.gaussian_kl))(mean, log_variance),
        torch.stack([torch.func.grad(losses.gaussian_kl)(mean[i], log_variance[i]) for i in range(3)]),
    )


def naive_class_decorrelation(a, b, labels):
    """Compute the loss example by example and class by class."""
    away = []
    for value in (a, b):
        away.append(torch.stack([row - value[labels == y].mean(0) for row, y in zip(value, labels, strict=True)]))
    covariance = sum(torch.outer(one, other) for one, other in zip(*away, strict=True)) / len(a)
    return (covariance**2).sum() / (a.shape[1] * (away[0] ** 2).mean() * (away[1] ** 2).mean())


def test_class_decorrelation_equals_the_naive_sum():
    a, b, labels = Stream(0).normal((30, 4)), Stream(1).normal((30, 4)), Stream(2).integers(3, (30,))
    expected = naive_class_decorrelation(a, b, labels).item()
    assert losses.class_decorrelation(a, b, labels, 3).item() == pytest.approx(expected, rel=1e-12)
    assert losses.class_decorrelation(7 * a, b / 3, labels, 5).item() == pytest.approx(expected, rel=1e-12)
    shifted = a + Stream(3).normal((3, 4))[labels]  # variation that the class alone explains costs nothing
    assert losses.class_decorrelation(shifted, b, labels, 3).item() == pytest.approx(expected, rel=1e-9)


def test_lowering_class_decorrelation_makes_features_forget_the_factor():
    """Features are mixtures of two factors, one of which is known as `b`. Descent on the term preserves the other factor."""
    factors, labels = Stream(0).normal((200, 2)), Stream(1).integers(4, (200,))
    mixing = Stream(2).normal((2, 3)).requires_grad_()
    known = factors[:, :1].expand(-1, 3)
    for _ in range(300):
        term = losses.class_decorrelation(factors @ mixing, known, labels, 4)
        (grad,) = torch.autograd.grad(term, mixing)
        mixing = (mixing - 0.2 * grad).detach().requires_grad_()
    kept, forgotten = mixing[1].norm().item(), mixing[0].norm().item()
    assert forgotten < 0.15 * kept


def test_class_decorrelation_has_finite_gradients_where_nothing_varies():
    for rows in (torch.ones(4, 3), Stream(0).normal((4, 3))):
        a = rows.clone().requires_grad_()
        found = losses.class_decorrelation(a, Stream(1).normal((4, 3)), torch.arange(4), 4)  # one row a class
        found.backward()
        assert found.item() == 0
        assert torch.equal(a.grad, torch.zeros_like(a))


def test_decorrelation_within_classes_has_known_values():
    labels = torch.arange(400) % 4
    noise = Stream(0).normal((400, 3)).double()
    mean = 5.0 * torch.arange(4).double()[labels, None]
    assert float(losses.class_decorrelation(mean + noise, mean.expand(-1, 3), labels, 4)) == 0, (
        "the class alone is no correlation"
    )
    white = torch.linalg.qr(noise - within(noise, labels))[0]
    white = white - within(white, labels)
    white = torch.linalg.qr(white)[0]
    torch.testing.assert_close(
        losses.class_decorrelation(white, white, labels, 4), torch.tensor(1.0).double(), rtol=0.05, atol=0
    )
    one = noise[:, :1] - within(noise[:, :1], labels)
    same = one.expand(-1, 3)
    torch.testing.assert_close(losses.class_decorrelation(same, 7 * same, labels, 4), torch.tensor(3.0).double())
    apart = Stream(1).normal((400, 3)).double()
    assert float(losses.class_decorrelation(noise, apart, labels, 4)) < 0.03


def within(values, labels):
    return torch.stack([values[labels == y].mean(0) for y in range(4)])[labels]
