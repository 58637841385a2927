"""Time the bare operations of a local update of w4-mlp, as a lower bound for any engine that calls torch's operations one by one.

taskset -c 0 python benchmarks/by_hand.py      one thread; milliseconds per local update, by number of clients side by side

The first layer is updated separately, in the product, or once per local update (dual form, see fedloom.training.fast.gram_layer).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fedloom.engines.process_memory import keep_freed_memory

LR, ROWS, STEPS, CLIENTS, REPEATS = 0.05, 10, 6, 100, 7
SIZES = 784, 200, 10
Params = list[Tensor]  # weights and biases of two layers, stacked over clients
Turns = Callable[[Params, Tensor, Tensor], list[Params]]


def slopes(inner: Tensor, v: Tensor, c: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the loss with respect to the logits and to the first layer's outputs `inner`, and the hidden units.

    `inner` has the shape (lanes, examples, ...).
    """
    aten = torch.ops.aten
    hidden = torch.relu(inner)
    logs = torch._log_softmax(torch.baddbmm(c.unsqueeze(1), hidden, v.transpose(1, 2)), 2, False)
    flat, labels = logs.flatten(0, 1), y.flatten()
    _, total = aten.nll_loss_forward(flat, labels, None, 1, -100)
    one = torch.full((), float(len(y)))
    outer = aten.nll_loss_backward(one, flat, labels, None, 1, -100, total).view_as(logs)
    outer = torch._log_softmax_backward_data(outer, logs, 2, torch.float32)
    return outer, aten.threshold_backward(torch.bmm(outer, v), hidden, 0), hidden


def turns(received: Params, x: Tensor, y: Tensor, fused: bool) -> list[Params]:
    """Return the weights that the clients send. `x` has the shape (lanes, steps, examples, 784)."""
    params = [p.expand(len(x), *p.shape).contiguous() for p in received]
    w, b, v, c = params
    for step in range(STEPS):
        rows = x[:, step]
        seen = torch.baddbmm(b.unsqueeze(1), rows, w.transpose(1, 2))
        outer, inner, hidden = slopes(seen, v, c, y[:, step].contiguous())
        if fused:
            w.baddbmm_(inner.transpose(1, 2), rows, alpha=-LR)
            v.baddbmm_(outer.transpose(1, 2), hidden, alpha=-LR)
            torch._foreach_add_([b, c], [inner.sum(1), outer.sum(1)], alpha=-LR)
        else:
            products = [torch.bmm(inner.transpose(1, 2), rows), torch.bmm(outer.transpose(1, 2), hidden)]
            torch._foreach_add_(params, [products[0], inner.sum(1), products[1], outer.sum(1)], alpha=-LR)
    return [[p[lane].clone() for p in params] for lane in range(len(x))]


def dual_turns(received: Params, x: Tensor, y: Tensor) -> list[Params]:
    """Return the same weights in dual form: one product before the first step and one after the last, instead of two in every step."""
    w, *others = received
    b, v, c = (p.expand(len(x), *p.shape).contiguous() for p in others)
    x = x.flatten(1, 2)
    first = (x.flatten(0, 1) @ w.T).view(*x.shape[:2], len(w))
    gram, moves = torch.bmm(x, x.transpose(1, 2)), torch.zeros_like(first)
    for step in range(STEPS):
        here = slice(step * ROWS, (step + 1) * ROWS)
        seen = torch.baddbmm(first[:, here], gram[:, here], moves) + b.unsqueeze(1)
        outer, inner, hidden = slopes(seen, v, c, y[:, step].contiguous())
        moves[:, here] = inner * -LR
        products = [inner.sum(1), torch.bmm(outer.transpose(1, 2), hidden), outer.sum(1)]
        torch._foreach_add_([b, v, c], products, alpha=-LR)
    every = zip(moves, x, b, v, c, strict=True)
    return [[torch.addmm(w, m.T, rows), *(p.clone() for p in mine)] for m, rows, *mine in every]


def timed(lanes: int, turns_of: Turns) -> float:
    """Return the time in seconds per local update, as the median of several rounds."""
    n = ROWS * STEPS
    pool, labels = torch.randn(CLIENTS * n, SIZES[0]), torch.randint(SIZES[2], (CLIENTS * n,))
    shapes = ((SIZES[1], SIZES[0]), (SIZES[1],), (SIZES[2], SIZES[1]), (SIZES[2],))
    received = [torch.randn(shape) / shape[-1] ** 0.5 for shape in shapes]
    seconds = []
    for _ in range(REPEATS):
        started, uplinks = time.perf_counter(), list[Params]()
        for first in range(0, CLIENTS, lanes):
            index = torch.arange(first * n, min(first + lanes, CLIENTS) * n)
            x = pool.index_select(0, index).view(-1, STEPS, ROWS, SIZES[0])
            uplinks += turns_of(received, x, labels[index].view(-1, STEPS, ROWS))
        seconds.append((time.perf_counter() - started) / CLIENTS)
    return sorted(seconds)[REPEATS // 2]


if __name__ == "__main__":
    keep_freed_memory()
    torch.set_num_threads(1)
    with torch.no_grad():
        for lanes in (1, 4, 10, 25, 50):
            ways = partial(turns, fused=False), partial(turns, fused=True), dual_turns
            apart, fused, dual = (1000 * timed(lanes, way) for way in ways)
            told = f"with updates in the products {fused:.2f}, in dual form {dual:.2f}"
            print(f"{lanes} side by side: {apart:.2f} ms a turn, {told}", flush=True)
