"""FedFomo: each client receives a few models of other clients, and moves towards those with a smaller loss on its validation examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedloom import tree
from fedloom.method import Batch, Client, ClientData, Combines, Downlink, Paper, Phase, Round, Set, Sweep, Task, Turn
from fedloom.methods.kept_models import KeptModels, combination
from fedloom.nets import Nets
from fedloom.ranges import Count, NonNegative, Proportion
from fedloom.tree import Tree, Weights


@dataclass(frozen=True, kw_only=True)
class FedFomo(KeptModels):
    """FedFomo (Zhang, Sapra, Fidler, Yeung, Alvarez; ICLR 2021): first-order model optimisation.

    Sent: The uplink contains the client's model and its affinities (K,). The downlink contains the models of `candidates` other clients,
    and the numbers of these clients. Kept: Each client keeps its model and its affinities.

    With L the loss on the client's validation examples and w the client's model, a local update

    1. computes v_n = (L(w) - L(w_n)) / ||w_n - w|| for each candidate n,
    2. replaces w by w + sum_n p_n (w_n - w), with p_n = max(v_n, 0) / sum_m max(v_m, 0); if no v_n is positive, w does not change,
    3. adds v_n / sum_m |v_m| to the affinity of n, and trains.

    The server keeps the latest model of every client. It sends a client the models for which this client has the highest affinities; with
    probability epsilon for each place, it sends a random other model instead. Clients are scored with the model that results from their
    last local update; there is no server model. Validation examples are those of `eval.valid=0.2`, which no method trains on. If a client
    has none, it computes L on its training examples.

    Differences from the released code: w is the client's current model. In the published commands of the released code, w is the
    client's initial model, to which the client also returns if no candidate is better. Affinities are divided by the sum of the |v_n|, not
    by |sum of v_n|, which may be close to 0. epsilon decays per round, not per epoch.
    """

    candidates: Count = 5
    """Number of models that a client receives in a round. The maximum is K - 1, the number of other clients."""
    epsilon: Proportion = 0.3
    """Probability that a place in a downlink gets a random model instead of that with the highest affinity, in the first round."""
    epsilon_decay: NonNegative = 0.05
    """Decrease of epsilon per round, down to 0."""

    also_travels: ClassVar[tuple[str, ...]] = (*KeptModels.also_travels, "candidates", "affinity")
    combines: ClassVar[Combines] = "individual"
    paper: ClassVar[Paper] = Paper(
        "Personalized federated learning with first order model optimization",
        "Zhang, Sapra, Fidler, Yeung, Alvarez",
        "ICLR 2021",
        "https://arxiv.org/abs/2012.08565",
    )

    def places(self, n_clients: int) -> int:
        """Return the number of models in a downlink."""
        return max(min(self.candidates, n_clients - 1), 1)

    def init_memory(self, weights: Weights, task: Task, data: ClientData) -> Tree:
        """Return zero affinities (K,), and zero sums of the losses of the client's own model and of the candidates."""
        losses = {"sums": torch.zeros(1 + self.places(task.n_clients)), "examples": torch.zeros(())}
        return {"affinity": torch.zeros(task.n_clients), "losses": losses}

    def init_server(self, weights: Weights, task: Task, round: Round) -> Tree:
        """Return the initial model for every client, and zero affinities (K, K), where row i contains the affinities of client i."""
        return super().init_server(weights, task, round) | {"affinity": torch.zeros(task.n_clients, task.n_clients)}

    def downlink(self, server: Tree, cohort: Sequence[int], round: Round) -> Downlink:
        """Return the candidates of every member of the cohort."""
        return Downlink({}, [self.offer(server, self.chosen(server, i, round)) for i in cohort])

    def deploy(self, server: Tree, task: Task, round: Round) -> Downlink:
        """Return the models with the highest sums of affinities, for clients that join later.

        Other clients predict with their own models.
        """
        order = server["affinity"].sum(0).argsort(descending=True, stable=True)
        known = [j for j in order.tolist() if server["sent"][j]]
        return Downlink(self.offer(server, known[: self.places(task.n_clients)]))

    def offer(self, server: Tree, chosen: Sequence[int]) -> Tree:
        """Return the models of the chosen clients, stacked, and the numbers of these clients.

        An empty place has the number -1 and the model of client 0.
        """
        n = self.places(len(server["sent"]))
        numbers = torch.tensor([*chosen, *[-1] * (n - len(chosen))])
        models = tree.map_tree(lambda p: p[numbers.clamp(min=0)], server["model"])
        return {"model": models, "candidates": numbers}

    def chosen(self, server: Tree, i: int, round: Round) -> list[int]:
        """Return the numbers of client i's candidates, whose models have been sent to the server."""
        others = [j for j in round.rng.permutation(round.n_clients).tolist() if j != i and server["sent"][j]]
        best = sorted(others, key=lambda j: -float(server["affinity"][i, j]))  # equal affinities stay in random order
        explores = round.rng.uniform((self.places(round.n_clients),)) < self.epsilon - self.epsilon_decay * round.number
        found: list[int] = []
        for anyone in explores.tolist()[: len(others)]:
            found.append(next(j for j in (others if anyone else best) if j not in found))
        return found

    def phases(self) -> tuple[Phase, ...]:
        """Return a sweep over the validation examples, the move, and FedAvg's training."""
        return Sweep("losses", self.compare, rows="valid"), Set("move", self.move), *super().phases()

    def compare(self, nets: Nets, batch: Batch, total: Tree, down: Tree, memory: Tree) -> Tree:
        """Add the losses of the client's own model and of the candidates on a batch."""
        models = [nets, *(nets.at(model) for model in tree.unstack(down["model"]))]
        found = torch.stack([here.loss(here.model(batch.x), batch.y) for here in models]).to(total["sums"].dtype)
        n = len(batch.y)
        return {"sums": total["sums"] + n * found, "examples": total["examples"] + n}

    def gains(self, weights: Weights, down: Tree, memory: Tree) -> Tensor:
        """Return v_n (M,) of every place. v_n is 0 for an empty place, and for a loss that is not finite."""
        losses = memory["losses"]["sums"] / memory["losses"]["examples"].clamp(min=1)
        models = down["model"]["params"]
        squared = torch.stack([(p - weights["params"][name]).square().flatten(1).sum(1) for name, p in models.items()])
        gains = (losses[0] - losses[1:]) / squared.sum(0).sqrt().clamp(min=1e-12)
        return torch.where((down["candidates"] >= 0) & gains.isfinite(), gains, 0)

    def move(self, weights: Weights, down: Tree, memory: Tree) -> Weights:
        """Return the weights after step 2."""
        better = self.gains(weights, down, memory).clamp(min=0)
        if not better.any():
            return weights
        return tree.merge(weights, combination(down["model"], better / better.sum()))

    def uplink(self, client: Client, received: Weights, down: Tree, turn: Turn) -> tuple[Tree, Tree]:
        """Return the model and the affinities as the uplink, and keep the affinities."""
        sent, memory = super().uplink(client, received, down, turn)
        gains = self.gains(received, down, memory)
        added = gains / gains.abs().sum().clamp(min=1e-12)
        affinity = memory["affinity"].index_add(0, down["candidates"].clamp(min=0), added)
        return sent | {"affinity": affinity}, {**memory, "affinity": affinity}

    def aggregate(self, server: Tree, uplinks: Sequence[Tree], round: Round) -> Tree:
        """Return the server with the cohort's new models and affinities."""
        affinity = server["affinity"].clone()
        for arrival, uplink in zip(round.arrivals, uplinks, strict=True):
            affinity[arrival.client] = uplink["affinity"]
        return {**super().aggregate(server, uplinks, round), "affinity": affinity}

    def server_logs(self, server: Tree, uplinks: Sequence[Tree], round: Round) -> Mapping[str, float]:
        """Return the mean affinity of the clients of this round (`affinity`). It is positive if received models have smaller losses."""
        return {"affinity": sum(float(uplink["affinity"].mean()) for uplink in uplinks) / len(uplinks)}
