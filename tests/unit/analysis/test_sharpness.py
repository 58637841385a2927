"""Sharpness of functions with known answers."""

import pytest
import torch

from fedloom import Stream
from fedloom.analysis import sharpness

pytestmark = pytest.mark.usefixtures("float64")


def quadratic(eigenvalues):
    """Return half p^T A p with these eigenvalues, for p in two tensors of shapes (2, 2) and (2,)."""
    turn, _ = torch.linalg.qr(Stream("turn").normal((6, 6)))
    matrix = turn @ torch.diag(torch.tensor(eigenvalues)) @ turn.T

    def loss(params):
        p = torch.cat([params["weight"].flatten(), params["bias"]])
        return p @ matrix @ p / 2

    return loss


def point():
    return {"weight": Stream("w").normal((2, 2)), "bias": Stream("b").normal((2,))}


@pytest.mark.parametrize(
    ("eigenvalues", "expected"),
    [([9.0, 4.0, 1.0, 0.5, 0.0, -2.0], 9.0), ([3.0, 1.0, 0.1, 0.0, 0.0, -7.0], -7.0), ([0.0] * 6, 0.0)],
)
def test_the_largest_eigenvalue_of_a_quadratic(eigenvalues, expected):
    found = sharpness.largest_eigenvalue(quadratic(eigenvalues), point(), Stream(0))
    assert found.converged
    assert found.value == pytest.approx(expected, rel=2e-3)


def test_two_eigenvalues_of_one_size_do_not_settle_on_a_wrong_one():
    found = sharpness.largest_eigenvalue(quadratic([5.0, 4.99, 0.0, 0.0, 0.0, 0.0]), point(), Stream(0))
    assert 4.98 < found.value <= 5.0 + 1e-9


def test_a_direction_is_as_long_as_every_filter():
    params = {"conv": Stream(0).normal((4, 3, 5, 5)), "linear": Stream(1).normal((7, 3)), "bias": torch.ones(7)}
    way = sharpness.direction(params, Stream(2))
    assert torch.allclose(way["conv"].flatten(1).norm(dim=1), params["conv"].flatten(1).norm(dim=1))
    assert torch.allclose(way["linear"].norm(dim=1), params["linear"].norm(dim=1))
    assert not way["bias"].any()


def test_curves_of_a_quadratic_are_parabolas_through_the_loss():
    params = {"weight": Stream(0).normal((3, 4))}

    def loss(there):
        return there["weight"].square().sum() / 2

    curves = torch.tensor(sharpness.along_directions(loss, params, Stream(1)))
    assert curves.shape == (sharpness.DIRECTIONS, len(sharpness.DISTANCES))
    middle = sharpness.DISTANCES.index(0.0)
    assert torch.allclose(curves[:, middle], loss(params).expand(sharpness.DIRECTIONS))
    bend = (
        curves[:, 0] + curves[:, -1] - 2 * curves[:, middle]
    )  # the second difference of half |p + t d|^2 is |d|^2, and |d| = |p|
    assert torch.allclose(bend, params["weight"].square().sum().expand(sharpness.DIRECTIONS))


def test_the_perturbation_of_a_quadratic_adds_its_trace():
    params = {"weight": Stream(0).normal((100, 100))}
    found = sharpness.perturbed(lambda there: there["weight"].square().sum() / 2, params, Stream(1), relative=0.2)
    assert found == pytest.approx(float(0.2**2 * params["weight"].square().sum() / 2), rel=0.05)


def test_sharpness_ignores_nets_that_do_not_predict(experiment):
    from fedloom.analysis.subject import Subject

    run = experiment("ditto", rounds=1)  # its personal model does not affect the server's loss
    run.run()
    found = sharpness.measure_sharpness(Subject(run))
    assert found["eigenvalue"] != 0
    assert found["loss"] == pytest.approx(found["curves"][0][sharpness.DISTANCES.index(0.0)])
    assert sharpness.measure_sharpness(Subject(experiment("local", rounds=1))) is None
