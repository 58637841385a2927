"""Robust rules, which combine uplinks such that a minority of malicious clients has limited influence. All clients have the same weight.

`median` and `trimmed` work on each coordinate. The other rules work on whole vectors. Their results have the form c + sum_k a_k (x_k - c),
where c is the median of each coordinate, and x_k are the uplinks and the origin. The numbers a_k depend only on inner products, so the
vectors are read twice, one tensor at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from fedloom.combining.additive import Additive
from fedloom.combining.rules import Rule

STEPS, MOVE = 100, 1e-6  # maximum Weiszfeld steps of the geometric median, and the relative move that ends them
CLIPPINGS = 3  # number of steps of centred clipping


def combine_robustly(rule: Rule, uplinks: Additive) -> dict[str, Tensor]:
    """Return the combined tensors by path (d,), in float64. Integer tensors are combined by their median."""
    if rule.name in COORDINATES:
        found = {path: COORDINATES[rule.name](uplinks.rows(path), rule.number) for path in uplinks.vectors}
    else:
        found = _combined_vectors(WEIGHTS[rule.name], rule.number, uplinks)
    return found | {path: median(uplinks.rows(path)) for path in uplinks.counters}


# By coordinate: (n, d) -> (d,)


def median(rows: Tensor, _: float = 0.0) -> Tensor:
    """Return the median of each coordinate. For an even number of values, it is the mean of the middle two."""
    n, ordered = len(rows), _ordered(rows)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2


def trimmed_mean(rows: Tensor, fraction: float) -> Tensor:
    """Return the mean without the ceil(fraction n) smallest and largest values. At least one or two values remain."""
    n = len(rows)
    cut = min(math.ceil(fraction * n - 1e-9), (n - 1) // 2)
    return _ordered(rows)[cut : n - cut].mean(0)


def _ordered(rows: Tensor) -> Tensor:
    """Return the sorted values of each coordinate. NumPy sorts many short rows five times as fast as torch, with the same result."""
    return torch.from_numpy(np.sort(np.ascontiguousarray(rows.numpy().T), axis=1)).T


# By vector: inner products (n + 1, n + 1) of x_k - c, the last of which is for the origin -> a (n + 1,)


def krum_weights(inner: Tensor, hostile: float) -> Tensor:
    """Return the weights of Krum (Blanchard et al., NeurIPS 2017), which are 1 for the uplink with the lowest score
    and 0 for the others.
    """
    return _selected(inner, _krum_scores(inner, _supported(inner, hostile)).argsort(stable=True)[:1])


def multikrum_weights(inner: Tensor, hostile: float) -> Tensor:
    """Return equal weights for the n - F uplinks with the lowest Krum scores."""
    least = _supported(inner, hostile)
    scores = _krum_scores(inner, least)
    return _selected(inner, scores.argsort(stable=True)[: len(scores) - least])


def geometric_weights(inner: Tensor, _: float) -> Tensor:
    """Return the weights of the geometric median, computed by Weiszfeld steps from the coordinate median.

    Steps from the mean, as in Pillutla et al. (2022), would not recover from very large uplinks.
    """
    a = torch.zeros(len(inner), dtype=inner.dtype)
    scale = _lower_median(_distances(inner, a))
    for _step in range(STEPS if scale else 0):
        closeness = 1 / _distances(inner, a).clamp(min=1e-6 * scale)
        before, a = a, torch.cat([closeness / closeness.sum(), a[-1:] * 0])
        moved = a - before
        if float((moved @ inner @ moved).clamp(min=0)) <= (MOVE * scale) ** 2:
            break
    return a


def norm_bound_weights(inner: Tensor, bound: float) -> Tensor:
    """Return 1/n for each uplink, or less for uplinks with more than `bound` times the median norm. The origin has the remaining weight."""
    origin = torch.zeros(len(inner), dtype=inner.dtype)
    origin[-1] = 1.0
    sizes = _distances(inner, origin)
    limit = bound * _lower_median(sizes)
    a = torch.where(sizes > limit, limit / sizes, 1.0) / len(sizes)
    return torch.cat([a, 1 - a.sum(0, keepdim=True)])


def clip_weights(inner: Tensor, bound: float) -> Tensor:
    """Return the weights of centred clipping (Karimireddy et al., ICML 2021), which starts from the coordinate median.

    A step adds the mean of the differences from the current point, each clipped to `bound` times the median of their sizes.
    """
    a = torch.zeros(len(inner), dtype=inner.dtype)
    for _step in range(CLIPPINGS):
        sizes = _distances(inner, a)
        limit = bound * _lower_median(sizes)
        kept = torch.where(sizes > limit, limit / sizes, 1.0) / len(sizes)
        a = a * (1 - kept.sum()) + torch.cat([kept, kept.new_zeros(1)])
    return a


COORDINATES: Mapping[str, Callable[[Tensor, float], Tensor]] = MappingProxyType(
    {"median": median, "trimmed": trimmed_mean}
)
WEIGHTS: Mapping[str, Callable[[Tensor, float], Tensor]] = MappingProxyType(
    {
        "krum": krum_weights,
        "multikrum": multikrum_weights,
        "geometric": geometric_weights,
        "norm-bound": norm_bound_weights,
        "clip": clip_weights,
    }
)


def _combined_vectors(
    weights: Callable[[Tensor, float], Tensor], number: float, uplinks: Additive
) -> dict[str, Tensor]:
    """Return c + sum_k a_k (x_k - c) by path."""
    centres = {path: median(uplinks.rows(path)) for path in uplinks.vectors}
    inner = torch.zeros(uplinks.n + 1, uplinks.n + 1, dtype=torch.float64)
    for path, centre in centres.items():
        away = _away(uplinks, path, centre)
        inner += away @ away.T
    a = weights(inner, number)
    return {path: centre + a @ _away(uplinks, path, centre) for path, centre in centres.items()}


def _away(uplinks: Additive, path: str, centre: Tensor) -> Tensor:
    return torch.cat([uplinks.rows(path) - centre, -centre[None]])


def _distances(inner: Tensor, a: Tensor) -> Tensor:
    """Return the distances (n,) of the n uplinks from the point c + sum_k a_k (x_k - c)."""
    from_a = torch.eye(len(inner), dtype=inner.dtype)[:-1] - a
    return ((from_a @ inner) * from_a).sum(1).clamp(min=0).sqrt()


def _supported(inner: Tensor, hostile: float) -> int:
    """Return F, or the largest F that n uplinks support. Fewer uplinks arrive after screening has excluded malicious clients."""
    return min(int(hostile), (len(inner) - 1 - 3) // 2)


def _krum_scores(inner: Tensor, hostile: int) -> Tensor:
    """Return each uplink's sum of squared distances to its n - F - 2 nearest neighbours (n,)."""
    among = inner[:-1, :-1]
    squares = among.diagonal()[:, None] + among.diagonal() - 2 * among
    squares.fill_diagonal_(math.inf)
    return squares.clamp(min=0).sort(1).values[:, : len(among) - hostile - 2].sum(1)


def _selected(inner: Tensor, chosen: Tensor) -> Tensor:
    a = torch.zeros(len(inner), dtype=inner.dtype)
    a[chosen] = 1 / len(chosen)
    return a


def _lower_median(values: Tensor) -> float:
    return float(values.median())  # torch's median is the lower median
