"""What all forms of an optimiser step share: its inputs and result, and `StepRunner`, the seam behind which faster forms lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from fedloom.errors import MethodError
from fedloom.method import Batch, Client, Train
from fedloom.nets import select
from fedloom.optim import Params
from fedloom.training.context import LocalWork
from fedloom.tree import Tree, Weights


class StepResult(NamedTuple):
    """What one evaluation of a loss gives."""

    grads: Params  # by the names of `inputs["wanted"]`
    logs: Params  # 0-d tensors: the loss, and what it logs


Step = Callable[[Tree], StepResult]
"""Compute gradients from one tree of inputs: the tensors `wanted` (gradients are taken of them), the other weights, `batch`, `down`
and `memory`. Buffers among the weights are updated in place."""

Replace = Callable[[Params, Batch], Params]
"""(the tensors `wanted`, batch) -> what the nets compute with in their place."""


class FormError(RuntimeError):
    """A form of a step does not fit the loss, which is only known once it has run. The phase must run again without that form."""


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """One `Train` before its first step, for one client or for several side by side: all that the choice of a form depends on."""

    train: Train
    names: Sequence[str]  # the parameters that it trains
    alone: bool  # whether no other `Train` takes steps in the same phase
    work: LocalWork  # of the only client, or of the first
    order: Sequence[Tensor]  # that client's batches, as indices of examples
    step: Callable[[Replace | None], Step]  # makes the plain step of one client
    clients: Sequence[Client]
    inputs: Tensor  # x of all clients' examples, stacked and padded: (clients, n, ...)
    stacked_step: Callable[[Replace | None], Step] | None = (
        None  # makes that of several clients, where there are several
    )
    layout: Any = None  # hashable: which inputs of `stacked_step` are stacked

    def plain(self, replace: Replace | None = None) -> Step:
        """Return the step as the loss is written."""
        return (self.stacked_step or self.step)(replace)


class StepRunner:
    """Runs the steps of one `Train`, for one client or for several side by side.

    This is the plain form: gradients of the loss as it is written, of the parameters as they are. Faster forms (`fast/`) override what
    they change; `choose.py` decides which one runs. The training loop calls `extra`, `run` and `after_step` in every step, and `finished`
    after the last one.
    """

    def __init__(self, names: Sequence[str], step: Step) -> None:
        """`names`: the parameters that the optimiser updates."""
        self.names, self.run = names, step

    def extra(self, index: Tensor, lanes: Tensor | None = None) -> Params:
        """Return further tensors to take gradients of, for the examples `index`.

        Args:
            lanes: which of the stacked clients take the step; default: all.
        """
        return {}

    def after_step(self, index: Tensor, grads: Params, lr_scale: float) -> None:
        """Update what the optimiser does not know of."""

    def finished(self, client: int = 0) -> Params:
        """Return the trained parameters that are not among `names`."""
        return {}


def trained_names(train: Train, weights: Weights) -> list[str]:
    """Return the names of the parameters that a `Train` updates. Raises MethodError where there are none."""
    names = list(select(weights, train.params)["params"])
    if not names:
        raise MethodError(f"phase '{train.name}' trains {train.params}, which holds no parameters")
    return names
