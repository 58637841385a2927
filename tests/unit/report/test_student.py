"""Quantiles of the t distribution."""

import math

import pytest

from fedloom.report.student import t_quantile

TABLE = {  # two-sided 95 % and 99 %, from printed tables
    1: (12.7062, 63.6567), 2: (4.30265, 9.92484), 3: (3.18245, 5.84091), 4: (2.77645, 4.60409), 5: (2.57058, 4.03214),
    9: (2.26216, 3.24984), 10: (2.22814, 3.16927), 30: (2.04227, 2.75000), 60: (2.00030, 2.66028), 120: (1.97993, 2.61742),
}  # fmt: skip


@pytest.mark.parametrize("degrees", TABLE)
def test_quantiles_are_those_of_printed_tables(degrees):
    assert t_quantile(0.975, degrees) == pytest.approx(TABLE[degrees][0], rel=3e-6)
    assert t_quantile(0.995, degrees) == pytest.approx(TABLE[degrees][1], rel=3e-6)


def test_closed_forms_symmetry_and_limit():
    assert t_quantile(0.75, 1) == pytest.approx(1, rel=1e-13)  # Cauchy
    p = 0.9
    assert t_quantile(p, 2) == pytest.approx((2 * p - 1) / math.sqrt(2 * p * (1 - p)), rel=1e-13)
    assert t_quantile(0.1, 7) == -t_quantile(0.9, 7)
    assert t_quantile(0.5, 4) == 0
    assert t_quantile(0.975, 100_000) == pytest.approx(1.959964 + (1.959964**3 + 1.959964) / 4e5, abs=1e-6)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 12, 29, 99, 500])
def test_quantiles_are_those_of_scipy(degrees):
    special = pytest.importorskip("scipy.special")
    for p in (0.6, 0.95, 0.975, 0.999, 0.02):
        assert t_quantile(p, degrees) == pytest.approx(float(special.stdtrit(degrees, p)), rel=1e-10)


@pytest.mark.parametrize(("p", "degrees"), [(0, 3), (1, 3), (0.9, 0), (float("nan"), 3)])
def test_invalid_quantiles_are_refused(p, degrees):
    with pytest.raises(ValueError, match=f"p={p}, degrees={degrees}"):
        t_quantile(p, degrees)
