"""Optimisers as pairs of pure functions, in the manner of optax.

`init(params)` gives the whole state at once (states that grow lazily can be neither stacked nor checkpointed), and
`update(grads, state, params, scale)` gives new parameters and a new state and changes nothing in place. Parameters, gradients and
states are dictionaries of tensors by name. `scale` multiplies the learning rate (a schedule over rounds).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fedloom.tree import Tree

Params = dict[str, Tensor]


class Optimizer(NamedTuple):
    """A pair of pure functions; see the module's docstring."""

    init: Callable[[Params], Tree]
    update: Callable[[Params, Tree, Params, float], tuple[Params, Tree]]


def sgd(lr: float, momentum: float = 0.0, weight_decay: float = 0.0) -> Optimizer:
    """Stochastic gradient descent as in `torch.optim.SGD`: v <- momentum v + g + weight_decay p; p <- p - lr v."""

    def init(params: Params) -> Tree:
        return {"velocity": {name: torch.zeros_like(p) for name, p in params.items()}} if momentum else {}

    def update(grads: Params, state: Tree, params: Params, scale: float = 1.0) -> tuple[Params, Tree]:
        names, values, steps = list(params), list(params.values()), [grads[name] for name in params]
        if weight_decay:
            steps = list(torch._foreach_add(steps, values, alpha=weight_decay))
        if momentum:
            kept = torch._foreach_mul([state["velocity"][name] for name in names], momentum)
            steps = list(torch._foreach_add(kept, steps))
            state = {"velocity": dict(zip(names, steps, strict=True))}
        return dict(zip(names, torch._foreach_add(values, steps, alpha=-lr * scale), strict=True)), state

    return Optimizer(init, update)


def adam(
    lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0
) -> Optimizer:
    """Adam as in `torch.optim.Adam` (weight decay is added to the gradient); the state counts its own steps."""
    beta1, beta2 = betas

    def init(params: Params) -> Tree:
        zeros = {name: torch.zeros_like(p) for name, p in params.items()}
        return {"mean": zeros, "square": dict(zeros), "step": torch.zeros((), dtype=torch.float64)}

    def update(grads: Params, state: Tree, params: Params, scale: float = 1.0) -> tuple[Params, Tree]:
        names, values, g = list(params), list(params.values()), [grads[name] for name in params]
        if weight_decay:
            g = list(torch._foreach_add(g, values, alpha=weight_decay))
        step = state["step"] + 1
        mean = torch._foreach_lerp([state["mean"][name] for name in names], g, 1 - beta1)
        square = torch._foreach_mul([state["square"][name] for name in names], beta2)
        torch._foreach_addcmul_(square, g, g, 1 - beta2)
        spread = torch._foreach_sqrt(square)
        if step.ndim:  # several clients stacked, each with a count of its own
            moved = [
                p - lr * scale * m / _along(1 - beta1**step, m) / (s / _along((1 - beta2**step) ** 0.5, s) + eps)
                for p, m, s in zip(values, mean, spread, strict=True)
            ]
        else:
            n = float(step)
            torch._foreach_div_(spread, (1 - beta2**n) ** 0.5)
            torch._foreach_add_(spread, eps)
            moved = list(torch._foreach_addcdiv(values, mean, spread, -lr * scale / (1 - beta1**n)))
        kept = {
            "mean": dict(zip(names, mean, strict=True)),
            "square": dict(zip(names, square, strict=True)),
            "step": step,
        }
        return dict(zip(names, moved, strict=True)), kept

    return Optimizer(init, update)


def _along(factors: Tensor, values: Tensor) -> Tensor:
    """One factor per client, shaped to multiply the clients' stacked values."""
    return factors.to(values.dtype).view(-1, *[1] * (values.ndim - 1))
