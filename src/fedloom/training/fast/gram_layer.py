"""Train linear input layers with plain SGD through the Gram matrix of a client's examples, without computing the weight in each step.

Consider a linear layer with weight W (D, F) whose inputs are the examples X (n, F) themselves. Its gradient is S^T X, where row i of S (n,
D) is the gradient of the loss with respect to the layer's output for example i. After any number of steps of plain SGD, the weight is
therefore W = W_0 + C^T X, where row i of C (n, D) is the sum of -lr times those gradients for example i. The outputs are X W_0^T + (X X^T)
C. A client update therefore needs one product with W_0 before its first step, and one product to compute W after its last step. Each step
reads and writes arrays of the size of the outputs, not of the weight. Nothing is approximated: results equal those of the steps as
written, up to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedloom import tree
from fedloom.method import Batch
from fedloom.optim import Params
from fedloom.rng import Stream
from fedloom.training.fast.step_cache import MOST_KINDS, kind_of
from fedloom.training.steps import FormError, Step, StepRunner, TrainJob

# Costs, as the number of multiplications that take the same time (docs/performance.md describes the measurement):
TOUCHED = 30  # cost of reading and writing one element of a weight in a step
TOUCHED_IN_LANES = 60  # the same cost if the weights of several clients do not fit into the cache
FIXED = 4_000_000  # fixed cost of a step with the Gram matrix, for all stacked clients together
CHUNK = 5  # number of clients whose examples are multiplied at once, so that they stay in the cache for both products
GAIN = 0.8  # the Gram matrix must take at most this fraction of the time


class GramStepRunner(StepRunner):
    """Runs steps in which some input layers are updated through the Gram matrix instead of by the optimiser."""

    def __init__(self, job: TrainJob, replace: GramOutputs, step: Step) -> None:
        super().__init__([name for name in job.names if name not in replace.names], step)
        lr, inputs = job.train.optimizer.plain_lr, job.inputs
        assert lr is not None
        assert isinstance(inputs, Tensor)
        self._stacked = job.stacked_step is not None
        self._layers = {
            name: GramLayer([client.weights["params"][name] for client in job.clients], inputs, lr)
            for name in replace.names
        }

    def extra(self, index: Tensor, lanes: Tensor | None = None) -> Params:
        """Return the layers' outputs. Gradients are computed for them instead of for the weights."""
        outputs = {name: layer.outputs(index, lanes) for name, layer in self._layers.items()}
        return outputs if self._stacked else {name: value[0] for name, value in outputs.items()}

    def after_step(self, index: Tensor, grads: Params, lr_scale: float) -> None:
        """Update the layers."""
        for name, layer in self._layers.items():
            layer.step(index, grads[name], lr_scale)

    def finished(self, client: int = 0) -> Params:
        """Return the layers' weights."""
        return {name: layer.weight(client) for name, layer in self._layers.items()}


