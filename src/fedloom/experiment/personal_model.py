"""A client's personal predictor as a plain module, for use, export or analysis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fedloom import tree
from fedloom.errors import DataError
from fedloom.inputs import Inputs, map_inputs, tensors_of
from fedloom.method import Client, Method, Predictor
from fedloom.nets import Nets, write_weights
from fedloom.tree import Tree


class PersonalModel(nn.Module):
    """A predictor of a client or of the server. `model(x)` returns logits (B, Y) for inputs (B, ...) in the form used in training.

    `encode` converts raw values to such inputs (see `Preprocess.encode`).
    """

    encode: Callable[[Any], Inputs]

    def __init__(
        self, method: Method, modules: Any, client: Client, down: Tree, predictor: Predictor | None = None
    ) -> None:
        """Create the module. `predictor` is by default the method's personal predictor."""
        super().__init__()
        write_weights(modules, client.weights)
        self.nets = nn.ModuleDict(modules).requires_grad_(False)  # only for prediction
        self._predictor, self._down, self._memory = predictor or method.predictors()["personal"], down, client.memory
        self.eval()

    def preprocess(self, inputs: Any) -> Inputs:
        """Return raw values, such as those for `Run.predict`, as inputs of this model."""
        return self.encode(inputs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PersonalModel:
        """Apply a change of precision or device to the predictor's other inputs, too."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._down, self._memory = tree.map_tree(fn, self._down), tree.map_tree(fn, self._memory)
        return self

    def forward(self, x: Inputs) -> Tensor:
        """Return outputs, such as logits (B, Y). Raise DataError for raw values."""
        if not isinstance(x, Tensor | dict) or any(_is_raw(v) for v in tensors_of(x)):
            raise DataError(
                "the model takes tensors as in training, such as run.federation.test(i); for raw values, use run.predict, or convert them "
                "with model.preprocess"
            )
        modules = dict(self.nets.items())
        params = {f"{net}.{name}": p for net, module in modules.items() for name, p in module.named_parameters()}
        buffers = {f"{net}.{name}": b for net, module in modules.items() for name, b in module.named_buffers()}
        nets = Nets(modules, params, buffers, modules if self.training else ())
        dtype = next(iter(params.values())).dtype
        x = map_inputs(lambda v: v.to(dtype) if v.is_floating_point() else v, x)
        return self._predictor(nets, x, self._down, self._memory)


def _is_raw(values: Any) -> bool:
    return not isinstance(values, Tensor) or values.dtype == torch.uint8
