"""A linear classifier on the features that clients share. It is fitted exactly from sums that every client sends once.

Let F (n, D) be the features of a client's n training examples and Y (n, C) their one-hot classes. The client sends F'F, F'Y and the number
of examples of each class. The totals over clients determine the ridge classifier on the standardised features of all examples. The sums
are integers, in multiples of 1 / UNIT. Their total is therefore the same in every order, and secure aggregation, which adds integers, can
hide each client's own sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fedloom.objectives import UNIT, Score
from fedloom.tree import Tree
from fedloom.wire.messages import BLANK, encode

PENALTY = 1e-3
"""Ridge penalty, relative to the mean square of a standardised feature, which is 1."""
KEY = "shared_head"
"""The entry of a downlink that contains the classifier: `weight` (D, C) and `bias` (C,), in float64."""


def feature_sums(features: Tensor, labels: Tensor, n_classes: int, n_clients: int) -> Score:
    """Return a client's sums: `gram`, the upper triangle of F'F (D (D + 1) / 2,), `cross`, F'Y (D * C,), and `rows`, class counts (C,).

    `bad` is 1 if a feature is not finite, or is so large that the sums over `n_clients` clients could exceed 64 bits. All other sums,
    except `rows`, are then 0.
    """
    f = features.flatten(1).double()
    member = torch.nn.functional.one_hot(labels.to(f.device), n_classes).to(f.dtype)
    above = torch.triu_indices(f.shape[1], f.shape[1], device=f.device)
    sums = {"gram": (f.T @ f)[above[0], above[1]], "cross": (f.T @ member).flatten()}
    limit = 2.0**62 / (UNIT * n_clients)
    bad = not all(bool((value.abs() < limit).all()) for value in sums.values())  # NaN is not below the limit
    whole = {name: (value * (UNIT * (not bad))).nan_to_num(0).round().to(torch.int64) for name, value in sums.items()}
    found = whole | {"rows": member.sum(0).to(torch.int64), "bad": torch.tensor([int(bad)])}
    return Score({name: value.cpu().numpy() for name, value in found.items()})


def feature_sums_bytes(sums: Score) -> int:
    """Return the size in bytes of the message with one client's sums."""
    flat = {name: torch.from_numpy(value) for name, value in sums.sums.items()}
    return len(encode({KEY: flat}, **BLANK))


def fitted_head(sums: Score) -> Tree | None:
    """Return the classifier that the sums of all clients determine: {"weight": (D, C), "bias": (C,)}, in float64.

    It minimises the mean squared error of the one-hot classes plus PENALTY times the squared norm of the weights of the standardised
    features. The bias has no penalty. Return None if there are no examples, or if a client's features were not usable.
    """
    counts = torch.from_numpy(sums["rows"]).double()
    n, c = counts.sum(), len(counts)
    if not n or sums["bad"].any():
        return None
    cross = torch.from_numpy(sums["cross"]).double().view(-1, c) / UNIT
    d = len(cross)
    gram = torch.zeros(d, d, dtype=torch.float64)
    above = torch.triu_indices(d, d)
    gram[above[0], above[1]] = torch.from_numpy(sums["gram"]).double() / UNIT
    gram = gram + gram.triu(1).T
    mean, rates = cross.sum(1) / n, counts / n
    covariance = gram / n - mean[:, None] * mean
    scale = covariance.diagonal().clamp(min=0).sqrt()
    scale = torch.where(scale > 1e-6 * (1 + mean.abs()), scale, torch.inf)  # a constant feature gets weight 0
    square = covariance / scale[:, None] / scale + PENALTY * torch.eye(d, dtype=torch.float64)
    target = (cross / n - mean[:, None] * rates) / scale[:, None]
    weight = torch.linalg.solve(square, target) / scale[:, None]
    return {"weight": weight, "bias": rates - mean @ weight}


def head_outputs(features: Tensor, head: Tree) -> Tensor:
    """Return the classifier's outputs (n, C), in float64."""
    weight: Tensor = head["weight"]
    outputs: Tensor = features.flatten(1).double() @ weight + head["bias"]
    return outputs


def summed(parts: Sequence[Score]) -> Score:
    """Return the total of several clients' sums."""
    return Score({name: np.sum([part[name] for part in parts], axis=0) for name in parts[0].sums})
