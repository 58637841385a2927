"""FedType: a common proxy and a private model teach each other; the private one learns the order of classes from conformal sets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedloom import losses
from fedloom.method import (
    Architecture,
    Batch,
    ClientData,
    Interleave,
    Logs,
    Method,
    Need,
    Paper,
    Phase,
    Predictor,
    Sweep,
    Task,
    Train,
    predict_model,
    predict_with,
)
from fedloom.nets import Nets
from fedloom.ranges import Fraction, NonNegative, Positive, Whole
from fedloom.rng import Stream
from fedloom.tree import Tree, Weights

GRID = 1001
"""Thresholds at which the distribution of conformity scores is evaluated."""


@dataclass(frozen=True, kw_only=True)
class FedType(Method):
    """FedType (Wang et al., ICML 2024): bidirectional transfer between models through uncertainty, without public data.

    Sent: the proxy `model`, both ways, of the architecture `common_model`. Kept: the private model `personal`, of the client's own
    architecture, which is scored; `server_accuracy` scores the proxy. A local update first calibrates a conformal predictor for either
    model on the client's training examples, then alternates between two steps on every batch:

        private: CE(o, y) + ranking_weight c mean_{i in S, j not in S} max(0, o_j - o_i)
        proxy:   CE(o', y) + distillation_weight KL(softmax(o) || softmax(o'))

    o and o' are the logits of private model and proxy. S is the proxy's conformal set of classes for the example: every class in it should
    rank above every other class. c is the consensus of S with the private model's set P, as a mean over the batch: their intersection
    divided by their union, or by S if P is the larger one. S, c and the teacher's probabilities are constants.

    Conformal sets are those of RAPS (Angelopoulos et al., ICLR 2021): with classes by falling probability, a class is in the set if the sum
    of the probabilities up to it, plus a penalty for every rank above `free_ranks`, is below a threshold that the scores of a fraction
    1 - alpha of the calibration examples do not exceed. The last class is in the set at random. A set has at least one class.

    Differences from the released code: there, the ranking loss reads the proxy's logits twice, so the private model trains alone, and its
    sign is the opposite. Steps alternate on every batch instead of every epoch; the temperature is fixed, and the scores' distribution is
    exact instead of drawn; the KL divergence is a mean over examples. The penalty that the paper adapts is fixed, because the released code
    never uses the adapted one. Its settings: Adam with lr 0.001 and weight decay 0.0001, 5 local epochs.
    """

    alpha: Fraction = 0.1
    """Fraction of examples whose class may be outside their conformal set."""
    free_ranks: Whole = 5
    """Ranks without a penalty."""
    proxy_penalty: NonNegative = 0.5
    """Penalty of each further rank in the proxy's sets."""
    private_penalty: NonNegative = 1.0
    """Penalty of each further rank in the private model's sets."""
    temperature: Positive = 1.3
    """Divisor of the logits from which sets are made (the released code fits it in ten short passes, from 1.3)."""
    ranking_weight: NonNegative = 1.0
    """Weight of the ranking loss; 0: the private model trains alone."""
    distillation_weight: NonNegative = 1.0
    """Weight of the KL divergence; 0: the proxy is trained as in FedAvg."""

    equal_shares: ClassVar[bool] = True
    accepts_late: ClassVar[bool] = True
    needs: ClassVar[tuple[Need, ...]] = ("classes", "common_model")
    paper: ClassVar[Paper] = Paper(
        "Bridging model heterogeneity in federated learning via uncertainty-based asymmetrical reciprocity learning",
        "Wang, Zhao, Lyu, You, Huai, Ma",
        "ICML 2024",
        "https://arxiv.org/abs/2407.03247",
    )

    def nets(self, arch: Architecture, task: Task) -> dict[str, nn.Module]:
        """Return the proxy and the private model, each with its own initial weights."""
        return {"model": arch.common.model(), "personal": arch.model()}

    def init_memory(self, weights: Weights, task: Task, data: ClientData) -> Tree:
        """Return zero numbers of calibration examples by threshold (GRID,), for both models."""
        return {"calibration": {net: torch.zeros(GRID, dtype=torch.float64) for net in ("model", "personal")}}

    def phases(self) -> tuple[Phase, ...]:
        """Return the calibration, and the training of both models in turns."""
        private = Train("private", self.private_loss, ("personal",), self.local_optimizer(), draw=self.draw)
        proxy = Train("proxy", self.proxy_loss, ("model",), self.local_optimizer())
        return Sweep("calibration", self.calibrate), Interleave("train", (private, proxy), epochs=self.local_epochs)

    # conformal sets

    def penalty(self, net: str) -> float:
        """Return the penalty of a rank in the sets of a model."""
        return self.proxy_penalty if net == "model" else self.private_penalty

    def thresholds(self, net: str, n_classes: int) -> Tensor:
        """Return the thresholds (GRID,) between 0 and the largest score."""
        largest = 1 + self.penalty(net) * max(n_classes - self.free_ranks, 0)
        return torch.linspace(0, largest, GRID, dtype=torch.float64)

    def ranked(self, logits: Tensor, penalty: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return, for classes by falling probability: their numbers, probabilities, and sums of probabilities and penalties, all (B, Y)."""
        probabilities, order = (
            (losses.wide(logits) / self.temperature).softmax(1).sort(dim=1, descending=True, stable=True)
        )
        ranks = torch.arange(1, logits.shape[1] + 1, device=logits.device)
        return order, probabilities, probabilities.cumsum(1) + penalty * (ranks - self.free_ranks).clamp(min=0)

    def calibrate(self, nets: Nets, batch: Batch, total: Tree, down: Tree, memory: Tree) -> Tree:
        """Add the expected number of the batch's examples whose score is at most each threshold.

        The score of an example whose class has probability p and the sum s is uniform between s - p and s.
        """
        found = {}
        for net in total:
            logits = getattr(nets, net)(batch.x)
            order, probabilities, sums = self.ranked(logits, self.penalty(net))
            own = (order == batch.y[:, None]).to(sums.dtype)
            p, s = ((own * values).sum(1, keepdim=True).double() for values in (probabilities, sums))
            thresholds = self.thresholds(net, logits.shape[1]).to(s.device)
            found[net] = total[net] + ((thresholds - (s - p)) / p.clamp(min=1e-12)).clamp(0, 1).sum(0)
        return found

    def sets(self, net: str, logits: Tensor, chance: Tensor, memory: Tree) -> Tensor:
        """Return which classes are in the conformal sets (B, Y), as 1 or 0; `chance` (B,) is uniform in [0, 1)."""
        counts, thresholds = memory["calibration"][net], self.thresholds(net, logits.shape[1]).to(logits.device)
        enough = counts >= (1 - self.alpha) * counts[-1] - 1e-6  # a margin against rounding
        limit = torch.where(enough, thresholds, torch.inf).min().to(losses.wide(logits).dtype)
        order, probabilities, sums = self.ranked(logits.detach(), self.penalty(net))
        inside = ((limit - (sums - probabilities)) / probabilities.clamp(min=1e-12)).clamp(0, 1)
        taken = (chance[:, None].to(inside.dtype) < inside).to(inside.dtype)
        first = torch.arange(logits.shape[1], device=logits.device) == 0
        return torch.zeros_like(taken).scatter(1, order, torch.where(first, 1.0, taken))

    def draw(self, batch: Batch, task: Task, rng: Stream) -> Mapping[str, Tensor]:
        """Draw the chances with which the last class is in a set, for both models."""
        return {net: rng.uniform((len(batch.y),)) for net in ("model", "personal")}

    # training

    def private_loss(self, nets: Nets, batch: Batch, down: Tree, memory: Tree) -> tuple[Tensor, Logs]:
        """Return the cross-entropy of the private model plus the ranking loss times the consensus."""
        logits, proxy = nets.personal(batch.x), nets.model(batch.x)
        s = self.sets("model", proxy, batch.draws["model"], memory)
        p = self.sets("personal", logits, batch.draws["personal"], memory)
        error, agreement, ranking = nets.loss(logits, batch.y), consensus(s, p), ranking_loss(logits, s)
        logs = {"cross_entropy": error, "consensus": agreement, "ranking": ranking, "set_size": s.sum(1).mean()}
        return error + self.ranking_weight * agreement * ranking, logs

    def proxy_loss(self, nets: Nets, batch: Batch, down: Tree, memory: Tree) -> tuple[Tensor, Logs]:
        """Return the cross-entropy of the proxy plus its distance to the private model."""
        logits, teacher = nets.model(batch.x), nets.personal(batch.x)
        error, distance = nets.loss(logits, batch.y), losses.kl_divergence(logits, teacher).mean()
        return error + self.distillation_weight * distance, {"cross_entropy": error, "distance": distance}

    def predictors(self) -> dict[str, Predictor]:
        """Return the private model as the client's predictor and the proxy as the server's."""
        return {"personal": predict_with("personal"), "server": predict_model}


def consensus(proxy: Tensor, private: Tensor) -> Tensor:
    """Return the mean agreement of two sets of classes, each (B, Y) of 1 and 0, as the released code defines it."""
    both, either = (proxy * private).sum(1), proxy.maximum(private).sum(1)
    return (both / torch.where(private.sum(1) <= proxy.sum(1), either, proxy.sum(1))).mean()


def ranking_loss(logits: Tensor, chosen: Tensor) -> Tensor:
    """Return the mean of max(0, o_j - o_i) over classes i in the set and j outside it; 0 if all classes are in the set.

    `chosen`: (B, Y) of 1 and 0, with at least one 1 per row.
    """
    o = losses.wide(logits)
    pairs = chosen[:, :, None] * (1 - chosen)[:, None, :]
    away = (o[:, None, :] - o[:, :, None]).clamp(min=0)
    return ((pairs * away).sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)).mean()