class GramChoice:
    """Selects the input layers of one architecture's modules that are updated through their Gram matrix."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._linear = linear_layers(modules)
        self._accepted: dict[Any, tuple[str, ...]] = {}

    def replacement(self, job: TrainJob) -> GramOutputs | None:
        """Return the replacement for the weights of the input layers that use the Gram matrix, or None if no layer does."""
        names = self._layers(job)
        return GramOutputs(names, checked=job.stacked_step is None) if names else None

    def _layers(self, job: TrainJob) -> tuple[str, ...]:
        """Return the input layers for which the Gram matrix is faster, and which the loss uses only as linear layers on the batch."""
        (x, y, augment, _), client = job.work.context.rows, job.work.client
        if not job.alone or job.train.optimizer.plain_lr is None or augment:
            return ()
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return ()
        params, n_features = client.weights["params"], x[0].numel()
        work = PhaseWork(len(y), sum(map(len, job.order)), len(job.order), len(job.clients))
        fitting = (n for n in job.names if params[n].ndim == 2 and params[n].shape[1] == n_features)
        names = tuple(n for n in fitting if work.is_less_by_gram_matrix(params[n]) and n in self._linear)
        if not names:
            return ()
        key = kind_of(job.train, job.work), names
        try:
            known = self._accepted.get(key)
        except TypeError:  # unhashable, e.g. a loss that closes over a list
            return ()
        if known is not None:
            return known
        if len(self._accepted) == MOST_KINDS:
            self._accepted.clear()
        with torch.random.fork_rng([]):  # the trial must not advance the generator of the phase
            self._accepted[key] = accepted(job, names)
        return self._accepted[key]


def accepted(job: TrainJob, names: Sequence[str]) -> tuple[str, ...]:
    """Return the layers whose outputs can replace their weights in the loss. Each layer is tested on the first batch.

    Any exception counts as a failed test. A loss that fails for another reason will fail again when it runs as written.
    """
    (client, down, context, _), size = job.work, len(job.order[0])
    batch = context.rows.part(0, size)
    if job.train.draw:
        batch = batch._replace(draws=job.train.draw(batch, context.task, Stream("trial")))
    params, buffers = client.weights["params"], tree.clone(client.weights["buffers"])
    around = {"batch": batch._asdict(), "down": down, "memory": client.memory}
    inputs = {"params": params, "buffers": buffers, **around}
    found = []
    for name in names:
        outputs = params[name].new_zeros(size, len(params[name]))
        try:
            job.step(GramOutputs((name,), checked=True))({"wanted": {name: outputs}, **inputs})
        except Exception:
            continue
        found.append(name)
    return tuple(found)


@dataclass(frozen=True)
class GramOutputs:
    """Replaces the weights of layers by their outputs (a `Replace`)."""

    names: tuple[str, ...]
    checked: bool  # whether to check that a layer's input is the batch, which is impossible in a mapped loss

    def __call__(self, wanted: Params, batch: Batch) -> Params:
        """Return the replacement as described in `Replace`."""
        rows = batch.x if self.checked else None
        return {**wanted, **{name: Outputs.of(wanted[name], rows) for name in self.names}}


class PhaseWork(NamedTuple):
    """The amount of a client's work in a phase, from which the cost of a form is estimated."""

    n_rows: int  # number of the client's examples
    visited: int  # number of examples over all steps
    steps: int
    lanes: int = 1  # number of clients trained side by side, each with this amount of work

    def is_less_by_gram_matrix(self, weight: Tensor) -> bool:
        """Return whether the Gram matrix is expected to save time for this weight (D, F).

        The forms are not timed, because they round differently, so that results would depend on the timings.
        """
        (outputs, _), size = weight.shape, weight.numel()
        touched = TOUCHED if self.lanes == 1 else TOUCHED_IN_LANES
        written = 2 * self.visited * size + self.steps * touched * size
        products = 2 * self.n_rows * size + self.n_rows**2 * (size // outputs) + self.visited * self.n_rows * outputs
        return products + self.steps * FIXED / self.lanes < GAIN * written


class GramLayer:
    """One input layer during the updates of one or more clients (lanes)."""

    def __init__(self, weights: Sequence[Tensor], rows: Tensor, lr: float) -> None:
        """Prepare the outputs for all examples.

        Args:
            weights: the weight (D, F) of every lane.
            rows: the examples of all lanes (lanes, n, ...), with F numbers each, padded with zeros.
            lr: the learning rate.
        """
        self._weights, self._rows, self._lr = weights, rows.flatten(2), lr
        lanes, most, outputs = *rows.shape[:2], len(weights[0])
        self._first, self._gram = rows.new_empty(lanes * most, outputs), rows.new_empty(lanes, most, most)
        self._moves = rows.new_zeros(lanes, most, outputs)
        some = CHUNK if all(weight is weights[0] for weight in weights) else 1
        for start in range(0, lanes, some):
            x, end = self._rows[start : start + some], min(start + some, lanes)
            torch.mm(x.flatten(0, 1), weights[start].T, out=self._first[start * most : end * most])
            torch.bmm(x, x.transpose(1, 2), out=self._gram[start:end])

    def outputs(self, places: Tensor, lanes: Tensor | None = None) -> Tensor:
        """Return the layer's current outputs, without its bias, for examples of all lanes or of some lanes, with shape (lanes, B, D).

        Args:
            places: indices of the examples in the concatenation of all lanes' examples.
            lanes: the lanes of these examples; default: all.
        """
        moves = self._moves if lanes is None else self._moves.index_select(0, lanes)
        first, gram = (table.index_select(0, places) for table in (self._first, self._gram.flatten(0, 1)))
        shape = len(moves), len(places) // len(moves), -1
        return torch.baddbmm(first.view(shape), gram.view(shape), moves)

    def step(self, places: Tensor, slopes: Tensor, scale: float = 1.0) -> None:
        """Take one SGD step.

        `slopes` (..., D) are the gradients with respect to the outputs; `scale` multiplies the learning rate.
        """
        flat = slopes.reshape(-1, slopes.shape[-1])
        self._moves.flatten(0, 1).index_add_(0, places, flat, alpha=-self._lr * scale)

    def weight(self, lane: int = 0) -> Tensor:
        """Return a lane's weight after the steps so far."""
        return torch.addmm(self._weights[lane], self._moves[lane].T, self._rows[lane])


class Outputs(Tensor):
    """A layer's outputs for a batch, which replace its weight.

    `linear`, applied to the batch, returns them; other uses raise FormError.
    """

    plain: Tensor
    rows: Tensor | None

    @staticmethod
    def of(plain: Tensor, rows: Tensor | None = None) -> Outputs:
        """Wrap the outputs (B, D) for the batch `rows`. Without `rows`, the layer's input is not checked."""
        outputs = plain.as_subclass(Outputs)
        outputs.plain, outputs.rows = plain, rows
        return outputs

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Tensor:
        """Intercept a torch function, and allow only `linear` on the batch."""
        if func is not F.linear:
            raise FormError
        return cls._linear(*args, **(kwargs or {}))

    @staticmethod
    def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not isinstance(weight, Outputs) or not (weight.rows is None or _are_same(input, weight.rows)):
            raise FormError
        return weight.plain if bias is None else weight.plain + bias


def _are_same(input: Tensor, rows: Tensor) -> bool:
    """Return whether a layer's input (B, F) is the batch itself, in the same memory."""
    return (
        input.shape == (len(rows), rows[0].numel())
        and input.data_ptr() == rows.data_ptr()
        and input.is_contiguous()
        and rows.is_contiguous()
    )


def linear_layers(modules: Mapping[str, nn.Module]) -> frozenset[str]:
    """Return the names of linear layers' weights."""
    return frozenset(
        ".".join(part for part in (net, name, "weight") if part)
        for net, module in modules.items()
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
    )
