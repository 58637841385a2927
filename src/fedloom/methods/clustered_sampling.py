"""Clustered sampling: every cohort has one client of each group of clients with similar changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedloom import tree
from fedloom.errors import ConfigError
from fedloom.method import Combines, Method, Paper, Round, Task
from fedloom.rng import Stream
from fedloom.tree import Tree, Weights

Urn = npt.NDArray[np.int64]  # (K,) how often each client is in the urn
Group = list[int]  # clients


@dataclass(frozen=True)
class ClusteredSampling(Method):
    """Clustered sampling (Fraboni et al., ICML 2021, algorithms 1 and 2): representative cohorts without bias.

    Sent: The whole model is sent in both directions. Kept: Clients keep nothing between rounds.

    There are m urns, and one client is drawn from each. Every urn contains 1/m of all examples, and all urns together contain each
    client's examples m times, so client k is drawn m n_k / N times in expectation. The m models are averaged with equal weights. In
    algorithm 2 (`urns=similarity`), clients are clustered by their last changes with Ward's linkage. The largest clusters that fit into
    an urn start one urn each, and the clients of the other clusters fill the urns. The server stores the last changes (K times the size
    of the model). In algorithm 1 (`urns=size`), clients fill the urns in the order of their numbers of examples.

    If a client is drawn twice, it trains once, and its model has twice the weight. In the released code, it trains twice, with different
    batches. A cohort may therefore have fewer than m clients. A client with more than 1/m of all examples fills urns alone (the released
    code fails). As in the released code, Ward's linkage is applied to the rows of the matrix of distances, and a client that has never
    been drawn has distance 0 (`arccos`) to all others. Lost clients are omitted from the mean.
    """

    urns: Literal["similarity", "size"] = "similarity"
    """Criterion for filling urns: similarity of the clients' last changes (algorithm 2) or numbers of examples (algorithm 1)."""
    distance: Literal["arccos", "l1", "l2"] = "arccos"
    """The distance between changes: the angle, the sum of absolute differences, or the sum of squared differences."""

    combines: ClassVar[Combines] = "individual"
    paper: ClassVar[Paper] = Paper(
        "Clustered sampling: Low-variance and improved representativity for clients selection in federated learning",
        "Fraboni, Vidal, Kameni, Lorenzi",
        "ICML 2021",
        "https://arxiv.org/abs/2105.05883",
    )

    def init_server(self, weights: Weights, task: Task, round: Round) -> Tree:
        """Return the model, the last changes (K, P), which are 0, and the draw for the first round.

        The draw (K,) is the number of times that each client is drawn.
        """
        server = super().init_server(weights, task, round)
        n_params = sum(p.numel() for p in server["weights"]["params"].values()) if self.urns == "similarity" else 0
        changes = torch.zeros(task.n_clients, n_params)
        return server | {"changes": changes, "drawn": self.draw(changes, task.max_cohort, round)}

    def cohort(self, server: Tree, task: Task, size: int, round: Round) -> Sequence[int]:
        """Return the clients that were drawn, without repetitions."""
        if size != task.max_cohort:
            raise ConfigError(
                f"participation=MIN-MAX: clustered_sampling needs the same number of clients in every round, not {size} and "
                f"{task.max_cohort}; set one number"
            )
        found: list[int] = server["drawn"].nonzero()[:, 0].tolist()
        return found

    def aggregate(self, server: Tree, uplinks: Sequence[Tree], round: Round) -> Tree:
        """Return the mean of the models, the last changes, and the draw for the next round.

        The weight of a model in the mean is proportional to the number of times that its client was drawn.
        """
        clients = [arrival.client for arrival in round.arrivals]
        times = server["drawn"][clients].double()
        mean = tree.mean([uplink["weights"] for uplink in uplinks], (times / times.sum()).tolist())
        changes = server["changes"].clone()
        if self.urns == "similarity":
            for i, uplink in zip(clients, uplinks, strict=True):
                moved = tree.sub(uplink["weights"]["params"], server["weights"]["params"])
                changes[i] = torch.cat([leaf.flatten() for leaf in tree.leaves(moved)])
        drawn = self.draw(changes, int(server["drawn"].sum()), round)
        return {"weights": mean, "changes": changes, "drawn": drawn}

    def draw(self, changes: Tensor, m: int, round: Round) -> Tensor:
        """Draw one client from each of m urns, and return the number of times that each client is drawn (K,)."""
        if not all(round.examples):
            raise ConfigError(
                "method=clustered_sampling: needs the number of examples of every client before the first round"
            )
        if self.urns == "size":
            urns = filled([], largest_first(round.examples), round.examples, m)
        else:
            urns = self.similar(changes, round.examples, m, round.rng)
        tickets = round.rng.integers(sum(round.examples), (m,)).numpy()
        drawn = [
            int(np.searchsorted(urn.cumsum(), ticket, side="right")) for urn, ticket in zip(urns, tickets, strict=True)
        ]
        return torch.bincount(torch.tensor(drawn), minlength=len(round.examples))

    def similar(self, changes: Tensor, examples: Sequence[int], m: int, rng: Stream) -> list[Urn]:
        """Return the urns of algorithm 2 for the clients' last changes (K, P)."""
        capacity = sum(examples)
        rest = [m * n % capacity for n in examples]
        n_urns = sum(rest) // capacity
        clusters = ward_clusters(self.distances(changes).double().numpy(), rest, capacity)
        clusters.sort(key=lambda cluster: sum(rest[i] for i in cluster))
        split = len(clusters) - n_urns
        shuffled = [cluster[i] for cluster in clusters[:split] for i in rng.permutation(len(cluster)).tolist()]
        return filled(clusters[split:], shuffled, examples, m)

    def distances(self, changes: Tensor) -> Tensor:
        """Return the distances (K, K) between the clients' changes (K, P)."""
        if self.distance != "arccos":
            return torch.cdist(changes, changes, 1) if self.distance == "l1" else torch.cdist(changes, changes).square()
        cosines = tree.cosines([{"change": change} for change in changes])
        moved = changes.any(1)
        known = moved[:, None] & moved & ~torch.eye(len(changes), dtype=torch.bool)
        return torch.where(known, cosines.clamp(-1, 1).arccos(), 0)


