"""Per-FedAvg: clients train a common model for a small loss after one gradient step on a client's own examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from fedloom import optim, tree
from fedloom.inputs import map_inputs
from fedloom.method import Batch, Method, Paper, Phase, Train
from fedloom.nets import Nets
from fedloom.ranges import Count, NonNegative, Positive
from fedloom.tree import Tree

Params = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class PerFedAvg(Method):
    """Per-FedAvg (Fallah, Mokhtari, Ozdaglar; NeurIPS 2020, algorithm 1), with its two approximations FO and HF.

    Clients minimise f(w - inner_lr grad f(w)). With u = grad f(w - inner_lr grad f(w; D); D'), a local step is w <- w - lr u (`fo`, first
    order) or w <- w - lr (u - inner_lr H u) (`hf`, Hessian-free), where H u = (grad f(w + delta u; D'') - grad f(w - delta u; D'')) / (2
    delta). D, D' and D'' are disjoint parts of a batch: halves for `fo`, thirds for `hf`. If a batch is too small for parts of two
    examples, each part is the whole batch.

    Sent: The whole model is sent in both directions. Kept: Clients keep nothing between rounds. All clients have equal weights in the
    mean.

    `personal_accuracy` scores the received model after `adapt_steps` steps with learning rate inner_lr on batches of the client's training
    examples. `server_accuracy` scores the received model without these steps, for which it is not trained. In a local update, running
    statistics change only in the pass over D'.

    Differences from public code: none of the libraries that we read implements this algorithm. One adapts on test examples, one trains
    each client twice per round, and one does not restore w before the outer step.
    """

    variant: Literal["fo", "hf"] = "fo"
    """fo: ignore second derivatives; hf: approximate H u by the difference of two further gradients."""
    inner_lr: NonNegative = 0.01
    """Learning rate of the inner step and of the adaptation (the paper's alpha). With 0, the method is FedAvg on D' alone."""
    delta: Positive = 1e-3
    """Step of the finite difference for `hf`, as a multiple of u."""
    adapt_steps: Count = 1
    """Number of steps of the adaptation before a client predicts. Each step uses one batch."""

    equal_shares: ClassVar[bool] = True
    accepts_late: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        "Personalized federated learning with theoretical guarantees: A model-agnostic meta-learning approach",
        "Fallah, Mokhtari, Ozdaglar",
        "NeurIPS 2020",
        "https://arxiv.org/abs/2002.07948",
    )

    def __post_init__(self) -> None:
        """Raise ValueError if `delta` would have no effect."""
        super().__post_init__()
        if self.variant == "fo" and self.delta != PerFedAvg.delta:
            raise ValueError(f"delta={self.delta}: has no effect with variant=fo; set variant=hf")

    def loss(self, nets: Nets, batch: Batch, down: Tree, memory: Tree) -> Tensor:
        """Return f(w - inner_lr grad f(w; D); D'); its gradient is u, or u - inner_lr H u for `hf`."""
        first, second, *third = parts(batch, 2 if self.variant == "fo" else 3)
        slope = self.slope(nets, first)
        ahead = nets.with_params({name: nets.params[name] - self.inner_lr * slope[name] for name in slope})
        error = self.error(ahead, second)
        if not third:
            return error
        u = self.slope(ahead, second)
        there, back = (self.slope(nets.with_params(self.moved(nets, u, way)), third[0]) for way in (1, -1))
        curved = tree.map_tree(lambda a, b: (a - b) / (2 * self.delta), there, back)
        correction = tree.dot(curved, {name: nets.params[name] for name in curved})
        return error - self.inner_lr * (correction - correction.detach())

    def error(self, nets: Nets, batch: Batch) -> Tensor:
        """Return the loss of the model on a batch."""
        return nets.loss(nets.model(batch.x), batch.y)

    def slope(self, nets: Nets, batch: Batch) -> Params:
        """Return the gradient of the loss on a batch, as constants."""
        return nets.frozen.gradient(lambda here: self.error(here, batch), ("model",))

    def moved(self, nets: Nets, u: Params, way: int) -> Params:
        """Return w + delta u, or w - delta u if `way` is -1."""
        return {name: nets.params[name] + way * self.delta * u[name] for name in u}

    def adapt(self) -> tuple[Phase, ...]:
        """Return the phase that adapts the received model to the client."""
        if not self.inner_lr:
            return ()
        return (Train("adapt", self.plain_loss, ("model",), optim.sgd(self.inner_lr), steps=self.adapt_steps),)

    def plain_loss(self, nets: Nets, batch: Batch, down: Tree, memory: Tree) -> Tensor:
        """Return the loss of the model."""
        return self.error(nets, batch)


def parts(batch: Batch, n: int) -> list[Batch]:
    """Return n disjoint parts of a batch, of nearly equal sizes. If it has fewer than 2 n examples, return the whole batch n times."""
    rows = len(batch.y)
    if rows < 2 * n:
        return [batch] * n
    cuts = [rows * k // n for k in range(n + 1)]
    return [
        Batch(map_inputs(lambda x, a=a, b=b: x[a:b], batch.x), batch.y[a:b])
        for a, b in zip(cuts, cuts[1:], strict=False)
    ]
