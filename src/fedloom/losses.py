"""Losses for methods. All are safe under `torch.func.vmap` and `torch.func.grad`, and all return 0-d tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

ABSENT = -1e30
"""The logit of a class with probability 0. It is finite, so that no loss or gradient multiplies 0 by infinity."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of `logits` (B, Y) in nats. `labels` (B,) are integers below Y."""
    return F.cross_entropy(logits, labels)


def wide(values: Tensor) -> Tensor:
    """Return the values in single or higher precision.

    With `precision=bf16`, outputs have 16 bits and lose too much precision when they are squared, summed or subtracted.
    """
    return values if values.element_size() >= 4 else values.float()


def one_hot(labels: Tensor, n_classes: int) -> Tensor:
    """Return the one-hot encoding (B, Y) of the labels (B,), in the default dtype."""
    return (labels[:, None] == torch.arange(n_classes, device=labels.device)).to(torch.get_default_dtype())


def kl_divergence(logits: Tensor, targets: Tensor) -> Tensor:
    """Return KL(softmax(targets) || softmax(logits)) (B,) of each example in nats.

    Both arguments are logits (B, Y). No gradient flows through `targets`.
    """
    target = wide(targets).detach().log_softmax(1)
    return (target.exp() * (target - wide(logits).log_softmax(1))).sum(1)


def without_true(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the logits (B, Y) with `ABSENT` as the logit of each example's true class. `labels` has shape (B,)."""
    true = labels[:, None] == torch.arange(logits.shape[1], device=logits.device)
    return torch.where(true, ABSENT, logits)


def squared_distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tensor:
    """Return the squared Euclidean distance between `a` and `b` over all tensor names that both contain (at least one)."""
    common = [name for name in a if name in b]
    if not common:
        raise ValueError("squared_distance needs at least one name that both inputs share")
    return torch.stack([(a[name] - b[name]).square().sum() for name in common]).sum()


def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return KL(N(mean, exp(log_variance)) || N(0, 1)) in nats, summed over features and averaged over the batch; both are (B, D)."""
    mean, log_variance = wide(mean), wide(log_variance)
    return -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(1).mean()


def gaussian_kl_by_feature(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return KL(N(mean, exp(log_variance)) || N(0, 1)) in nats for each feature, averaged over the batch (D,); both are (B, D)."""
    mean, log_variance = wide(mean), wide(log_variance)
    return -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).mean(0)


def gaussian_nll(mean: Tensor, log_variance: Tensor, target: Tensor) -> Tensor:
    """Return -log N(target; mean, exp(log_variance)) without its constant, in nats, averaged over batch and features; all are (B, D)."""
    mean, log_variance, target = wide(mean), wide(log_variance), wide(target)
    return 0.5 * ((target - mean).square() / log_variance.exp() + log_variance).mean()


def vclub(mean: Tensor, log_variance: Tensor, target: Tensor, other: Tensor | None = None) -> Tensor:
    """Return vCLUB, the variational contrastive log-ratio upper bound on the mutual information (Cheng et al., ICML 2020).

    The bound measures how much better q(target_i | input_i) explains its own target than the targets of other examples. It is mean_i [log
    q(c_i | g_i) - mean_j log q(c_j | g_i)], in nats per feature (a mean over the D features; multiply it by D to obtain the whole bound).
    It is about 0 for independent variables and positive for dependent variables. If q is poor, it is negative.

    Args:
        mean, log_variance: q's prediction for each example (B, D).
        target: the true values c_i (B, D).
        other: indices j (B,), one drawn per example (the paper's sampled bound); None means all examples.
    """
    mean, log_variance, target = wide(mean), wide(log_variance), wide(target)
    own = (mean - target).square()
    # mean_j (m - c_j)^2 = (m - E c)^2 + Var c: no (B, B, D) tensor is needed
    every = (mean - target.mean(0)).square() + target.var(0, correction=0)
    rest = every if other is None else (mean - target[other]).square()
    return ((rest - own) / (2 * log_variance.exp())).mean()


def within_classes(values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return values (B, D) minus their class means in the batch, and the variances of their classes in the batch (B, D).

    `labels` are classes (B,). For a class with one example, the differences and variances are 0.
    """
    values = wide(values)
    same = (labels[:, None] == labels).to(values.dtype)
    shares = same / same.sum(1, keepdim=True)
    away = values - shares @ values
    return away, shares @ away.square()


def vclub_within(mean: Tensor, log_variance: Tensor, target: Tensor, labels: Tensor) -> Tensor:
    """Return vCLUB within classes: a bound on the mutual information given the class, in nats per feature (see `vclub`).

    Here, the other examples are those of the same class in the batch. `mean` and `log_variance` predict `target` minus its class mean, so
    information about the class does not increase the bound. All three are (B, D). For `labels`, see `within_classes`.
    """
    mean, log_variance = wide(mean), wide(log_variance)
    away, variance = within_classes(target, labels)
    rest = mean.square() + variance  # mean_j (m - c_j)^2 over the class; the mean of the centred targets is 0
    return ((rest - (mean - away).square()) / (2 * log_variance.exp())).mean()


def standardised(values: Tensor) -> Tensor:
    """Return the values (B, D), scaled to mean 0 and standard deviation 1 over the batch. A constant feature becomes 0."""
    values = wide(values)
    away = values - values.mean(0)
    return away / away.square().mean(0).sqrt().clamp(min=1e-6)


def class_decorrelation(a: Tensor, b: Tensor, labels: Tensor, n_classes: int) -> Tensor:
    """Return a measure of the correlation of `a` and `b` within classes: ||Cov(a', b')||^2 / (D mean(a'^2) mean(b'^2)).

    Here, a' = a - mean_y a and b' = b - mean_y b, where mean_y is the mean over the examples of the same class in the batch, and the norm
    is the Frobenius norm. The measure does not depend on the scale of `a` or `b`. It is 0 if they are uncorrelated within every class, 1
    if they are equal and white, and D if a single factor determines all features. Correlation that is explained by the class is not
    counted.

    Args:
        a, b: features (B, D).
        labels: integers (B,) below `n_classes`. A class with one example contributes nothing.
        n_classes: number of classes Y.
    """
    member = one_hot(labels, n_classes).to(wide(a).dtype)
    counts = member.sum(0).clamp(min=1)[:, None]
    a, b = (value - member @ (member.T @ value / counts) for value in (wide(a), wide(b)))
    scale = a.shape[1] * a.square().mean() * b.square().mean()
    return (a.T @ b / len(a)).square().sum() / scale.clamp(min=1e-12)
