"""The gradient of a `Train`'s loss, by autograd."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from fedloom.accelerator import HOST
from fedloom.errors import MethodError
from fedloom.method import Batch, Train
from fedloom.nets import CLASSES, Nets
from fedloom.objectives import Objective
from fedloom.optim import Params
from fedloom.training.choose import Convolutions, FastForms
from fedloom.training.steps import Replace, Step, StepResult
from fedloom.tree import Tree


class Gradients:
    """Computes gradients with one architecture's modules, for any number of client updates."""

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        *,
        objective: Objective = CLASSES,
        bf16: bool = False,
        device: torch.device = HOST,
        convolutions: Convolutions | None = None,
        as_written: bool = False,
    ) -> None:
        """Store the modules, and choose the faster forms of a step that may be used with them.

        Args:
            objective: the learning task, which defines `nets.loss`.
            bf16: whether matrix products and convolutions run in bfloat16 (autocast). Weights and updates keep their precision.
            device: the device of the modules and all tensors.
            convolutions: how to compute the convolutions of several clients at once; default: as in vmap.
            as_written: whether to run losses operation by operation, without faster forms, so that operations can be counted.
        """
        self.modules, self.objective, self.bf16, self.device = modules, objective, bf16, device
        self.forms = FastForms(modules, bf16=bf16, device=device, convolutions=convolutions, as_written=as_written)

    def step(self, train: Train, replace: Replace | None = None) -> Step:
        """Return one client's step as a function of `wanted`, params, buffers (updated in place), batch, down and memory."""

        def plain(inputs: Tree) -> StepResult:
            wanted = with_grad(inputs["wanted"])
            params, batch = place_values(wanted, Batch(**inputs["batch"]))
            if replace:
                params = replace(params, batch)
            nets = self.nets({**inputs["params"], **params}, inputs["buffers"], train.modes)
            with self.autocast():
                loss, logs = with_logs(train.loss(nets, batch, inputs["down"], inputs["memory"]))
            grads = torch.autograd.grad(loss, list(wanted.values()), materialize_grads=True)
            logged = {"loss": loss.detach()} | {name: value.detach() for name, value in logs.items()}
            return StepResult(dict(zip(wanted, grads, strict=True)), logged)

        return plain

    def nets(self, params: Params, buffers: Params, training: Iterable[str] = ()) -> Nets:
        """Return one client's nets. The nets in `training` are in training mode."""
        return Nets(self.modules, params, buffers, training, objective=self.objective)

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context in which losses and predictions are computed: bfloat16 autocast, or a null context."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()


def with_grad(tensors: Params) -> Params:
    """Return the tensors as leaves for which gradients can be computed."""
    return {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}


def place_values(wanted: Params, batch: Batch) -> tuple[Params, Batch]:
    """Move precomputed values from `wanted` to the batch. Return the remaining tensors, which are parameters, and the new batch."""
    if not batch.precomputed:
        return wanted, batch
    # Use views, because torch's operation counter fails if a module's input is a leaf.
    values = {name: v.view_as(v) for name, v in {**batch.precomputed, **wanted}.items() if name in batch.precomputed}
    return {name: p for name, p in wanted.items() if name not in values}, batch._replace(precomputed=values)


def with_logs(result: Tensor | tuple[Tensor, dict[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
    """Split the result of a loss function into the loss and copies of its logs.

    A logged parameter is copied, because the optimiser updates it in place before its value is read.

    Raises:
        MethodError: the loss is not a 0-d tensor.
    """
    loss, logs = result if isinstance(result, tuple) else (result, {})
    if not isinstance(loss, Tensor) or loss.ndim:
        found = f"one of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise MethodError(f"a loss must be a 0-d tensor, not {found}")
    return loss, {name: value.clone() for name, value in logs.items()}
