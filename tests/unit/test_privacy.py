"""Client-level privacy: the noisy sum, and published values of the privacy that it spends."""

import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from fedloom import FedAvg, tree
from fedloom.combining.additive import Additive
from fedloom.combining.budget import Releases, noise_for
from fedloom.combining.privacy import NoisySum
from fedloom.rng import Stream


def uplinks_of(weights, control):
    """Return uplinks with two parts from rows (n, d). The downlink is 0."""
    like = {
        "weights": {"params": {"w": weights[0]}, "buffers": {"steps": torch.tensor(3)}},
        "control": {"w": control[0]},
    }
    every = [
        {"weights": {"params": {"w": w}, "buffers": {"steps": torch.tensor(9)}}, "control": {"w": c}}
        for w, c in zip(weights, control, strict=True)
    ]
    return Additive(FedAvg(), every, tree.zeros_like({"weights": like["weights"]}), like=like)


def none_of(width):
    """Return zero uplinks with two parts."""
    like = uplinks_of(torch.zeros(1, width), torch.zeros(1, width))._like
    return Additive(FedAvg(), [], {}, like=like)


BOUNDS = {"weights": 2.0, "control": 10.0}


def released(uplinks, scale=1.0, number=0, **more):
    return NoisySum(**{"noise": 0.0, "bounds": BOUNDS, "expected": 4} | more).release(uplinks, scale, Stream(0, number))


def test_each_group_is_clipped_and_the_sum_divided_by_the_expected_number():
    weights = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]])  # norms 5, 1, 0
    control = torch.tensor([[0.0, 9.0], [20.0, 0.0], [1.0, 1.0]])
    mean, scale = released(uplinks_of(weights, control))
    torch.testing.assert_close(mean["weights/params/w"], torch.tensor([3.0 * 0.4 + 1.0, 4.0 * 0.4]).double() / 4)
    torch.testing.assert_close(mean["control/w"], torch.tensor([10.0 + 1.0, 9.0 + 1.0]).double() / 4)
    assert mean["weights/buffers/steps"] == 0  # counters are not released
    assert scale == 1.0
    halved, _ = released(uplinks_of(weights, control), scale=0.5)
    torch.testing.assert_close(halved["weights/params/w"], torch.tensor([3.0 * 0.2 + 1.0, 4.0 * 0.2]).double() / 4)


numbers = st.lists(st.floats(-1e6, 1e6), min_size=6, max_size=6)


@hypothesis.given(st.lists(numbers, min_size=1, max_size=4), numbers)
def test_one_client_changes_a_sum_by_at_most_the_bounds(others, mine):
    """This is the definition of sensitivity, with a client that sends anything, including numbers whose squares overflow in float32."""

    def total(rows):
        rows = torch.tensor(rows, dtype=torch.float64) * 1e30
        return released(uplinks_of(rows[:, :3], rows[:, 3:]), expected=1)[0]

    without, with_me = total(others), total([*others, mine])
    for path, bound in (("weights/params/w", 2.0), ("control/w", 10.0)):
        assert float((with_me[path] - without[path]).norm()) <= bound * (1 + 1e-6)


@pytest.mark.parametrize("n", [0, 3])
@pytest.mark.parametrize("quantile", [None, 0.5])
def test_the_noise_has_the_stated_size_and_does_not_depend_on_who_takes_part(n, quantile):
    width, z, m = 20_000, 1.5, 40
    uplinks = uplinks_of(torch.zeros(n, width), torch.zeros(n, width)) if n else none_of(width)
    noisy = {"noise": z, "expected": m, "quantile": quantile}
    mean, _ = released(uplinks, scale=3.0, **noisy)
    count_deviation = max(m / 20, z)
    more = 1.0 if quantile is None else z**-1 / math.sqrt(z**-2 - (2 * count_deviation) ** -2)
    for path, bound in (("weights/params/w", 2.0), ("control/w", 10.0)):
        expected = more * z * math.sqrt(2) * 3.0 * bound / m  # two groups
        assert float(mean[path].std()) == pytest.approx(expected, rel=0.03)
        assert abs(float(mean[path].mean())) < 4 * expected / math.sqrt(width)
    cosine = torch.cosine_similarity(mean["weights/params/w"], mean["control/w"], dim=0)
    next_round, _ = released(uplinks, number=1, **noisy)
    again = torch.cosine_similarity(mean["control/w"], next_round["control/w"], dim=0)
    assert max(abs(cosine), abs(again)) < 0.04  # groups and rounds have different noise


