"""FedRIR with matched class moments: the federation's moments, the distance, and what it trains."""

import numpy as np
import pytest
import torch

from fedloom import FedRIRMoments, Round, Stream
from fedloom.method import Arrival
from fedloom.methods.fedrir_moments import moment_distance
from small import spied


@pytest.fixture(autouse=True)
def _wide(float64):
    """Run all tests of this file in float64."""


def moments_of(z, y, n_classes):
    """Compute counts, means and variances by class with NumPy."""
    z, y = z.numpy(), y.numpy()
    held = [z[y == c] for c in range(n_classes)]
    zero = np.zeros(z.shape[1])
    return {
        "counts": torch.tensor([float(len(part)) for part in held]),
        "means": torch.tensor(np.stack([part.mean(0) if len(part) else zero for part in held])),
        "variances": torch.tensor(np.stack([part.var(0) if len(part) else zero for part in held])),
    }


def test_the_federations_moments_are_those_of_all_examples():
    z, y = Stream(0).normal((60, 3)) * 2 + 1, Stream(1).integers(3, (60,))
    parts = [slice(0, 10), slice(10, 25), slice(25, 60)]
    weights = {"weights": {"params": {"gfe.w": torch.zeros(2)}, "buffers": {}}}
    uplinks = [weights | {"moments": moments_of(z[part], y[part], 5)} for part in parts]
    old = {"counts": torch.ones(5), "means": torch.full((5, 3), 7.0), "variances": torch.full((5, 3), 8.0)}
    round = Round(0, 3, tuple(Arrival(k, k, 1 / 3) for k in range(3)), Stream(0))
    found = FedRIRMoments().aggregate(weights | {"moments": old}, uplinks, round)["moments"]
    expected = moments_of(z, y, 5)
    for name in ("means", "variances"):
        torch.testing.assert_close(found[name][:3], expected[name][:3])
        torch.testing.assert_close(found[name][3:], old[name][3:])  # no member has these classes
    assert found["counts"].tolist() == [*expected["counts"][:3].tolist(), 1, 1]


def test_the_distance_is_zero_for_equal_moments_and_grows_with_a_shift():
    z, y = Stream(0).normal((40, 3)), torch.arange(40) % 2
    moments = moments_of(z, y, 2)
    assert moment_distance(z, y, moments).item() == pytest.approx(0, abs=1e-9)
    spread = moments["variances"].mean(1)
    assert moment_distance(z + 2, y, moments).item() == pytest.approx(4 * (1 / spread).mean().item())
    wider = moments["means"][y] + 3 * (z - moments["means"][y])
    assert moment_distance(wider, y, moments).item() == pytest.approx(4, rel=0.02)  # (3 s - s)^2 / s^2
    unknown = moments | {"counts": torch.zeros(2)}
    assert moment_distance(z + 2, y, unknown).item() == 0
    assert moment_distance(z[:2] + 2, y[:2], moments).item() == 0  # one example of each class


def test_moments_travel_and_are_logged(experiment):
    run = experiment("fedrir_moments", width=12, engine="debug+bytes+sequential")
    rounds = spied(run)
    run.run()
    y = run.data.train(0)[1]
    found = rounds[0].replies[0].uplink["moments"]
    assert found["counts"].tolist() == y.bincount(minlength=10).tolist()
    assert run.server["moments"]["counts"].sum() == sum(run.data.n_train(i) for i in range(4))
    assert "classify.moments" in run.rows[-1]


def test_following_the_gradient_removes_a_shift_that_is_constant_within_a_client():
    z, y = Stream(0).normal((40, 3)), torch.arange(40) % 2
    moments = moments_of(z, y, 2)
    shift, scale = torch.full((3,), 2.0, requires_grad=True), torch.full((3,), 1.5, requires_grad=True)
    optimiser = torch.optim.SGD([shift, scale], lr=0.1)
    for _ in range(200):
        optimiser.zero_grad()
        moment_distance(z * scale + shift, y, moments).backward()
        optimiser.step()
    torch.testing.assert_close(shift.detach(), torch.zeros(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(scale.detach(), torch.ones(3), atol=1e-3, rtol=0)


def test_a_term_far_too_weak_leaves_fedrir(experiment):
    one, other = (
        experiment(name, **extra, width=12)
        for name, extra in (("fedrir", {}), ("fedrir_moments", {"method.moment_weight": 1e-30}))
    )
    for run in (one, other):
        run.run()
    assert other.rows[-1]["personal_accuracy"] == one.rows[-1]["personal_accuracy"]
    assert other.rows[-1]["classify.cross_entropy"] == pytest.approx(one.rows[-1]["classify.cross_entropy"], rel=1e-9)


@pytest.mark.parametrize(
    ("name", "value", "fault"),
    [("counts", -1.0, "negative"), ("counts", 99.0, "than the client has"), ("variances", -1.0, "negative")],
)
def test_impossible_moments_are_named(name, value, fault):
    sent = {"counts": torch.ones(2), "means": torch.zeros(2, 3), "variances": torch.ones(2, 3)}
    method = FedRIRMoments()
    assert method.uplink_fault({"moments": sent}, torch.ones(2)) == ""
    assert fault in method.uplink_fault({"moments": sent | {name: torch.full_like(sent[name], value)}}, torch.ones(2))
