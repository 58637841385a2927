"""FedKD: a private mentor and a common mentee teach each other. Changes of the mentee are sent as truncated SVDs in both directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedloom import losses, tree
from fedloom.method import (
    Architecture,
    Batch,
    Client,
    ClientData,
    Combines,
    Downlink,
    Logs,
    Method,
    Need,
    Paper,
    Phase,
    Predictor,
    Round,
    Task,
    Train,
    Turn,
    predict_model,
    predict_with,
)
from fedloom.nets import Nets, without_negative_variances
from fedloom.ranges import NonNegative, Share
from fedloom.tree import Tree, Weights

LEAST = 1e-6  # minimum of the sum of cross-entropies by which the distillation terms are divided


@dataclass(frozen=True)
class FedKD(Method):
    """FedKD (Wu et al., Nature Communications 2022): federated learning with knowledge distillation and compressed updates.

    Sent: Compressed changes of the common mentee `model`, whose architecture is `common_model`, are sent in both directions. Kept: Each
    client keeps its private mentor `personal`, which has the client's own architecture, `map`, a linear map from the mentee's features to
    the mentor's features, and the mentee that it received last. Clients are scored with the mentor; `server_accuracy` scores the mentee.

    With the cross-entropies C_s and C_t of mentee and mentor, predicted probabilities p and features z, every step minimises

        C_t + (KL(p_s || p_t) + H) / (C_t + C_s)   over the mentor,
        C_s + (KL(p_t || p_s) + H) / (C_t + C_s)   over the mentee,   H = mean (z_t - map(z_s))^2.

    The first argument of each KL divergence and the divisor are constants. The divisor makes the distillation weak while the models have
    large errors.

    A matrix of changes with singular values s (for a convolution, with one row per output channel) is compressed to its first r singular
    vectors, which are r (rows + columns) numbers. r is the smallest number with sum_{i <= r} s_i^2 >= T sum s_i^2. T grows linearly over
    the rounds. Vectors and running statistics are not compressed. The server compresses the mean of the clients' changes with the same T,
    adds the result to its mentee, and sends the compressed mean. To use it, a client needs the mentee of the previous round. A client
    that was not in the previous round receives the whole mentee.

    Differences from the released code: r is the smallest rank that reaches T; in the released code, a matrix that needs all singular
    values becomes 0. H compares only the last features; in the released code, it also compares hidden layers and attention maps of a
    transformer. No gradient flows through teachers and divisor. The KL divergence is a mean over examples, not over examples and classes.
    HtFLlib and PFLlib compress the weights, not their changes.
    """

    energy_start: Share = 0.95
    """Initial fraction T of the sum of squared singular values that is sent."""
    energy_end: Share = 0.98
    """Fraction T in the last round. With 1, compression loses nothing."""
    hidden_weight: NonNegative = 1.0
    """Weight of H. With 0, mentor and mentee teach each other only by their predictions."""

    equal_shares: ClassVar[bool] = True
    uses_rounds: ClassVar[bool] = True
    also_travels: ClassVar[tuple[str, ...]] = ("update", "ranks")
    combines: ClassVar[Combines] = "individual"
    needs: ClassVar[tuple[Need, ...]] = ("classes", "vector", "head", "common_model")
    paper: ClassVar[Paper] = Paper(
        "Communication-efficient federated learning via knowledge distillation",
        "Wu, Wu, Lyu, Huang, Xie",
        "Nature Communications 2022",
        "https://arxiv.org/abs/2108.13323",
    )

    # initial state

    def nets(self, arch: Architecture, task: Task) -> dict[str, nn.Module]:
        """Return the mentee, the mentor, and the map between their features."""
        between = nn.Linear(arch.common.features, arch.features, bias=False)
        return {"model": arch.common.model(), "personal": arch.model(), "map": between}

    def init_memory(self, weights: Weights, task: Task, data: ClientData) -> Tree:
        """Return the mentee."""
        return {"mentee": self.travelling(weights)}

    def init_server(self, weights: Weights, task: Task, round: Round) -> Tree:
        """Return the server's state: the mentee, facts about the last aggregation, and the number of rounds.

        The facts are the mean change, the round, and `holders` (K,), which marks the clients that have the mentee before this change.
        """
        mentee = self.travelling(weights)
        return {
            "weights": mentee,
            "change": tree.zeros_like(mentee),
            "number": torch.tensor(-1),
            "holders": torch.zeros(task.n_clients, dtype=torch.bool),
            "rounds": torch.tensor(task.rounds),
        }

    # messages

    def downlink(self, server: Tree, cohort: Sequence[int], round: Round) -> Downlink:
        """Return the compressed change for clients that have the mentee before it, and the whole mentee for other clients."""
        whole = {"weights": server["weights"], "update": {"params": {}, "buffers": {}}}
        latest = int(server["number"])
        if latest + 1 != round.number or latest < 0:  # the previous round was skipped or undone
            return Downlink(whole)
        change = compressed(server["change"], self.energy(latest, int(server["rounds"])))
        change["weights"] = {"params": {}, "buffers": {}}
        messages = [change if server["holders"][client] else whole for client in cohort]
        same = all(message is messages[0] for message in messages)
        return Downlink(messages[0]) if same else Downlink(each=messages)

    def deploy(self, server: Tree, task: Task, round: Round) -> Downlink:
        """Return the whole mentee."""
        return Downlink({"weights": server["weights"]})

    def receive(self, weights: Weights, down: Tree, memory: Tree) -> Weights:
        """Return the client's weights with the received mentee, or with its previous mentee plus the received change."""
        if down.get("weights", {}).get("params"):
            return super().receive(weights, down, memory)
        mentee = changed(memory["mentee"], restored(down["update"], memory["mentee"]))
        return tree.merge(weights, mentee)

    def uplink(self, client: Client, received: Weights, down: Tree, turn: Turn) -> tuple[Tree, Tree]:
        """Return the compressed change of the mentee as the uplink, and keep the received mentee."""
        before = self.travelling(received)
        change = tree.sub(self.travelling(client.weights), before)
        return compressed(change, self.energy(turn.number, turn.last + 1)), {"mentee": before}

    def ragged(self, uplink: Tree) -> Mapping[str, int]:
        """Return the rank of every compressed matrix, by the paths of its two factors."""
        sent = uplink["update"]["params"]
        names = [name for name in sorted(sent) if isinstance(sent[name], dict) and "left" in sent[name]]
        ranks = zip(
            names, uplink["ranks"].flatten().tolist(), strict=False
        )  # the form of `ranks` is checked afterwards
        return {f"update/params/{name}/{side}": rank for name, rank in ranks for side in ("left", "right")}

    def uplink_fault(self, uplink: Tree, class_counts: Tensor | None) -> str:
        """Return a message if a factor has more rows than its matrix has rows or columns.

        Return an empty string otherwise.
        """
        for name, sent in uplink["update"]["params"].items():
            if isinstance(sent, dict) and len(sent["left"]) > min(sent["left"].shape[1], sent["right"].shape[1]):
                return f"'update/params/{name}' has more singular vectors than the matrix has rows or columns"
        return ""

    def energy(self, number: int, rounds: int) -> float:
        """Return T in round `number` (from 0). T is `energy_end` in the last of `rounds` rounds."""
        return self.energy_start + (self.energy_end - self.energy_start) * (number + 1) / rounds

    # training

    def phases(self) -> tuple[Phase, ...]:
        """Return one phase that trains all nets."""
        nets = ("model", "personal", "map") if self.hidden_weight else ("model", "personal")
        return (Train("train", self.loss, nets, self.local_optimizer(), epochs=self.local_epochs),)

    def loss(self, nets: Nets, batch: Batch, down: Tree, memory: Tree) -> tuple[Tensor, Logs]:
        """Return the sum of the losses of mentor and mentee.

        The sum contains H once, because its gradient in each net is that of the net's own loss.
        """
        small, large = nets.model.body(batch.x), nets.personal.body(batch.x)
        mentee, mentor = nets.model.head(small), nets.personal.head(large)
        first, second = nets.loss(mentor, batch.y), nets.loss(mentee, batch.y)
        distance = losses.kl_divergence(mentor, mentee).mean() + losses.kl_divergence(mentee, mentor).mean()
        hidden = (losses.wide(large) - losses.wide(nets.map(small))).square().mean()
        divisor = (first + second).detach().clamp(min=LEAST)
        total = first + second + (distance + self.hidden_weight * hidden) / divisor
        return total, {"cross_entropy": first, "mentee_cross_entropy": second, "distance": distance, "hidden": hidden}

    def aggregate(self, server: Tree, uplinks: Sequence[Tree], round: Round) -> Tree:
        """Return the mentee plus the compressed mean change."""
        mentee = server["weights"]
        change = tree.mean([restored(uplink["update"], mentee) for uplink in uplinks], round.shares)
        sent = compressed(change, self.energy(round.number, int(server["rounds"])))
        holders = torch.zeros_like(server["holders"])
        holders[[arrival.client for arrival in round.arrivals]] = True
        after = changed(mentee, restored(sent["update"], mentee))
        number = torch.full_like(server["number"], round.number)
        return {**server, "weights": after, "change": change, "number": number, "holders": holders}

    def predictors(self) -> dict[str, Predictor]:
        """Return the mentor as the client's predictor and the mentee as the server's."""
        return {"personal": predict_with("personal"), "server": predict_model}


