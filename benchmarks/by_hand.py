"""A turn of w4-mlp with nothing around its operations: what no engine that calls torch's operations one by one can be faster than.

taskset -c 0 python benchmarks/by_hand.py      one thread; milliseconds a turn, by clients side by side, update apart or in the product
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from fedloom.engines.memory import keep_freed_memory

LR, ROWS, STEPS, CLIENTS, REPEATS = 0.05, 10, 6, 100, 7
SIZES = 784, 200, 10
Params = list[Tensor]  # two layers' weights and biases, stacked over clients


def slopes(params: Params, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss's slopes at the logits and at the hidden units (lanes, rows, ...), and the hidden units."""
    aten = torch.ops.aten
    w, b, v, c = params
    hidden = torch.relu(torch.baddbmm(b.unsqueeze(1), x, w.transpose(1, 2)))
    logs = torch._log_softmax(torch.baddbmm(c.unsqueeze(1), hidden, v.transpose(1, 2)), 2, False)
    flat, labels = logs.flatten(0, 1), y.flatten()
    _, total = aten.nll_loss_forward(flat, labels, None, 1, -100)
    one = torch.full((), float(len(y)))
    outer = aten.nll_loss_backward(one, flat, labels, None, 1, -100, total).view_as(logs)
    outer = torch._log_softmax_backward_data(outer, logs, 2, torch.float32)
    return outer, aten.threshold_backward(torch.bmm(outer, v), hidden, 0), hidden


def turns(received: Params, x: Tensor, y: Tensor, fused: bool) -> list[Params]:
    """What some clients send; x (lanes, steps, rows, 784)."""
    params = [p.expand(len(x), *p.shape).contiguous() for p in received]
    w, b, v, c = params
    for step in range(STEPS):
        rows = x[:, step]
        outer, inner, hidden = slopes(params, rows, y[:, step].contiguous())
        if fused:
            w.baddbmm_(inner.transpose(1, 2), rows, alpha=-LR)
            v.baddbmm_(outer.transpose(1, 2), hidden, alpha=-LR)
            torch._foreach_add_([b, c], [inner.sum(1), outer.sum(1)], alpha=-LR)
        else:
            products = [torch.bmm(inner.transpose(1, 2), rows), torch.bmm(outer.transpose(1, 2), hidden)]
            torch._foreach_add_(params, [products[0], inner.sum(1), products[1], outer.sum(1)], alpha=-LR)
    return [[p[lane].clone() for p in params] for lane in range(len(x))]


def timed(lanes: int, fused: bool) -> float:
    """Seconds a turn, the median of several rounds."""
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
            uplinks += turns(received, x, labels[index].view(-1, STEPS, ROWS), fused)
        seconds.append((time.perf_counter() - started) / CLIENTS)
    return sorted(seconds)[REPEATS // 2]


if __name__ == "__main__":
    keep_freed_memory()
    torch.set_num_threads(1)
    with torch.no_grad():
        for lanes in (1, 2, 4, 8, 50):
            apart, fused = (1000 * timed(lanes, fused) for fused in (False, True))
            print(f"{lanes} side by side: {apart:.2f} ms a turn, with updates in the products {fused:.2f}", flush=True)
