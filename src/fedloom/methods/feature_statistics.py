"""Means and variances of features by class: their collection over examples, their combination over clients, and sampling from them.

A variance is always a variance within classes. It has one of three forms: `pooled` has one number per feature (p,), `class` has one number
per class and feature (Y, p), and `full` is a covariance matrix (p, p) for all classes. A spread is the square root of a variance: standard
deviations, or for `full` the lower triangular factor of the matrix. All functions are safe under `torch.func.vmap`, except
`standard_deviations` of a `full` variance.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fedloom import losses
from fedloom.tree import Tree

Form = Literal["pooled", "class", "full"]


def shape(form: Form, n_classes: int, width: int) -> tuple[int, ...]:
    """Return the shape of a variance."""
    return {"pooled": (width,), "class": (n_classes, width), "full": (width, width)}[form]


def no_sums(n_classes: int, width: int) -> Tree:
    """Return zero counts (Y,) and sums of vectors by class (Y, p), in float64."""
    counts = torch.zeros(n_classes, dtype=torch.float64)
    return {"counts": counts, "sums": counts.new_zeros(n_classes, width)}


def add_sums(found: Tree, vectors: Tensor, labels: Tensor) -> Tree:
    """Return the counts and sums after adding the vectors (B, p) of examples with these labels (B,)."""
    member = losses.one_hot(labels, len(found["counts"])).double()
    return {"counts": found["counts"] + member.sum(0), "sums": found["sums"] + member.T @ vectors.double()}


def held_means(found: Tree, dtype: torch.dtype) -> Tensor:
    """Return the mean vectors (C_k, p) of the classes that have examples, in the order of the classes."""
    held = found["counts"] > 0
    means: Tensor = found["sums"][held] / found["counts"][held, None]
    return means.to(dtype)


def count_fault(counts: Tensor, class_counts: Tensor | None) -> str:
    """Return a message if a client's numbers of examples (Y,) are impossible, and an empty string otherwise.

    A number is impossible if it is negative, is not an integer, or exceeds that in `class_counts` (None: not known).
    """
    if bool(((counts < 0) | (counts != counts.round())).any()):
        return "'counts' has a number that is negative or not an integer"
    if class_counts is not None and bool((counts > class_counts).any()):
        return "'counts' has more examples of a class than the client has"
    return ""


def zeros(form: Form, n_classes: int, width: int) -> Tree:
    """Return zero counts (Y,), sums (Y, p) and squares. They are in float64, because a variance is a small difference of large numbers."""
    found = no_sums(n_classes, width)
    return found | {"squares": found["counts"].new_zeros(shape(form, n_classes, width))}


def add_features(found: Tree, features: Tensor, labels: Tensor, form: Form) -> Tree:
    """Add the features (B, p) of examples with these labels (B,) to the accumulated statistics."""
    z, member = features.double(), losses.one_hot(labels, len(found["counts"])).double()
    squares = z.T @ z if form == "full" else member.T @ z.square() if form == "class" else z.square().sum(0)
    return {
        "counts": found["counts"] + member.sum(0),
        "sums": found["sums"] + member.T @ z,
        "squares": found["squares"] + squares,
    }


def within(found: Tree, form: Form) -> Tensor:
    """Return the variance of the examples around their class means, in float64; 0 if there are no examples."""
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


def counts_fault(counts: Tensor, class_counts: Tensor | None) -> str:
    """Return a message if the counts (Y,) of an uplink are not `class_counts` (None: not known) or are negative, and "" otherwise."""
    known = class_counts is None or torch.equal(counts.double(), class_counts.double())
    return "" if known and bool((counts >= 0).all()) else "'counts' are not the client's numbers of examples"


def variance_fault(variance: Tensor, form: Form) -> str:
    """Return the reason why a client's variance is impossible, or "".

    A full covariance may be slightly negative or asymmetric from rounding.
    """
    if form != "full":
        return "'variance' has a negative number" if bool((variance < 0).any()) else ""
    slack = 1e-4 * variance.abs().max()
    if bool((variance.diagonal() < -slack).any()):
        return "'variance' has a negative number on its diagonal"
    return "'variance' is not symmetric" if bool(((variance - variance.T).abs() > slack).any()) else ""


def total_variance(inside: Tensor, local: Tensor, means: Tensor, weights: Tensor, form: Form) -> Tensor:
    """Apply the law of total variance over clients: the mean of their variances plus the variance of their class means.

    Args:
        inside: the clients' variances (K, ...).
        local: the clients' class means (K, Y, p).
        means: the weighted means of the class means (Y, p).
        weights: each client's weight in each class (K, Y); 0 if the client has no examples of the class.
    """
    away = (local - means) * (weights > 0)[:, :, None]
    if form == "class":
        shares = weights / weights.sum(0).clamp(min=1)
        return (shares[:, :, None] * (inside + away.square())).sum(0)
    shares = weights / weights.sum()
    if form == "full":
        return torch.einsum("ky,kpq->pq", shares, inside) + torch.einsum("ky,kyp,kyq->pq", shares, away, away)
    return torch.einsum("ky,kp->p", shares, inside) + torch.einsum("ky,kyp->p", shares, away.square())


def raw_squares(variance: Tensor, means: Tensor, weights: Tensor, form: Form) -> Tensor:
    """Return a client's weighted sum of squared features, with the shape of its variance. These sums can be added over clients.

    Args:
        variance: the client's variance.
        means: the client's class means (Y, p).
        weights: the client's weight in each class (Y,); 0 if the client has no examples of the class.
    """
    if form == "class":
        return weights[:, None] * (variance + means.square())
    return weights.sum() * variance + _of_means(means, weights, form)


def variance_of(squares: Tensor, means: Tensor, weights: Tensor, form: Form) -> Tensor:
    """Invert `raw_squares` for totals over clients: return the variance around the class means, without negative variances.

    The arguments are those of `raw_squares`, but as totals over clients; `means` are the class means of all clients together. A class with
    weight 0 has variance 0.
    """
    if form == "class":
        held = (weights > 0)[:, None]
        return held * (squares / torch.where(held, weights[:, None], 1) - means.square()).clamp(min=0)
    variance = (squares - _of_means(means, weights, form)) / weights.sum().clamp(min=1)
    if form == "pooled":
        return variance.clamp(min=0)
    values, vectors = torch.linalg.eigh((variance + variance.T) / 2)
    positive: Tensor = vectors * values.clamp(min=0) @ vectors.T
    return positive


def _of_means(means: Tensor, weights: Tensor, form: Form) -> Tensor:
    weighted = weights[:, None] * means
    return weighted.T @ means if form == "full" else (weighted * means).sum(0)


def standard_deviations(variance: Tensor, floor: float, form: Form) -> Tensor:
    """Return the standard deviations, which are at least `floor`; for `full`, return the Cholesky factor of the covariance.

    For `full`, the square of the floor is first added to the diagonal, so that standard deviations are at least about `floor`. If a
    covariance was rounded in transit, it may have negative eigenvalues, which are set to 0.
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
    """Return the standard deviations for these labels, (p,) or (B, p). A full covariance matrix is not factorised."""
    if form == "full":
        return (variance.diagonal() + floor**2).sqrt()
    return deviations(standard_deviations(variance, floor, form), labels, form)


