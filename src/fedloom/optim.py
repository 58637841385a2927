"""Optimisers as pairs of functions without hidden state, as in the optax library.

`init(params)` returns the complete state at once, because a state that is created lazily can be neither stacked nor checkpointed.
`step(grads, state, params, scale)` updates parameters and state in place; `update` returns updated copies instead. Parameters, gradients
and states are dictionaries of tensors by name. `scale` multiplies the learning rate, for a schedule over rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedloom import tree
from fedloom.rng import Stream
from fedloom.tree import Tree

Params = dict[str, Tensor]


class Optimizer(NamedTuple):
    """A pair of functions; see the module's docstring."""

    init: Callable[[Params], Tree]
    step: Callable[[Params, Tree, Params, float], None]
    plain_lr: float | None = None  # the learning rate, if a step is exactly p <- p - lr scale g

    def update(self, grads: Params, state: Tree, params: Params, scale: float = 1.0) -> tuple[Params, Tree]:
        """Return new parameters and a new state; change nothing in place."""
        params, state = tree.clone(params), tree.clone(state)
        self.step(grads, state, params, scale)
        return params, state


def sgd(lr: float, momentum: float = 0.0, weight_decay: float = 0.0) -> Optimizer:
    """Return stochastic gradient descent as in `torch.optim.SGD`: v <- momentum v + g + weight_decay p; p <- p - lr v."""

    def init(params: Params) -> Tree:
        return {"velocity": {name: torch.zeros_like(p) for name, p in params.items()}} if momentum else {}

    def step(grads: Params, state: Tree, params: Params, scale: float = 1.0) -> None:
        values, moves = list(params.values()), [grads[name] for name in params]
        if not values:
            return
        if weight_decay:
            moves = list(torch._foreach_add(moves, values, alpha=weight_decay))
        if momentum:
            velocity = [state["velocity"][name] for name in params]
            torch._foreach_mul_(velocity, momentum)
            torch._foreach_add_(velocity, moves)
            moves = velocity
        torch._foreach_add_(values, moves, alpha=-lr * scale)

    return Optimizer(init, step, None if momentum or weight_decay else lr)


def adam(
    lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0
) -> Optimizer:
    """Return Adam as in `torch.optim.Adam` (weight decay is added to the gradient). The state includes the number of steps."""
    beta1, beta2 = betas

    def init(params: Params) -> Tree:
        mean, square = ({name: torch.zeros_like(p) for name, p in params.items()} for _ in range(2))
        return {"mean": mean, "square": square, "step": torch.zeros((), dtype=torch.float64)}

    def step(grads: Params, state: Tree, params: Params, scale: float = 1.0) -> None:
        values, g = list(params.values()), [grads[name] for name in params]
        if weight_decay:
            g = list(torch._foreach_add(g, values, alpha=weight_decay))
        mean, square = ([state[moment][name] for name in params] for moment in ("mean", "square"))
        count = state["step"].add_(1)
        torch._foreach_lerp_(mean, g, 1 - beta1)
        torch._foreach_mul_(square, beta2)
        torch._foreach_addcmul_(square, g, g, 1 - beta2)
        spread = torch._foreach_sqrt(square)
        if count.ndim:  # several stacked clients, each with its own step count
            for p, m, s in zip(values, mean, spread, strict=True):
                p.sub_(lr * scale * m / _along(1 - beta1**count, m) / (s / _along((1 - beta2**count) ** 0.5, s) + eps))
            return
        n = float(count)
        torch._foreach_div_(spread, (1 - beta2**n) ** 0.5)
        torch._foreach_add_(spread, eps)
        torch._foreach_addcdiv_(values, mean, spread, -lr * scale / (1 - beta1**n))

    return Optimizer(init, step)


def clamped(inner: Optimizer, low: float, high: float) -> Optimizer:
    """Return an optimiser that takes a step of `inner` and then clamps every parameter to [low, high]."""

    def step(grads: Params, state: Tree, params: Params, scale: float = 1.0) -> None:
        inner.step(grads, state, params, scale)
        torch._foreach_clamp_min_(list(params.values()), low)
        torch._foreach_clamp_max_(list(params.values()), high)

    return Optimizer(inner.init, step)


def by_net(optimizers: Mapping[str, Optimizer]) -> Optimizer:
    """Return an optimiser that updates the parameters of each net with the optimiser under the net's name in `optimizers`."""

    def parts(tensors: Params) -> dict[str, Params]:
        nets = dict.fromkeys(name.partition(".")[0] for name in tensors)
        return {net: {name: p for name, p in tensors.items() if name.startswith(net + ".")} for net in nets}

    def init(params: Params) -> Tree:
        return {net: optimizers[net].init(mine) for net, mine in parts(params).items()}

    def step(grads: Params, state: Tree, params: Params, scale: float = 1.0) -> None:
        for net, mine in parts(params).items():
            optimizers[net].step(grads, state[net], mine, scale)

    return Optimizer(init, step)


def fit(
    loss: Callable[..., Tensor],
    params: Params,
    optimizer: Optimizer,
    batches: Iterable[Sequence[Tensor]],
    state: Tree | None = None,
) -> tuple[Params, Tree]:
    """Train parameters on the server with one step per batch. Return the trained parameters and the optimiser's state.

    Args:
        loss: a function (params, *batch) -> 0-d tensor.
        params: the initial parameters, which do not change.
        batches: the tensors of each batch; see `minibatches`.
        state: the optimiser's state from an earlier call; default: a new state.
    """
    params = {name: p.detach().clone() for name, p in params.items()}
    state = optimizer.init(params) if state is None else tree.clone(state)
    for batch in batches:
        wanted = {name: p.detach().requires_grad_() for name, p in params.items()}
        grads = torch.autograd.grad(loss(wanted, *batch), list(wanted.values()), materialize_grads=True)
        optimizer.step(dict(zip(wanted, grads, strict=True)), state, params, 1.0)
    return params, state


def minibatches(tensors: Sequence[Tensor], size: int, epochs: int, rng: Stream) -> Iterator[tuple[Tensor, ...]]:
    """Yield batches of up to `size` rows of all tensors, in a new random order in each epoch. All tensors must have the same length."""
    for _ in range(epochs):
        for index in torch.split(rng.permutation(len(tensors[0])), size):
            yield tuple(values[index] for values in tensors)


def _along(factors: Tensor, values: Tensor) -> Tensor:
    """Return one factor per client, reshaped so that it multiplies the clients' stacked values."""
    return factors.to(values.dtype).view(-1, *[1] * (values.ndim - 1))
