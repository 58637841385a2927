"""Means and spreads of features by class: collected over rows, combined over clients, drawn from.

A variance is always one within classes, in one of three forms: `pooled`, one number per feature (p,); `class`, one per class
and feature (Y, p); `full`, a covariance matrix (p, p) for all classes. A spread is its square root: standard deviations, or
for `full` the lower triangular factor of the matrix. All functions are safe under `torch.func.vmap`, but for `spread_of` of a `full`
variance.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fedloom import losses
from fedloom.tree import Tree

Form = Literal["pooled", "class", "full"]


def shape(form: Form, n_classes: int, width: int) -> tuple[int, ...]:
    """The shape of a variance."""
    return {"pooled": (width,), "class": (n_classes, width), "full": (width, width)}[form]


def zeros(form: Form, n_classes: int, width: int) -> Tree:
    """No rows yet: counts (Y,), sums (Y, p) and squares, in float64, since a variance is a small difference of large numbers."""
    counts = torch.zeros(n_classes, dtype=torch.float64)
    squares = counts.new_zeros(shape(form, n_classes, width))
    return {"counts": counts, "sums": counts.new_zeros(n_classes, width), "squares": squares}


def add_features(found: Tree, features: Tensor, labels: Tensor, form: Form) -> Tree:
    """What was found, and these rows (B, p) with their classes (B,)."""
    z, member = features.double(), losses.one_hot(labels, len(found["counts"])).double()
    squares = z.T @ z if form == "full" else member.T @ z.square() if form == "class" else z.square().sum(0)
    return {
        "counts": found["counts"] + member.sum(0),
        "sums": found["sums"] + member.T @ z,
        "squares": found["squares"] + squares,
    }


def within(found: Tree, form: Form) -> Tensor:
    """The variance about the rows' own class means, in float64; 0 where there are no rows."""
    counts: Tensor = found["counts"].clamp(min=1)[:, None]
    sums: Tensor = found["sums"]
    squares: Tensor = found["squares"]
    n: Tensor = found["counts"].sum().clamp(min=1)
    means = sums / counts
    if form == "full":
        return (squares - sums.T @ means) / n
    if form == "class":
        return (squares / counts - means.square()).clamp(min=0)
    return ((squares - (sums * means).sum(0)) / n).clamp(min=0)


def total_variance(inside: Tensor, local: Tensor, means: Tensor, weights: Tensor, form: Form) -> Tensor:
    """The law of total variance over clients: the mean of their variances plus the variance of their class means.

    Args:
        inside: (K, ...), the clients' variances.
        local: (K, Y, p), their class means.
        means: (Y, p), the weighted means of these.
        weights: (K, Y), how much each client counts in each class; 0 where it has no rows.
    """
    away = (local - means) * (weights > 0)[:, :, None]
    if form == "class":
        shares = weights / weights.sum(0).clamp(min=1)
        return (shares[:, :, None] * (inside + away.square())).sum(0)
    shares = weights / weights.sum()
    if form == "full":
        return torch.einsum("ky,kpq->pq", shares, inside) + torch.einsum("ky,kyp,kyq->pq", shares, away, away)
    return torch.einsum("ky,kp->p", shares, inside) + torch.einsum("ky,kyp->p", shares, away.square())


def standard_deviations(variance: Tensor, floor: float, form: Form) -> Tensor:
    """The square root, with standard deviations of at least `floor` (of at least about that for `full`: its square is added).

    A covariance that was rounded on its way may have negative eigenvalues; they count as 0.
    """
    if form != "full":
        return variance.sqrt().clamp(min=floor)
    matrix = variance.double()
    least = floor**2 * torch.eye(len(variance), dtype=torch.float64, device=variance.device)
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(matrix + least)
    if failed:
        values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
        factor = torch.linalg.cholesky(vectors * values.clamp(min=0) @ vectors.T + least)
    return factor.to(variance.dtype)


def own_deviations(variance: Tensor, floor: float, labels: Tensor, form: Form) -> Tensor:
    """The standard deviations of `spread_of` for rows of these classes, (p,) or (B, p), without the factor of a whole matrix."""
    if form == "full":
        return (variance.diagonal() + floor**2).sqrt()
    return deviations(standard_deviations(variance, floor, form), labels, form)


def deviations(spread: Tensor, labels: Tensor, form: Form) -> Tensor:
    """The standard deviations for rows of these classes: (p,) or (B, p); for `full` those on the diagonal."""
    if form == "class":
        return spread[labels]
    return spread.square().sum(1).sqrt() if form == "full" else spread


def scaled(noise: Tensor, spread: Tensor, labels: Tensor, form: Form) -> Tensor:
    """Standard normal noise (B, p) with that spread."""
    return noise @ spread.T if form == "full" else noise * deviations(spread, labels, form)


def class_means(features: Tensor, labels: Tensor, n_classes: int) -> tuple[Tensor, Tensor]:
    """The mean of each class's rows (Y, p), 0 without rows, and 1 where it has rows, else 0 (Y,)."""
    member = losses.one_hot(labels, n_classes).to(features.dtype)
    counts = member.sum(0)
    return member.T @ features / counts.clamp(min=1)[:, None], (counts > 0).to(features.dtype)


def among(exists: Tensor, choice: Tensor) -> Tensor:
    """Classes (S,) drawn evenly from those that exist, by numbers in [0, 1]; class 0 where none exists."""
    place = exists.cumsum(0)  # of a class among those that exist, from 1
    wanted = torch.minimum((choice * place[-1]).floor(), place[-1] - 1)
    return (place <= wanted[:, None]).sum(1)
