"""FedType: a common proxy and a private model teach each other. Conformal sets of the proxy teach the private model."""

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
"""Number of thresholds at which the distribution of conformity scores is evaluated."""


@dataclass(frozen=True, kw_only=True)
class FedType(Method):
    """FedType (Wang et al., ICML 2024): bidirectional transfer between models through uncertainty, without public data.

    Sent: The proxy `model`, whose architecture is `common_model`, is sent in both directions. Kept: Each client keeps its private model
    `personal`, which has the client's own architecture. Clients are scored with the private model; `server_accuracy` scores the proxy.

    A local update first calibrates a conformal predictor for each of the two models on the client's training examples. It then takes two
    steps on every batch, which minimise

        private: CE(o, y) + ranking_weight c mean_{i in S, j not in S} max(0, o_j - o_i)
        proxy:   CE(o', y) + distillation_weight KL(softmax(o) || softmax(o'))

    o and o' are the logits of the private model and the proxy. S is the proxy's conformal set of classes for an example. The ranking loss
    is 0 if every class in S has a larger logit than every other class. c is the consensus of S and the private model's set P, as a mean
    over the batch: the size of their intersection divided by the size of their union, or by the size of S if P is larger than S. S, c and
    the teacher's probabilities are constants.

    Conformal sets are those of RAPS (Angelopoulos et al., ICLR 2021). Classes are sorted by decreasing probability. The score of a class is
    the sum of the probabilities up to this class, plus a penalty for every rank above `free_ranks`. A set contains the classes whose
    score is below a threshold that the scores of a fraction 1 - alpha of the calibration examples do not exceed. The first class above the
    threshold is in the set at random. A set contains at least one class.

    Differences from the released code: in the released code, the ranking loss uses the proxy's logits twice, so that the private model
    trains alone, and it has the opposite sign. Steps of the two models alternate on every batch, not on every epoch. The temperature is
    fixed. The distribution of scores is exact, not drawn at random. The KL divergence is a mean over examples. The penalty, which the paper
    adapts, is fixed, because the released code never uses the adapted penalty. The released settings are Adam with lr 0.001 and weight
    decay 0.0001, and 5 local epochs.
    """

    alpha: Fraction = 0.1
    """Fraction of examples whose class may be outside of their conformal set."""
    free_ranks: Whole = 5
    """Number of first ranks without a penalty."""
    proxy_penalty: NonNegative = 0.5
    """Penalty of each further rank in the proxy's sets."""
    private_penalty: NonNegative = 1.0
    """Penalty of each further rank in the private model's sets."""
    temperature: Positive = 1.3
    """Divisor of the logits for conformal sets. The released code fits it in ten short passes, and starts from 1.3."""
    ranking_weight: NonNegative = 1.0
    """Weight of the ranking loss. With 0, the private model trains alone."""
    distillation_weight: NonNegative = 1.0
    """Weight of the KL divergence. With 0, the proxy is trained as in FedAvg."""

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
        """Return the proxy and the private model, which have different initial weights."""
        return {"model": arch.common.model(), "personal": arch.model()}

    def init_memory(self, weights: Weights, task: Task, data: ClientData) -> Tree:
        """Return zero numbers (GRID,) of calibration examples by threshold, for both models."""
        return {"calibration": {net: torch.zeros(GRID, dtype=torch.float64) for net in ("model", "personal")}}

    def phases(self) -> tuple[Phase, ...]:
        """Return the calibration, and a phase that trains both models alternately."""
        private = Train("private", self.private_loss, ("personal",), self.local_optimizer(), draw=self.draw)
        proxy = Train("proxy", self.proxy_loss, ("model",), self.local_optimizer())
        return Sweep("calibration", self.calibrate), Interleave("train", (private, proxy), epochs=self.local_epochs)

    # conformal sets

    def penalty(self, net: str) -> float:
        """Return the penalty per rank in the sets of a model."""
        return self.proxy_penalty if net == "model" else self.private_penalty

    def thresholds(self, net: str, n_classes: int) -> Tensor:
        """Return equidistant thresholds (GRID,) from 0 to the largest possible score."""
        largest = 1 + self.penalty(net) * max(n_classes - self.free_ranks, 0)
        return torch.linspace(0, largest, GRID, dtype=torch.float64)

    def ranked(self, logits: Tensor, penalty: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return the classes of each example by decreasing probability, their probabilities, and their scores: all (B, Y).

        A score is the sum of the probabilities up to a class, plus the penalties.
        """
        probabilities, order = (
            (losses.wide(logits) / self.temperature).softmax(1).sort(dim=1, descending=True, stable=True)
        )
        ranks = torch.arange(1, logits.shape[1] + 1, device=logits.device)
        return order, probabilities, probabilities.cumsum(1) + penalty * (ranks - self.free_ranks).clamp(min=0)

    def calibrate(self, nets: Nets, batch: Batch, total: Tree, down: Tree, memory: Tree) -> Tree:
        """Add the expected number of the batch's examples whose score is at most each threshold.

        The score of an example is random. It is uniform between s - p and s, where s is the score of its class, and p is the probability.
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
        """Return the conformal sets (B, Y), where 1 marks a class in the set. `chance` (B,) contains uniform draws from [0, 1)."""
        counts, thresholds = memory["calibration"][net], self.thresholds(net, logits.shape[1]).to(logits.device)
        enough = counts >= (1 - self.alpha) * counts[-1] - 1e-6  # a margin against rounding
        limit = torch.where(enough, thresholds, torch.inf).min().to(losses.wide(logits).dtype)
        order, probabilities, sums = self.ranked(logits.detach(), self.penalty(net))
        inside = ((limit - (sums - probabilities)) / probabilities.clamp(min=1e-12)).clamp(0, 1)
        taken = (chance[:, None].to(inside.dtype) < inside).to(inside.dtype)
        first = torch.arange(logits.shape[1], device=logits.device) == 0
        return torch.zeros_like(taken).scatter(1, order, torch.where(first, 1.0, taken))

    def draw(self, batch: Batch, task: Task, rng: Stream) -> Mapping[str, Tensor]:
        """Draw the numbers (B,) that decide whether the last class is in a set, for both models."""
        return {net: rng.uniform((len(batch.y),)) for net in ("model", "personal")}

    # training

    def private_loss(self, nets: Nets, batch: Batch, down: Tree, memory: Tree) -> tuple[Tensor, Logs]:
        """Return the cross-entropy of the private model plus the weighted product of ranking loss and consensus."""
        logits, proxy = nets.personal(batch.x), nets.model(batch.x)
        s = self.sets("model", proxy, batch.draws["model"], memory)
        p = self.sets("personal", logits, batch.draws["personal"], memory)
        error, agreement, ranking = nets.loss(logits, batch.y), consensus(s, p), ranking_loss(logits, s)
        logs = {"cross_entropy": error, "consensus": agreement, "ranking": ranking, "set_size": s.sum(1).mean()}
        return error + self.ranking_weight * agreement * ranking, logs

    def proxy_loss(self, nets: Nets, batch: Batch, down: Tree, memory: Tree) -> tuple[Tensor, Logs]:
        """Return the cross-entropy of the proxy plus the weighted KL divergence from the private model."""
        logits, teacher = nets.model(batch.x), nets.personal(batch.x)
        error, distance = nets.loss(logits, batch.y), losses.kl_divergence(logits, teacher).mean()
        return error + self.distillation_weight * distance, {"cross_entropy": error, "distance": distance}

    def predictors(self) -> dict[str, Predictor]:
        """Return the private model as the client's predictor and the proxy as the server's."""
        return {"personal": predict_with("personal"), "server": predict_model}


def consensus(proxy: Tensor, private: Tensor) -> Tensor:
    """Return the mean consensus c of two sets of classes as in the released code. Both have shape (B, Y) and contain 1 and 0."""
    both, either = (proxy * private).sum(1), proxy.maximum(private).sum(1)
    return (both / torch.where(private.sum(1) <= proxy.sum(1), either, proxy.sum(1))).mean()


def ranking_loss(logits: Tensor, chosen: Tensor) -> Tensor:
    """Return the mean of max(0, o_j - o_i) over classes i in the set and j outside of it, or 0 if the set contains all classes.

    `chosen` (B, Y) contains 1 for classes in the set and 0 for the others, with at least one 1 in each row.
    """
    o = losses.wide(logits)
    pairs = chosen[:, :, None] * (1 - chosen)[:, None, :]
    away = (o[:, None, :] - o[:, :, None]).clamp(min=0)
    return ((pairs * away).sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)).mean()