def largest_first(examples: Sequence[int]) -> Group:
    """Return the clients in the order of their numbers of examples, largest first."""
    return sorted(range(len(examples)), key=lambda i: -examples[i])


def filled(starts: Sequence[Group], order: Sequence[int], examples: Sequence[int], m: int) -> list[Urn]:
    """Return m urns with sum(examples) places each. Together, they contain the examples of every client m times.

    A client that can fill urns alone does so. The places that then remain for a client are all in the urn that its group in `starts`
    starts. For clients without such a group, they are in the first urns with free places, in the order of `order`.
    """
    capacity, n = sum(examples), len(examples)
    rest = [m * held % capacity for held in examples]
    alone = [np.eye(n, dtype=np.int64)[i] * capacity for i in range(n) for _ in range(m * examples[i] // capacity)]
    urns = [np.zeros(n, np.int64) for _ in range(m - len(alone))]
    for urn, group in zip(urns, starts, strict=False):
        urn[group] = [rest[i] for i in group]
    k = 0
    for i in order:
        left = rest[i]
        while left:
            while urns[k].sum() == capacity:
                k += 1
            part = min(left, capacity - int(urns[k].sum()))
            urns[k][i] += part
            left -= part
    return alone + urns


def ward_clusters(points: npt.NDArray[np.float64], sizes: Sequence[int], capacity: int) -> list[Group]:
    """Return the largest groups of Ward's hierarchical clustering whose sizes sum to at most `capacity`, in order of first members.

    `points` has shape (K, D). `sizes` (K,) are at most `capacity`. Distances are updated by the formula of Lance and Williams.
    """
    n = len(points)
    squared = np.square(points[:, None] - points).sum(2)
    np.fill_diagonal(squared, np.inf)
    counts, groups = np.ones(n), [[i] for i in range(n)]
    whole = {i: [i] for i in range(n)}  # the largest group that fits, by first member
    for _ in range(n - 1):
        i, j = sorted(divmod(int(squared.argmin()), n))
        near, between = counts[i] + counts[j] + counts, squared[i, j]
        merged = ((counts[i] + counts) * squared[i] + (counts[j] + counts) * squared[j] - counts * between) / near
        merged[[i, j]] = np.inf
        squared[i], squared[:, i], squared[j], squared[:, j] = merged, merged, np.inf, np.inf
        counts[i] += counts[j]
        groups[i] = groups[i] + groups[j]
        if sum(sizes[k] for k in groups[i]) <= capacity:
            for k in groups[i]:
                whole.pop(k, None)
            whole[min(groups[i])] = groups[i]
    return [sorted(group) for _, group in sorted(whole.items())]
