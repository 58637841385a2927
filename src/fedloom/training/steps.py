"""The common interface of all forms of an optimiser step: its inputs and result, and `StepRunner`, which faster forms override."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from fedloom.errors import MethodError
from fedloom.inputs import Inputs
from fedloom.method import Batch, Client, Train
from fedloom.nets import select
from fedloom.optim import Params
from fedloom.training.context import LocalWork
from fedloom.tree import Tree, Weights


class StepResult(NamedTuple):
    """The result of one evaluation of a loss."""

    grads: Params  # gradients by the names of `inputs["wanted"]`
    logs: Params  # 0-d tensors: the loss, and the values that it logs


Step = Callable[[Tree], StepResult]
"""A function that computes gradients from one tree of inputs: the tensors `wanted`, for which gradients are computed, the other weights,
`batch`, `down` and `memory`. Buffers among the weights are updated in place."""

Replace = Callable[[Params, Batch], Params]
"""A function from the tensors `wanted` and a batch to the tensors that the nets use instead."""


class FormError(RuntimeError):
    """A form of a step cannot compute the loss. This is detected only during a step, so the phase must then be rerun without this form."""


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """One `Train` before its first step, for one client or for several side by side. The choice of a form depends on these facts."""

    train: Train
    names: Sequence[str]  # names of the parameters that it trains
    alone: bool  # whether no other `Train` takes steps in the same phase
    work: LocalWork  # work of the only client or of the first client
    order: Sequence[Tensor]  # batches of this client, as indices of examples
    step: Callable[[Replace | None], Step]  # returns the plain step of one client
    clients: Sequence[Client]
    inputs: Inputs  # x of all clients' examples, stacked and padded: (clients, n, ...)
    stacked_step: Callable[[Replace | None], Step] | None = (
        None  # returns the plain step of several clients, if there are several
    )
    layout: Any = None  # which inputs of `stacked_step` are stacked, in hashable form

    def plain(self, replace: Replace | None = None) -> Step:
        """Return the step that runs the loss as written."""
        return (self.stacked_step or self.step)(replace)


class StepRunner:
    """Runs the steps of one `Train`, for one client or for several side by side.

    This is the plain form, which runs the loss as written. Faster forms (`fast/`) override some of the methods; `choose.py` selects the
    form. The training loop calls `extra`, `run` and `after_step` in every step, and `finished` after the last step.
    """

    def __init__(self, names: Sequence[str], step: Step) -> None:
        """Store the step. `names` are the names of the parameters that the optimiser updates."""
        self.names, self.run = names, step

    def extra(self, index: Tensor, lanes: Tensor | None = None) -> Params:
        """Return additional tensors for which gradients are computed, for the examples `index`.

        Args:
            lanes: the stacked clients that take this step; default: all.
        """
        return {}

    def after_step(self, index: Tensor, grads: Params, lr_scale: float) -> None:
        """Update the weights that the optimiser does not update."""

    def finished(self, client: int = 0) -> Params:
        """Return the trained parameters that are not among `names`."""
        return {}


def trained_names(train: Train, weights: Weights) -> list[str]:
    """Return the names of the parameters that a `Train` updates. Raise MethodError if there are none."""
    names = list(select(weights, train.params)["params"])
    if not names:
        raise MethodError(f"phase '{train.name}' trains {train.params}, which has no parameters")
    return names