def deviations(spread: Tensor, labels: Tensor, form: Form) -> Tensor:
    """Return the standard deviations for these labels, (p,) or (B, p). For `full`, they are derived from the covariance's diagonal."""
    if form == "class":
        return spread[labels]
    return spread.square().sum(1).sqrt() if form == "full" else spread


def scaled(noise: Tensor, spread: Tensor, labels: Tensor, form: Form) -> Tensor:
    """Return the standard normal noise (B, p), scaled by the spread."""
    return noise @ spread.T if form == "full" else noise * deviations(spread, labels, form)


def class_means(features: Tensor, labels: Tensor, n_classes: int) -> tuple[Tensor, Tensor]:
    """Return the mean features of each class (Y, p), 0 for a class without examples, and 1 or 0 for whether the class has examples (Y,)."""
    member = losses.one_hot(labels, n_classes).to(features.dtype)
    counts = member.sum(0)
    return member.T @ features / counts.clamp(min=1)[:, None], (counts > 0).to(features.dtype)


def among(exists: Tensor, choice: Tensor) -> Tensor:
    """Map numbers in [0, 1] to classes (S,), uniformly over the classes that exist; return class 0 if none exists."""
    place = exists.cumsum(0)  # rank of each class among the existing classes, from 1
    wanted = torch.minimum((choice * place[-1]).floor(), place[-1] - 1)
    return (place <= wanted[:, None]).sum(1)
