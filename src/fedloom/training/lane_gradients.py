"""Gradients of several clients at once: a loss mapped over stacked tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fedloom import tree
from fedloom.method import Batch, Interleave, Train
from fedloom.optim import Params
from fedloom.training.gradients import Gradients, place_values, with_grad, with_logs
from fedloom.training.precompute import Precomputed, nets_in_train_mode
from fedloom.training.steps import Replace, Step, StepResult
from fedloom.tree import Tree


class LaneGradients:
    """Computes the gradients of several clients (lanes) at once.

    The inputs of a step are trees. `wanted`, `others` (additional weights that a member trains), `buffers` (updated in place) and `batch`
    are stacked. `fixed` (all other weights), `down` and `memory` may be shared by the lanes.
    """

    def __init__(self, gradients: Gradients, dims: Tree) -> None:
        """Store the gradients. `dims` contains 0 for each stacked leaf of `fixed`, `down` and `memory`, and None for each shared leaf."""
        self._gradients, self._dims = gradients, dims

    def step(self, train: Train, replace: Replace | None = None) -> Step:
        """Return the plain step of several clients. Its results are stacked."""

        def lane(i: Tree) -> tuple[Params, Params, Params]:
            def loss(wanted: Params) -> tuple[Tensor, tuple[Params, Params]]:
                params, batch = place_values(wanted, Batch(**i["batch"]))
                if replace:
                    params = replace(params, batch)
                buffers = {name: buffer.clone() for name, buffer in i["buffers"].items()}
                nets = self._gradients.nets({**i["fixed"], **i["others"], **params}, buffers, train.modes)
                with self._gradients.autocast():
                    value, logs = with_logs(train.loss(nets, batch, i["down"], i["memory"]))
                return value, (logs, buffers)

            grads, (value, (logs, buffers)) = torch.func.grad_and_value(loss, has_aux=True)(i["wanted"])
            return grads, {"loss": value, **logs}, buffers

        def plain(inputs: Tree) -> StepResult:
            grads, logs, buffers = self._map(lane, inputs)
            tree.map_tree(Tensor.copy_, inputs["buffers"], buffers)
            return StepResult(grads, logs)

        return plain

    def precompute(self, phase: Interleave, trains: Iterable[Train], inputs: Tree) -> Precomputed:
        """Compute the shared values of the active members for the lanes' batches; see `fedloom.training.precompute`."""
        leaves, modes = with_grad(inputs["wanted"]), nets_in_train_mode(trains)

        def lane(i: Tree) -> tuple[Params, Params]:
            assert phase.precompute is not None
            buffers = {name: buffer.clone() for name, buffer in i["buffers"].items()}
            nets = self._gradients.nets({**i["fixed"], **i["others"], **i["wanted"]}, buffers, modes)
            with self._gradients.autocast():
                return dict(phase.precompute(nets, Batch(**i["batch"]), i["down"], i["memory"])), buffers

        values, buffers = self._map(lane, {**inputs, "wanted": leaves})
        tree.map_tree(Tensor.copy_, inputs["buffers"], buffers)
        return Precomputed(values, leaves)

    def _map(self, lane: Callable[[Tree], Any], inputs: Tree) -> Any:
        """Map `lane` over the stacked leaves of `inputs`."""

        def flat(*leaves: Tensor) -> Any:
            in_order = iter(leaves)
            return lane(tree.map_tree(lambda _: next(in_order), inputs))

        stacked = {name: tree.map_tree(lambda _: 0, part) for name, part in inputs.items()}  # type: ignore[arg-type, return-value]
        dims = tree.leaves(tree.map_tree(lambda _, dim: dim, inputs, {**stacked, **self._dims}))
        with self._gradients.forms.over_lanes(len(inputs["batch"]["y"])):
            return torch.func.vmap(flat, in_dims=tuple(dims))(*tree.leaves(inputs))
