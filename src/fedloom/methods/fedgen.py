"""FedGen: the server learns a generator of features from the clients' heads, and clients learn from its features."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedloom import losses, optim, tree
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
    Round,
    Task,
    Train,
    Turn,
)
from fedloom.methods.feature_statistics import among, counts_fault
from fedloom.nets import Nets, select
from fedloom.ranges import Count, NonNegative, Positive, Share
from fedloom.rng import Stream
from fedloom.tree import Tree, Weights

LEAST = 1e-4  # lower limit of the decaying factor on alpha and beta


class FeatureGenerator(nn.Module):
    """A net that generates features (B, D) from noise (B, N) and one-hot labels (B, Y)."""

    def __init__(self, noise: int, n_classes: int, hidden: int, features: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(noise + n_classes, hidden), nn.ReLU(), nn.Linear(hidden, features))

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Return the features."""
        features: Tensor = self.layers(torch.cat([noise, labels], 1))
        return features


@dataclass(frozen=True, kw_only=True)
class FedGen(Method):
    """FedGen (Zhu, Hong, Zhou; ICML 2021): data-free knowledge distillation with a generator of features.

    Sent: The model is sent in both directions. The server also sends the generator G, and clients also send their class counts. Kept:
    Clients keep nothing between rounds.

    From the second round on, a client adds two terms to its cross-entropy. The first is alpha times the cross-entropy of head(G(noise,
    y)), with y drawn from the classes that G has learned. The second is beta times the KL divergence of the model's predictions from those
    of head(G(noise, y_i)) for the labels y_i of the batch; the latter are constants. The server trains G so that the clients' heads
    recognise the features: each head's cross-entropy is weighted by the client's fraction of the class. A diversity term rewards features
    that differ if the noise differs.

    As in the released code, alpha and beta decay over rounds. Differences from the released code: an epoch is a pass over the client's
    examples, the generator has no BatchNorm, the noise is normal, and the server resets Adam's moments in each round.
    """

    alpha: NonNegative = 10.0
    """Weight of the cross-entropy on generated features."""
    beta: NonNegative = 10.0
    """Weight of the KL divergence from the predictions for generated features."""
    weight_decay_per_round: Share = 0.98
    """Factor by which alpha and beta are multiplied after every round."""
    n_synthetic: Count = 32
    """Number of generated features per step, on clients and on the server."""
    noise_size: Count = 32
    """Number of dimensions of the noise."""
    hidden_size: Count = 256
    """Number of hidden units of the generator."""
    server_steps: Count = 50
    """Number of generator steps in a round."""
    generator_lr: Positive = 3e-4
    """Learning rate of the generator (Adam)."""
    diversity: NonNegative = 1.0
    """Weight of the diversity term."""

    shared: ClassVar[tuple[str, ...]] = ("model", "generator")
    also_travels: ClassVar[tuple[str, ...]] = ("counts", "learned", "strength")
    combines: ClassVar[Combines] = "individual"
    needs: ClassVar[tuple[Need, ...]] = ("classes", "vector", "head")
    paper: ClassVar[Paper] = Paper(
        "Data-free knowledge distillation for heterogeneous federated learning",
        "Zhu, Hong, Zhou",
        "ICML 2021",
        "https://arxiv.org/abs/2105.10056",
    )

    def nets(self, arch: Architecture, task: Task) -> dict[str, nn.Module]:
        """Return the model and the generator."""
        model, n_classes = arch.model(), task.n_classes
        return {
            "model": model,
            "generator": FeatureGenerator(self.noise_size, n_classes, self.hidden_size, arch.features),
        }

    def init_memory(self, weights: Weights, task: Task, data: ClientData) -> Tree:
        """Return the class counts (Y,)."""
        return {"counts": data.class_counts}

    def init_server(self, weights: Weights, task: Task, round: Round) -> Tree:
        """Return the model, the generator and zeros (Y,), because the generator has not learned any class."""
        return super().init_server(weights, task, round) | {"learned": torch.zeros(task.n_classes)}

    def downlink(self, server: Tree, cohort: Sequence[int], round: Round) -> Downlink:
        """Return the model, the generator, the classes that it has learned, and the factor on alpha and beta,
        which is 0 in the first round.
        """
        strength = max(self.weight_decay_per_round**round.number, LEAST) if round.number else 0.0
        return Downlink({**server, "strength": torch.tensor(strength)})

    def phases(self) -> tuple[Phase, ...]:
        """Return the phase that trains the model."""
        optimizer = self.local_optimizer()
        return (Train("train", self.loss, ("model",), optimizer, epochs=self.local_epochs, draw=self.draw),)

    def draw(self, batch: Batch, task: Task, rng: Stream) -> Mapping[str, Tensor]:
        """Draw noise and numbers in [0, 1) that select labels, and noise for the labels of the batch."""
        noise, own = (rng.normal((n, self.noise_size)) for n in (self.n_synthetic, len(batch.y)))
        return {"noise": noise, "choice": rng.uniform((self.n_synthetic,)), "own": own}

    def loss(self, nets: Nets, batch: Batch, down: Tree, memory: Tree) -> tuple[Tensor, Logs]:
        """Return the cross-entropy plus alpha times that of generated features plus beta times the KL divergence."""
        logits, n_classes = nets.model(batch.x), len(down["learned"])
        y = among(down["learned"], batch.draws["choice"])
        generated = nets.generator(batch.draws["noise"], losses.one_hot(y, n_classes)).detach()
        alike = nets.generator(batch.draws["own"], losses.one_hot(batch.y, n_classes))
        known, distance = down["learned"][batch.y], losses.kl_divergence(logits, nets.model.head(alike))
        error, synthetic = nets.loss(logits, batch.y), losses.cross_entropy(nets.model.head(generated), y)
        added = self.alpha * synthetic + self.beta * (known * distance).mean()
        return error + down["strength"] * added, {"cross_entropy": error, "synthetic": synthetic}

    def uplink(self, client: Client, received: Weights, down: Tree, turn: Turn) -> tuple[Tree, Tree]:
        """Return the model and the class counts."""
        own = select(client.weights, ("model",), buffers=self.buffers == "shared")
        return {"weights": own, "counts": client.memory["counts"]}, client.memory

    def uplink_fault(self, uplink: Tree, class_counts: Tensor | None) -> str:
        """Return a fault if the counts are not the client's class counts."""
        return counts_fault(uplink["counts"], class_counts)

    def aggregate(self, server: Tree, uplinks: Sequence[Tree], round: Round) -> Tree:
        """Return the mean model, and the generator after training with the heads in the uplinks."""
        counts = torch.stack([uplink["counts"] for uplink in uplinks])
        heads = [select(uplink["weights"], ("model:head",))["params"] for uplink in uplinks]
        nets, before = round.nets(server["weights"]), select(server["weights"], ("generator",))["params"]

        def loss(generator: dict[str, Tensor], noise: Tensor, y: Tensor) -> Tensor:
            here = nets.with_params(generator)
            z = here.generator(noise, losses.one_hot(y, counts.shape[1]))
            shares = counts[:, y] / counts[:, y].sum(0)  # (m, B)
            taught = [s * -here.with_params(h).model.head(z).log_softmax(1)[torch.arange(len(y)), y]
                      for s, h in zip(shares, heads, strict=True)]  # fmt: skip
            return torch.stack(taught).sum(0).mean() + self.diversity * self.sameness(noise, z)

        held = (counts.sum(0) > 0).to(counts.dtype)
        adam = optim.adam(self.generator_lr)
        generator, _ = optim.fit(loss, before, adam, self.batches(held, round.rng))
        mean = tree.mean([uplink["weights"] for uplink in uplinks], round.shares)
        learned = torch.maximum(server["learned"], held)
        return {"weights": tree.merge(mean, {"params": generator}), "learned": learned}

    def batches(self, held: Tensor, rng: Stream) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield noise and labels, which are uniform over the classes that the clients of the round hold."""
        for _ in range(self.server_steps):
            noise = rng.normal((self.n_synthetic, self.noise_size))
            yield noise, among(held, rng.uniform((self.n_synthetic,)))

    def sameness(self, noise: Tensor, z: Tensor) -> Tensor:
        """Return exp(-mean over pairs of (mean squared distance of the noise) * (mean absolute distance of the features))."""
        apart = (noise[:, None] - noise).square().mean(2) * (z[:, None] - z).abs().mean(2)
        return (-apart.mean()).exp()
