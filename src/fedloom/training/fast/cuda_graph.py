"""Record steps once and replay them as CUDA graphs.

A step of a small model consists of about fifty kernels, which the device runs faster than the host can launch them. A graph launches all
of the kernels at once. It always reads and writes the same memory, so a `Recording` first copies the inputs of a step into that memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fedloom import tree
from fedloom.training.steps import Step, StepResult
from fedloom.tree import Tree

Record = Callable[[Callable[[], StepResult]], tuple[Callable[[], Any], StepResult]]
"""A function that maps work to a function that repeats the work, and to the results of the work, which are always in the same memory."""

WARM_UPS = 3  # number of runs before the recording, in which libraries choose algorithms and allocate memory


class Recording:
    """A step with its own memory for all its inputs. The gradients that it returns are valid until its next call."""

    def __init__(self, step: Step, inputs: Tree, record: Record) -> None:
        self._inputs = tree.map_tree(twin, inputs)
        self._seen: list[tuple[Tensor, int] | None] = [None] * len(tree.leaves(inputs))
        with torch.enable_grad():
            self._play, self._found = record(lambda: step(self._inputs))

    def __call__(self, now: Tree) -> StepResult:
        """Run the step on other inputs of the same shapes. Like the step itself, it updates `now["buffers"]` in place."""
        with torch.no_grad():
            self._take(tree.leaves(now))
            self._play()
            grads, logs = self._found
            for theirs, mine in zip(tree.leaves(now["buffers"]), tree.leaves(self._inputs["buffers"]), strict=True):
                theirs.copy_(mine)
            return StepResult(dict(grads), {name: value.clone() for name, value in logs.items()})

    def _take(self, leaves: list[Tensor]) -> None:
        """Copy the inputs that have changed. The received weights, for example, are the same in all steps of an update."""
        own = tree.leaves(self._inputs)
        states = [(leaf, -1 if leaf.is_inference() else leaf._version) for leaf in leaves]
        new = [k for k, state in enumerate(states) if not _is_known(self._seen[k], state)]
        if new:
            torch._foreach_copy_([own[k] for k in new], [leaves[k] for k in new])
        self._seen = list(states)


def twin(leaf: Tensor) -> Tensor:
    """Return a copy with the same strides, even for tensors with one channel.

    Strides affect the choice of kernels, and therefore the last bits of results.
    """
    if 0 in leaf.stride():  # an expanded tensor: several elements share one memory location
        return leaf.clone()
    return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device).copy_(leaf)


def _is_known(before: tuple[Tensor, int] | None, now: tuple[Tensor, int]) -> bool:
    """Return whether this is the tensor that was copied last, unchanged. Return False for inference tensors, which have no version."""
    return before is not None and before[0] is now[0] and before[1] == now[1] >= 0


def record_graph(work: Callable[[], StepResult]) -> tuple[Callable[[], Any], StepResult]:
    """Record a step on the current CUDA device (a `Record`)."""
    beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(WARM_UPS):
            work()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = work()
    return graph.replay, found
