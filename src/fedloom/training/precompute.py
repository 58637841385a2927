"""Values that an `Interleave` computes once per batch and shares among its members."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from fedloom.errors import MethodError
from fedloom.method import Batch, Interleave, Train
from fedloom.optim import Params
from fedloom.training.gradients import Gradients, with_grad
from fedloom.training.steps import Step, StepResult
from fedloom.tree import Tree


class Precomputed(NamedTuple):
    """Values computed once for a batch (or for stacked batches of several clients), with their autograd graph."""

    values: Params
    leaves: Params  # the parameters to which gradients flow back

    def detached(self) -> Precomputed:
        """Return the same values without a graph, for members that receive them as constants."""
        return Precomputed(self.numbers, self.leaves)

    @property
    def numbers(self) -> Params:
        """The values without their graph."""
        return {name: value.detach() for name, value in self.values.items()}

    @property
    def differentiable(self) -> Params:
        """The values that depend on a leaf, without their graph."""
        return {name: value.detach() for name, value in self.values.items() if value.requires_grad}

    def around(self, step: Step) -> Step:
        """Return `step` for a batch with the precomputed values. Gradients are propagated back through these values."""

        def run(inputs: Tree) -> StepResult:
            wanted, batch = inputs["wanted"] | self.differentiable, inputs["batch"] | {"precomputed": self.numbers}
            grads, logs = step({**inputs, "wanted": wanted, "batch": batch})
            return StepResult(self.backward(grads), logs)

        return run

    def backward(self, grads: Params) -> Params:
        """Convert gradients with respect to leaves and `differentiable` values into gradients with respect to leaves only."""
        ends = [value for value in self.values.values() if value.requires_grad]
        if not ends:
            return grads
        given = [grads[name] for name in self.differentiable]
        try:
            found = torch.autograd.grad(ends, list(self.leaves.values()), given, allow_unused=True)
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            raise MethodError(
                "a phase with `precompute`: only its last member may train the parameters that `precompute` uses"
            ) from None
        return {
            name: grads[name] if more is None else grads[name] + more
            for name, more in zip(self.leaves, found, strict=True)
        }


def precompute(phase: Interleave, trains: Iterable[Train], gradients: Gradients, inputs: Tree) -> Precomputed:
    """Compute the shared values of the active members for one client's batch.

    Args:
        inputs: the inputs of a step. Gradients will flow to `wanted`.
    """
    assert phase.precompute is not None
    leaves = with_grad(inputs["wanted"])
    nets = gradients.nets({**inputs["params"], **leaves}, inputs["buffers"], nets_in_train_mode(trains))
    with gradients.autocast():
        values = phase.precompute(nets, Batch(**inputs["batch"]), inputs["down"], inputs["memory"])
    return Precomputed(dict(values), leaves)


def nets_in_train_mode(trains: Iterable[Train]) -> set[str]:
    """Return the nets that at least one member puts in training mode."""
    return {net for train in trains for net in train.modes}


def check_precompute(phase: Train | Interleave, names: Sequence[Sequence[str]]) -> None:
    """Raise MethodError if an earlier member trains a parameter of the last member, because gradients of shared values flow to it.

    Args:
        names: the names of the parameters that each member trains.

    Raises:
        MethodError: an earlier member trains a parameter of the last member.
    """
    both = {name for mine in names[:-1] for name in mine}.intersection(*names[-1:])
    if isinstance(phase, Interleave) and phase.precompute and both:
        raise MethodError(
            f"phase '{phase.name}': only its last member may train '{min(both)}', because it has `precompute`"
        )
