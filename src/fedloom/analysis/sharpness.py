"""Sharpness of the minimum at the server's model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fedloom.analysis.subject import Subject
from fedloom.rng import Stream

Params = dict[str, Tensor]
Loss = Callable[[Params], Tensor]  # parameters -> 0-d loss

ROWS = 1000
DIRECTIONS = 5
DISTANCES = tuple(step / 10 for step in range(-10, 11))
RELATIVE = 0.1  # standard deviation of the perturbation of a weight, relative to the weight
PERTURBATIONS = 10
MOST_STEPS, TOLERANCE = 100, 1e-3  # limits of the power iteration


def measure_sharpness(subject: Subject) -> dict[str, object] | None:
    """Measure curves of the server's loss, its largest eigenvalue, and its increase under perturbations.

    The loss is measured on training examples of all clients. Return None if there is no server model.
    """
    server = subject.server()
    if server is None:
        return None
    x, y = subject.training_rows(ROWS, "sharpness")
    predictor, nets = subject.method.predictors()["server"], server.nets

    def loss(params: Params) -> Tensor:
        moved = nets.with_params(params)
        return moved.loss(predictor(moved, x, server.down, server.memory), y)

    params = _used_params(loss, nets.params)
    curves = along_directions(loss, params, subject.rng("directions"))
    top = largest_eigenvalue(loss, params, subject.rng("power"))
    return {
        "rows": len(y),
        "loss": float(loss(params)),
        "distances": list(DISTANCES),
        "curves": curves,
        "eigenvalue": top.value,
        "eigenvalue_steps": top.steps,
        "eigenvalue_converged": top.converged,
        "relative": RELATIVE,
        "loss_increase": perturbed(loss, params, subject.rng("perturbed")),
    }


def _used_params(loss: Loss, params: Mapping[str, Tensor]) -> Params:
    """Return the parameters on which the loss depends. This excludes nets that are not used for prediction."""
    live = {name: p.detach().requires_grad_() for name, p in params.items()}
    gradients = torch.autograd.grad(loss(live), list(live.values()), allow_unused=True)
    return {name: params[name] for name, gradient in zip(live, gradients, strict=True) if gradient is not None}


def direction(params: Params, rng: Stream) -> Params:
    """Draw a filter-normalised random direction (Li et al., NeurIPS 2018).

    Each filter, or row of a matrix, is scaled to the norm of the corresponding filter or row of the weights. Biases and normalisation
    layers do not change.
    """
    found = {}
    for name, weight in params.items():
        noise = rng.normal(weight.shape).to(weight.dtype)
        if weight.ndim < 2:
            found[name] = torch.zeros_like(weight)
            continue
        own, others = (t.flatten(1).norm(dim=1) for t in (weight, noise))
        ratio = own / others.clamp(min=1e-30)
        found[name] = noise * ratio.view(-1, *[1] * (weight.ndim - 1))
    return found


@torch.no_grad()
def along_directions(loss: Loss, params: Params, rng: Stream) -> list[list[float]]:
    """Return the loss at `DISTANCES` along random directions, with shape (directions, distances).

    At distance 1, each filter has moved by its own norm.
    """
    curves = []
    for k in range(DIRECTIONS):
        way = direction(params, rng.child(k))
        moved = ({name: p + distance * way[name] for name, p in params.items()} for distance in DISTANCES)
        curves.append([float(loss(there)) for there in moved])
    return curves


@torch.no_grad()
def perturbed(loss: Loss, params: Params, rng: Stream, relative: float = RELATIVE) -> float:
    """Return the mean increase of the loss when every parameter is multiplied by 1 + relative N(0, 1)."""
    here, total = float(loss(params)), 0.0
    for k in range(PERTURBATIONS):
        stream = rng.child(k)
        there = {name: p * (1 + relative * stream.normal(p.shape).to(p.dtype)) for name, p in params.items()}
        total += float(loss(there)) - here
    return total / PERTURBATIONS


class Eigenvalue(NamedTuple):
    """Result of a power iteration: the eigenvalue, the number of steps, and whether it converged."""

    value: float
    steps: int
    converged: bool


def largest_eigenvalue(loss: Loss, params: Params, rng: Stream) -> Eigenvalue:
    """Return the eigenvalue of the loss's Hessian with the largest magnitude, by power iteration with Hessian-vector products."""
    live = [p.detach().requires_grad_() for p in params.values()]
    value = loss(dict(zip(params, live, strict=True)))
    gradient = torch.autograd.grad(value, live, create_graph=True, materialize_grads=True)
    flat = torch.cat([part.flatten() for part in gradient])
    vector = rng.normal(flat.shape).to(flat.dtype)
    vector, found = vector / vector.norm(), 0.0
    for step in range(1, MOST_STEPS + 1):
        parts = torch.autograd.grad(flat @ vector, live, retain_graph=True, materialize_grads=True)
        product = torch.cat([part.flatten() for part in parts])
        before, found = found, float(vector @ product)
        length = product.norm()
        if length == 0 or abs(found - before) <= TOLERANCE * abs(found):
            return Eigenvalue(found, step, True)
        vector = product / length
    return Eigenvalue(found, MOST_STEPS, False)