def compressed(change: Weights, energy: float) -> Tree:
    """Return `update`, in which each matrix of the change is replaced by two factors, and `ranks`, the ranks (L,) of the matrices.

    Ranks are in the alphabetical order of the names, because a message may arrive in another order. Other tensors are not changed.
    """
    params: dict[str, Any] = {}
    for name, value in change["params"].items():
        params[name] = factors(value.flatten(1), energy) if is_matrix(value) else value
    ranks = [len(sent["left"]) for _, sent in sorted(params.items()) if isinstance(sent, dict)]
    return {"update": {**change, "params": params}, "ranks": torch.tensor(ranks, dtype=torch.int32)}


def restored(update: Tree, like: Weights) -> Weights:
    """Return the change in an `update` of `compressed`, with the shapes of `like`."""

    def whole(sent: Any, shape: torch.Size) -> Tensor:
        value: Tensor = (sent["left"].T @ sent["right"]).view(shape) if isinstance(sent, dict) else sent
        return value

    params = {name: whole(update["params"][name], value.shape) for name, value in like["params"].items()}
    return {**like, "params": params, "buffers": {name: update["buffers"][name] for name in like["buffers"]}}


def is_matrix(value: Tensor) -> bool:
    """Return whether a tensor is sent as two factors, which is so if it has several rows and several columns."""
    return value.ndim > 1 and len(value) > 1 and value[0].numel() > 1


def factors(matrix: Tensor, energy: float) -> dict[str, Tensor]:
    """Return factors of a matrix (m, n) that keep a fraction `energy` of its squared singular values: `left` (r, m) and `right` (r, n).

    The matrix is left.T @ right. Both factors are scaled by the square roots of the singular values. If the matrix contains numbers that
    are not finite, the factors are NaN.
    """
    if not bool(matrix.isfinite().all()):
        return {
            side: matrix.new_full((1, n), torch.nan) for side, n in zip(("left", "right"), matrix.shape, strict=True)
        }
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    kept = s.double().square().cumsum(0)
    rank = int((kept < energy * kept[-1]).sum()) + 1 if kept[-1] > 0 else 0
    roots = s[:rank].sqrt()
    pair = {"left": (u[:, :rank] * roots).T, "right": roots[:, None] * v[:rank]}
    return {
        side: factor.contiguous() for side, factor in pair.items()
    }  # contiguous like received tensors, so that bits are equal


def changed(mentee: Weights, change: Weights) -> Weights:
    """Return the mentee plus a change."""
    return without_negative_variances(tree.add(mentee, change))
