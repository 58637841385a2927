"""Quantiles of Student's t distribution, so that tables with intervals do not need SciPy."""

from __future__ import annotations

import math

BISECTIONS = 60  # number of bisections of (0, pi/2), which is sufficient for the precision of a float


def t_quantile(p: float, degrees: int) -> float:
    """Return the quantile `p`, with 0 < p < 1, of the t distribution with an integer number of degrees of freedom."""
    if not 0 < p < 1 or degrees < 1:
        raise ValueError(f"p={p}, degrees={degrees}: p must be between 0 and 1, and degrees at least 1")
    low, high = 0.0, math.pi / 2
    wanted = abs(2 * p - 1)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < wanted else (low, middle)
    return math.copysign(math.sqrt(degrees) * math.tan((low + high) / 2), p - 0.5) if wanted else 0.0


def _within(angle: float, degrees: int) -> float:
    """Return P(|T| < t) for t = sqrt(degrees) tan(angle), by Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(1 + odd, degrees, 2):
        total += term
        term *= cosine * cosine * k / (k + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
