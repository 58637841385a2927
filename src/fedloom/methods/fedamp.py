"""FedAMP: each client is pulled towards a combination of all clients' models in which similar models have larger weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedloom import losses, tree
from fedloom.method import Batch, Downlink, Logs, Paper, Round, Task
from fedloom.methods.kept_models import KeptModels, combination
from fedloom.nets import Nets
from fedloom.ranges import Fraction, NonNegative, Positive
from fedloom.tree import Tree, Weights


@dataclass(frozen=True, kw_only=True)
class FedAMP(KeptModels):
    """FedAMP and HeurFedAMP (Huang et al., AAAI 2021): federated attentive message passing.

    Sent: The uplink contains the client's model w_i. The downlink contains a separate model for each client, u_i = sum_j xi_ij w_j.
    Kept: Each client keeps w_i. The server keeps the latest model of every client.

    A local update starts from w_i and minimises f_i(w) + mu / (2 alpha) ||w - u_i||^2. The weights for j != i are


    - `attention=distance` (FedAMP): xi_ij = (alpha / sigma) exp(-||w_i - w_j||^2 / sigma);
    - `attention=cosine` (HeurFedAMP): xi_ij proportional to exp(sigma cos(w_i, w_j)), with the sum 1 - own_share.

    The weight xi_ii is 1 minus their sum. Models of clients that have not sent one yet have weight 0. Clients are scored with w_i; there
    is no server model.

    Differences from the paper: if the xi_ij of FedAMP (j != i) sum to more than 1, they are divided by their sum, because u_i would
    otherwise be an extrapolation away from w_i; xi_ii is then 0, and `server.own_weight` (the mean xi_ii) shows it. Only parameters are
    sent; running statistics stay with the client. The pull is the gradient of a squared distance, as in the paper, unlike in public code.
    """

    mu: NonNegative = 0.1
    """Weight of the pull towards u_i (the paper's lambda). With 0, every client trains alone."""
    alpha: Positive = 1.0
    """Step size of the server. A large value makes the pull weak and the mixing strong. lr mu / alpha must be below 2."""
    attention: Literal["distance", "cosine"] = "distance"
    """Measure of similarity: the distance between the models (FedAMP) or their cosine (HeurFedAMP)."""
    sigma: Positive = 1.0
    """With `attention=distance`, the squared distance at which xi_ij falls to 1/e; with `cosine`, the factor of the cosine."""
    own_share: Fraction = 0.1
    """The weight xi_ii with `attention=cosine`."""

    paper: ClassVar[Paper] = Paper(
        "Personalized cross-silo federated learning on non-IID data",
        "Huang, Chu, Zhou, Wang, Liu, Pei, Zhang",
        "AAAI 2021",
        "https://arxiv.org/abs/2007.03797",
    )

    def __post_init__(self) -> None:
        """Raise ValueError if the pull diverges, or if an option has no effect."""
        super().__post_init__()
        if (factor := self.lr * self.mu / self.alpha) >= 2:
            raise ValueError(
                f"alpha={self.alpha}: the pull diverges, because lr mu / alpha = {factor:g} is not below 2"
            )
        if self.attention == "distance" and self.own_share != FedAMP.own_share:
            raise ValueError(f"own_share={self.own_share}: has no effect with attention=distance; set attention=cosine")

    def sendable(self, weights: Weights) -> Weights:
        """Return the parameters of the model."""
        return {"params": super().sendable(weights)["params"], "buffers": {}}

    def downlink(self, server: Tree, cohort: Sequence[int], round: Round) -> Downlink:
        """Return u_i for every member of the cohort."""
        each = [{"model": combination(server["model"], self.attentions(server, i))} for i in cohort]
        return Downlink({}, each)

    def deploy(self, server: Tree, task: Task, round: Round) -> Downlink:
        """Return the mean of the models that have been sent, or the initial model if there are none.

        Clients predict with their own models. Clients that join later are pulled towards this mean.
        """
        sent = server["sent"] if server["sent"].any() else torch.ones_like(server["sent"])
        return Downlink({"model": combination(server["model"], sent.double() / sent.sum())})

    def attentions(self, server: Tree, i: int) -> Tensor:
        """Return the weights xi_ij (K,) of all clients' models in u_i, as float64."""
        others = server["sent"].double().clone()
        others[i] = 0
        xi = self.near(server, i, others) if self.attention == "distance" else self.similar(server, i, others)
        xi[i] = (1 - xi.sum()).clamp(min=0)
        return xi

    def near(self, server: Tree, i: int, others: Tensor) -> Tensor:
        """Return FedAMP's weights (K,) of the other models.

        `others` (K,) is 1 for the other clients that have sent a model, and 0 otherwise.
        """
        models = tree.leaves(server["model"])
        squared = torch.stack([(p - p[i]).double().square().flatten(1).sum(1) for p in models]).sum(0)
        xi = others * (-squared / self.sigma).exp() * (self.alpha / self.sigma)
        return xi / xi.sum().clamp(min=1)

    def similar(self, server: Tree, i: int, others: Tensor) -> Tensor:
        """Return HeurFedAMP's weights (K,) of the other models. `others` is as for `near`."""
        rows = [p.double().flatten(1) for p in tree.leaves(server["model"])]
        products = torch.stack([p @ p[i] for p in rows]).sum(0)
        norms = torch.stack([p.square().sum(1) for p in rows]).sum(0).sqrt()
        cosines = products / (norms * norms[i]).clamp(min=1e-30)
        xi = others * (self.sigma * (cosines - 1)).exp()
        return (1 - self.own_share) * xi / xi.sum().clamp(min=1e-300)

    def loss(self, nets: Nets, batch: Batch, down: Tree, memory: Tree) -> tuple[Tensor, Logs]:
        """Return the loss plus mu / (2 alpha) ||w - u_i||^2."""
        error = nets.loss(nets.model(batch.x), batch.y)
        away = losses.squared_distance(nets.params, down["model"]["params"])
        return error + self.mu / (2 * self.alpha) * away, {"cross_entropy": error, "distance": away}

    def server_logs(self, server: Tree, uplinks: Sequence[Tree], round: Round) -> Mapping[str, float]:
        """Return the mean of xi_ii over the clients of this round (`own_weight`)."""
        own = [float(self.attentions(server, arrival.client)[arrival.client]) for arrival in round.arrivals]
        return {"own_weight": sum(own) / len(own)}
