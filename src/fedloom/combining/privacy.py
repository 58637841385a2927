"""The noisy sum of clipped uplinks, for client-level differential privacy with a server that draws the noise (DP-FedAvg).

The tensors that a method only adds up are divided into groups, each with its own maximum norm (clipping norm) C_g. The groups are the
parameters (`weights`), running statistics (`buffers`) and every other part of the uplink. With G groups, a client's contribution, in units
of the clipping norms, has a norm of at most sqrt(G). A release with noise of standard deviation z sqrt(G) C_g is therefore one Gaussian
mechanism with noise multiplier z. The sum is divided by the expected number of clients, never by the number of uplinks that arrived, which
depends on who participates.

The method follows McMahan et al., ICLR 2018, and Andrew et al., NeurIPS 2021 (adaptive clipping).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedloom.combining.additive import Additive
from fedloom.rng import Stream

PARAMETERS, BUFFERS = "weights", "buffers"
RATE = 0.2  # rate at which adaptive clipping changes the norms, eta in the paper


def group_of(path: str) -> str:
    """Return the group of an additive tensor."""
    top, _, rest = path.partition("/")
    return BUFFERS if top == "weights" and rest.startswith("buffers/") else top


@dataclass(frozen=True, kw_only=True)
class NoisySum:
    """One release: clip the uplinks, add them up, add noise, and divide by the expected number of clients."""

    noise: float  # noise multiplier z
    bounds: Mapping[str, float]  # clipping norms C_g by group, at the start of the run
    expected: int  # m, the expected number of clients in a cohort
    quantile: float | None = None  # target fraction of clients whose vectors are not clipped; None: fixed norms

    def release(self, uplinks: Additive, scale: float, rng: Stream) -> tuple[dict[str, Tensor], float]:
        """Return the noisy mean by path (d,), and the scale of the next release.

        `scale` multiplies all clipping norms. The noise is drawn from `rng`. Integer tensors keep their value in the downlink.
        """
        bounds = {group: scale * bound for group, bound in self.bounds.items()}
        norms = _norms(uplinks, bounds)
        ratios = {group: norm / bounds[group] for group, norm in norms.items()}
        spread = self._deviation * math.sqrt(len(bounds))
        found = {}
        for path in uplinks.vectors:
            group = group_of(path)
            rows = uplinks.rows(path)
            kept = 1 / ratios[group].clamp(min=1.0)
            noise = torch.from_numpy(rng.numpy.standard_normal(rows.shape[1]))
            found[path] = (kept @ rows + spread * bounds[group] * noise) / self.expected
        found |= {path: uplinks.rows(path).sum(0) * 0 for path in uplinks.counters}
        return found, scale if self.quantile is None else self._next(scale, ratios, rng)

    def _next(self, scale: float, ratios: Mapping[str, Tensor], rng: Stream) -> float:
        """Return the next scale.

        It decreases if, according to a noisy count, more clients than `quantile` are within all clipping norms.
        """
        largest = torch.stack(list(ratios.values())).amax(0)
        centred = float(((largest <= 1).double() - 0.5).sum()) + self._count_deviation * rng.numpy.standard_normal()
        within = 0.5 + centred / self.expected
        return scale * math.exp(-RATE * (within - (self.quantile or 0.0)))

    @property
    def _count_deviation(self) -> float:
        """Standard deviation of the noise of the count.

        It is m / 20 as in the paper, but at least z, because a smaller deviation would require more noise in the sum.
        """
        return max(self.expected / 20, self.noise) if self.noise else 0.0

    @property
    def _deviation(self) -> float:
        """The noise multiplier of the sum, chosen such that sum and count together have the noise multiplier `noise`."""
        if self.quantile is None or not self.noise:
            return self.noise
        return 1 / math.sqrt(self.noise**-2 - (2 * self._count_deviation) ** -2)

    def noise_to_bound(self, n: int) -> float:
        """Return the norm of the noise in a mean of `n` numbers, in units of the clipping norm. Above 5 to 10, little is learnt."""
        return self._deviation * math.sqrt(len(self.bounds) * n) / self.expected


def _norms(uplinks: Additive, bounds: Mapping[str, float]) -> dict[str, Tensor]:
    """Return the norms of all clients' vectors (n,), by group."""
    squares = {group: torch.zeros(uplinks.n, dtype=torch.float64) for group in bounds}
    for path in uplinks.vectors:
        squares[group_of(path)] += uplinks.rows(path).square().sum(1)
    return {group: square.sqrt() for group, square in squares.items()}