@pytest.mark.parametrize(("start", "end"), [(0.1, 1.401), (10.0, 1.496)])
def test_adaptive_clipping_finds_the_quantile(start, end):
    """Ten clients have the norms 1.0, 1.1, ..., 1.9 for 60 rounds. The clipping norm moves towards the median from both sides."""
    norms = torch.linspace(1.0, 1.9, 10, dtype=torch.float64)[:, None]
    uplinks, scale = uplinks_of(norms, norms * 0), 1.0
    for _ in range(60):
        _, scale = released(uplinks, scale, bounds={"weights": start, "control": start}, expected=10, quantile=0.5)
    assert scale * start == pytest.approx(end, abs=5e-4)


def test_the_noise_is_announced_in_units_of_the_bound():
    one = NoisySum(noise=1.0, bounds={"weights": 0.3}, expected=10)
    assert one.noise_to_bound(582_000) == pytest.approx(76.3, abs=0.1)


# what it spends


def test_epsilon_of_poisson_cohorts():
    """Compare with PLD values. Koskela et al. publish delta(eps=1)=4.2435e-6 for the first, and Opacus PRV gives 4.795 for the second."""
    assert Releases(4.0, 0.01, 1e-5).epsilon(10_000) == pytest.approx(0.9470, rel=1e-3)
    assert Releases(4.0, 0.01, 4.2435e-6).epsilon(10_000) == pytest.approx(1.0, rel=1e-3)
    assert Releases(1.0, 0.1, 1e-3).epsilon(100) == pytest.approx(4.7844, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("z", "n", "epsilon"), [(1.3, 3515, 0.8645), (1.1, 14_062, 2.3817), (0.7, 10_546, 5.6394)])
def test_epsilon_of_the_mnist_tutorial(z, n, epsilon):
    """TF Privacy's moments give the looser values 1.19, 3.01 and 7.10. Opacus PRV gives 2.3917 for the second."""
    assert Releases(z, 256 / 60_000, 1e-5).epsilon(n) == pytest.approx(epsilon, rel=1e-3)


def test_epsilon_of_known_cohorts_is_that_of_the_gaussian_mechanism():
    """Compare with the exact values of Balle and Wang, ICML 2018."""
    assert Releases(1.0, 1.0, 1e-5).epsilon_known(1) == pytest.approx(4.37718, rel=1e-5)
    assert Releases(1.0, 0.3, 1e-3).epsilon_known(100) == pytest.approx(80.0325, rel=1e-5)
    assert Releases(1.0, 0.1, 1e-3).epsilon_known(20) == pytest.approx(23.0635, rel=1e-5)
    whole = Releases(2.0, 1.0, 1e-3)
    assert whole.epsilon(7) == whole.epsilon_known(7)


def test_nothing_and_no_noise():
    assert Releases(1.0, 0.1, 1e-3).epsilon(0) == Releases(1.0, 0.1, 1e-3).epsilon_known(0) == 0
    assert Releases(0.0, 0.1, 1e-3).epsilon(3) == Releases(0.0, 0.1, 1e-3).epsilon_known(3) == math.inf


def test_the_rounds_within_a_budget():
    whole = Releases(2.0, 1.0, 1e-3)
    assert [whole.within(budget, 9) for budget in (whole.epsilon(4), whole.epsilon(4) - 1e-9, 99.0, 0.1)] == [
        4,
        3,
        9,
        0,
    ]


def test_the_noise_for_a_budget_is_the_smallest():
    noise = noise_for(2.0, 1.0, 1e-3, 10)
    assert Releases(noise, 1.0, 1e-3).epsilon(10) <= 2.0 < Releases(noise - 0.01, 1.0, 1e-3).epsilon(10)


@pytest.mark.slow
def test_the_noise_for_a_budget_of_poisson_cohorts():
    assert noise_for(2.0, 0.1, 1e-3, 100) == pytest.approx(1.674, abs=2e-3)
