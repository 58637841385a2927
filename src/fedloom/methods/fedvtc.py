"""FedVTC: variational transposed convolutions generate images from shared feature statistics, and models are fine-tuned on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

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
    Need,
    Paper,
    Phase,
    Round,
    Sweep,
    Task,
    Train,
    Turn,
)
from fedloom.methods import feature_statistics
from fedloom.methods.fedproto import FedProto
from fedloom.models.vtc import Spread, VtcDecoder
from fedloom.nets import Nets, select
from fedloom.ranges import Count, NonNegative, Positive, Whole
from fedloom.rng import Stream
from fedloom.tree import Tree, Weights


@dataclass(frozen=True, kw_only=True)
class FedVTC(FedProto):
    """FedVTC (Niu et al., ICLR 2026). The publication omits some details; `docs/methods/fedvtc.md` lists those that are reconstructed.

    A client has the nets `body` (g_k), which outputs features z (B, p), `head` (h_k), which outputs logits, and `generator` (psi_k), which
    generates images from features. With `learn_spread`, it also has `spread`. Clients may have different architectures, but p must be the
    same.

    Sent: Clients send prototypes, counts and a variance; the server sends their aggregates c, n and sigma. Kept: Each client keeps all its
    weights (with `share_generator`, the generator is also sent).

    A local update has four phases:

    1. fit: train body and head with the cross-entropy plus the distance to the global prototypes.
    2. statistics: collect feature statistics in a sweep over the client's examples.
    3. generator: train psi_k to reconstruct images from noisy features. The features of the images that it generates from *global*
       latents must match c. Body and head are frozen.
    4. finetune: train body and head on images psi_k(v), with v ~ N(c_y, sigma^2) and uniform y. This happens every Nth round, or on a
       copy before predicting.
    """

    predict_by: Literal["head"] = "head"
    """How clients predict: with their own head."""
    prototype_mean: Literal["weighted", "uniform"] = "weighted"
    """Weight of a client in a class's mean and variance: its number of examples of the class, or the same for all
    clients with the class.
    """
    prototype_weight: NonNegative = 1.0
    """Weight lambda of the distance between an example's features and the global prototype of its class."""
    pull: Literal["plain", "scaled"] = "plain"
    """Form of the distance: the mean squared difference, or half the mean squared difference in units of sigma. In the second form, a
    small sigma makes the pull stronger; `spread_floor` limits it."""
    covariance: feature_statistics.Form = "pooled"
    """sigma^2 within classes: one variance per feature (p,), one per class and feature (Y, p), or one covariance matrix (p, p)."""
    spread_floor: Positive = 0.1
    """The minimum standard deviation of a feature."""
    learn_spread: bool = False
    """Whether each client learns its own sigma_k, as a factor on the empirical one, together with psi_k."""
    generator_form: Literal["linear", "conv"] = "linear"
    """The first layer of psi: a linear map to small images, or a transposed convolution of one pixel."""
    latent: Literal["features", "prototype"] = "features"
    """Mean of the latent from which an image is reconstructed: its own features z, or the global prototype c_y of its class, if any."""
    encoder_learns: bool = False
    """Whether the generator phase also trains the body, so that the gradients of reconstruction and KL reach the body. The phase then adds
    the cross-entropy of the client's head, which does not change. Matching never trains the body."""
    generator_epochs: Count = 1
    """Number of passes over the client's training examples that update the generator."""
    generator_lr: Positive = 1e-3
    """The generator's learning rate (Adam, with moments kept between rounds)."""
    kl_weight: NonNegative = 0.1
    """Weight of KL(N(z, sigma_k^2) || N(c_y, sigma^2)) per feature; it has a gradient only with `learn_spread` or `encoder_learns`."""
    matching: Literal["mean", "mahalanobis", "real", "cycle"] = "mean"
    """The target of g_k(psi_k(v)): c for class means, c per example in units of sigma, class means of real examples, or v itself."""
    matching_weight: NonNegative = 1.0
    """Weight of the distribution matching."""
    n_synthetic: Count = 32
    """Number of synthetic images per step."""
    finetune: Literal["every", "end", "never"] = "every"
    """When to fine-tune: every `finetune_every` rounds, on a copy before predicting (which is then discarded), or never."""
    finetune_every: Count = 1
    """Number of rounds from one fine-tuning to the next."""
    finetune_steps: Count = 50
    """Number of steps of one fine-tuning."""
    finetune_lr: NonNegative = 0.0
    """Learning rate of fine-tuning. With 0, it is the same as `lr`."""
    finetune_part: Literal["model", "head"] = "model"
    """The weights that fine-tuning updates."""
    finetune_mix: bool = True
    """Whether each batch of synthetic examples is combined with a batch of real examples, with equal weight."""
    control: Literal["none", "same-steps", "same-steps-balanced"] = "none"
    """Control arm. The generator's steps and the fine-tuning steps train the classifier on the client's own examples instead, either on
    plain batches or on batches in which the client's classes are equally frequent. There is no generator."""
    share_generator: bool = False
    """Whether the generators are sent and averaged, or stay with their clients."""
    share_rounds: Whole = 0
    """Number of rounds in which generators are sent.

    Afterwards, every client continues with its own. With 0, they are sent in all rounds.
    """

    also_travels: ClassVar[tuple[str, ...]] = (*FedProto.also_travels, "variance", "spread")
    combines: ClassVar[Combines] = "sums"
    needs: ClassVar[tuple[Need, ...]] = ("classes", "pictures", "vector", "head")
    paper: ClassVar[Paper] = Paper(
        "Bridging generalization gap of heterogeneous federated clients using generative models",
        "Niu, Dong, Qin",
        "ICLR 2026",
        "https://arxiv.org/abs/2508.01669",
    )

    def __post_init__(self) -> None:
        """Raise ValueError for options of the generator that would have no effect."""
        super().__post_init__()
        used = {"share_generator": self.share_generator, "learn_spread": self.learn_spread}
        used |= {"encoder_learns": self.encoder_learns, "latent": self.latent != "features"}
        if self.control != "none" and any(used.values()):
            name = next(name for name, is_used in used.items() if is_used)
            raise ValueError(f"control={self.control} has no generator; leave out {name}")
        if self.share_rounds and not self.share_generator:
            raise ValueError(f"share_rounds={self.share_rounds} needs share_generator=true")
        if self.share_rounds and self.finetune == "end":
            raise ValueError(
                f"share_rounds={self.share_rounds}: with finetune=end, new clients would have no generator; use finetune=every"
            )

    # initial state

    def nets(self, arch: Architecture, task: Task) -> dict[str, nn.Module]:
        """Return the body and head of any architecture, and a generator for its features."""
        if self.control != "none":
            return super().nets(arch, task)
        nets = super().nets(arch, task) | {"generator": VtcDecoder(task.width, task.input_shape, self.generator_form)}
        return nets | {"spread": Spread(task.width)} if self.learn_spread else nets

    def init_memory(self, weights: Weights, task: Task, data: ClientData) -> Tree:
        """Return zero counts, sums and sums of squares of the features."""
        return {"statistics": feature_statistics.zeros(self.covariance, task.n_classes, task.width)}

    def init_server(self, weights: Weights, task: Task, round: Round) -> Tree:
        """Return FedProto's prototypes and counts, the variance, and the generator if it is shared."""
        variance = torch.zeros(feature_statistics.shape(self.covariance, task.n_classes, task.width))
        server = super().init_server(weights, task, round) | {"variance": variance}
        return server | {"weights": self.travelling(weights)} if self.share_generator else server

    def travelling(self, weights: Weights) -> Weights:
        """Return the generator if it is shared, or nothing."""
        return select(weights, ("generator",) if self.share_generator else ())

    def receive(self, weights: Weights, down: Tree, memory: Tree) -> Weights:
        """Return the client's own weights, with the received generator if it is shared."""
        return tree.merge(weights, down["weights"]) if "weights" in down else weights

    def downlink(self, server: Tree, cohort: Sequence[int], round: Round) -> Downlink:
        """Return c, n and sigma with its floor applied, and the generator if it is shared in this round.

        sigma contains standard deviations, or the lower triangular factor of a full covariance.
        """
        left_out = {"variance", "weights"} if 0 < self.share_rounds <= round.number else {"variance"}
        return self.message(server, left_out)

    def deploy(self, server: Tree, task: Task, round: Round) -> Downlink:
        """Return the downlink and the latest shared generator.

        Only clients that join later need the generator; predictions do not use it.
        """
        return self.message(server, {"variance"})

    def message(self, server: Tree, left_out: set[str]) -> Downlink:
        """Return the server's state and sigma, without the entries in `left_out`."""
        sent = {key: value for key, value in server.items() if key not in left_out}
        return Downlink(
            sent
            | {"spread": feature_statistics.standard_deviations(server["variance"], self.spread_floor, self.covariance)}
        )

    def phases(self) -> tuple[Phase, ...]:
        """Return the phases fit, statistics and generator, and fine-tuning if it is part of local updates."""
        fit = Train("fit", self.loss, ("body", "head"), self.local_optimizer(), epochs=self.local_epochs)
        nets = ("generator", "spread") if self.learn_spread else ("generator",)
        generator = Train(
            "generator",
            self.generator_loss,
            (*nets, "body") if self.encoder_learns else nets,
            optim.adam(self.generator_lr),
            self.generator_epochs,
            draw=self.draw_latents,
            keep_state=True,
            train_mode=nets,
        )
        if self.control != "none":
            generator = self.on_real_examples(Train("more", self.loss, (), fit.optimizer, self.generator_epochs))
        first = (fit, Sweep("statistics", self.statistics), generator)
        return (*first, self.finetuning()) if self.finetune == "every" else first

    def adapt(self) -> tuple[Phase, ...]:
        """Return the phase that fine-tunes before predicting, if fine-tuning is not part of local updates."""
        return (self.finetuning(),) if self.finetune == "end" else ()

    def finetuning(self) -> Train:
        """Return the fine-tuning phase. It runs in evaluation mode, so running statistics remain those of real images."""
        nets = ("body", "head") if self.finetune_part == "model" else ("head",)
        optimizer = self.local_optimizer(self.finetune_lr or self.lr)
        when = self.finetunes if self.finetune == "every" else None
        tune = partial(Train, "finetune", self.finetune_loss, nets, optimizer, draw=self.draw_latents)
        tuning = tune(steps=self.finetune_steps, train_mode=(), when=when)
        return tuning if self.control == "none" else replace(self.on_real_examples(tuning), params=nets)

    def on_real_examples(self, train: Train) -> Train:
        """Return a phase that trains the classifier for the same number of steps with the cross-entropy on real examples (`control`)."""
        balanced = self.control == "same-steps-balanced"
        loss, nets = self.plain_loss, ("body", "head")
        return replace(train, loss=loss, params=nets, draw=None, train_mode=nets, balanced=balanced)

    def plain_loss(self, nets: Nets, batch: Batch, down: Tree, memory: Tree) -> Tensor:
        """Return the cross-entropy on real examples.

        Like `finetune_loss`, it is 0 without prototypes, so both have equally many effective steps.
        """
        ready: Tensor = (down["counts"] > 0).any()
        return nets.loss(self.predict(nets, batch.x, down, memory), batch.y) * ready

    def finetunes(self, turn: Turn) -> bool:
        """Return whether this local update includes fine-tuning."""
        return (turn.number + 1) % self.finetune_every == 0

    # phase 1: fit (FedProto's loss, with another distance)

    def distance(self, features: Tensor, labels: Tensor, down: Tree) -> Tensor:
        """Return the mean squared distance per feature to the prototypes of the classes (B,), or half of it in units of sigma."""
        away: Tensor = features - down["prototypes"][labels]
        if self.pull == "scaled":
            away = away / (self.sigma(down, labels) * 2**0.5)
        return away.square().mean(1)

    def sigma(self, down: Tree, labels: Tensor) -> Tensor:
        """Return the global standard deviations for these labels, (p,) or (B, p). A lossy downlink may have rounded them to 0."""
        return feature_statistics.deviations(down["spread"], labels, self.covariance).clamp(min=self.spread_floor)

    # phase 2: statistics

    def statistics(self, nets: Nets, batch: Batch, total: Tree, down: Tree, memory: Tree) -> Tree:
        """Add a batch to the statistics."""
        return feature_statistics.add_features(total, nets.body(batch.x), batch.y, self.covariance)

    def uplink(self, client: Client, received: Weights, down: Tree, turn: Turn) -> tuple[Tree, Tree]:
        """Return the prototypes of the client's classes, the counts, the variance, and the generator if it is shared."""
        sent, memory = super().uplink(client, received, down, turn)
        sent["variance"] = feature_statistics.within(memory["statistics"], self.covariance).to(sent["counts"].dtype)
        return sent | {"weights": self.travelling(client.weights)} if "weights" in down else sent, memory

    def uplink_fault(self, uplink: Tree, class_counts: Tensor | None) -> str:
        """Return FedProto's faults, or a fault in the variance."""
        fault = super().uplink_fault(uplink, class_counts)
        return fault or feature_statistics.variance_fault(uplink["variance"], self.covariance)

    def sums(self, uplink: Tree) -> Tree:
        """Return FedProto's sums and the weighted sum of squares, in float64, and the generator if it is shared."""
        found = super().sums(uplink)
        _, local = self.gathered([uplink])
        variance, means = uplink["variance"].double(), local[0].double()
        weights = self.weights_of([uplink])[0].double()
        found["squares"] = feature_statistics.raw_squares(variance, means, weights, self.covariance)
        return found | {"weights": uplink["weights"]} if "weights" in uplink else found

    def from_sums(self, total: Tree, n: int) -> Tree:
        """Return FedProto's uplink with the variance of all examples, and the mean generator if it is shared."""
        found, weights = super().from_sums(total, n), self.total_weights(total)
        means = torch.zeros_like(total["sums"])
        means[weights > 0] = found["prototypes"]
        found["variance"] = feature_statistics.variance_of(total["squares"], means, weights, self.covariance)
        if "weights" in total:
            found["weights"] = tree.map_tree(lambda leaf: leaf / n, total["weights"])
        return found

    def aggregate(self, server: Tree, uplinks: Sequence[Tree], round: Round) -> Tree:
        """Return FedProto's prototypes and the variance of all examples around them."""
        after = super().aggregate(server, uplinks, round)
        weights, (_, local) = self.weights_of(uplinks), self.gathered(uplinks)
        inside = torch.stack([up["variance"] for up in uplinks])
        variance = feature_statistics.total_variance(inside, local, after["prototypes"], weights, self.covariance)
        if self.covariance == "class":
            variance = torch.where(weights.sum(0)[:, None] > 0, variance, server["variance"])
        after["variance"] = variance
        if self.share_generator:
            sent = [up["weights"] for up in uplinks if "weights" in up]
            after["weights"] = tree.mean(sent, round.shares) if sent else server["weights"]
        return after

    # phase 3: generator

    def draw_latents(self, batch: Batch, task: Task, rng: Stream) -> dict[str, Tensor]:
        """Draw noise for the batch's features (B, p) and for synthetic examples (S, p), and numbers in [0, 1) that select classes (S,)."""
        n, p = self.n_synthetic, task.width
        choice = (torch.arange(n) + rng.uniform((n,))) / n  # stratified over the classes
        return {"noise": rng.normal((len(batch.y), p)), "latent_noise": rng.normal((n, p)), "class_choice": choice}

    def generator_loss(self, nets: Nets, batch: Batch, down: Tree, memory: Tree) -> tuple[Tensor, Logs]:
        """Return the reconstruction error of x from z + sigma_k eps (or c_y + sigma_k eps), plus the KL term and the distribution
        matching.

        The body that computes z is frozen, unless `encoder_learns` is set.
        """
        z = nets.body(batch.x)
        spread = self.own_spread(nets, batch.y, memory).to(z.dtype)
        image = nets.generator(self.centre(z, batch.y, down) + spread * batch.draws["noise"])
        reconstruction = (image - batch.x).square().mean()
        kl = self.kl(z, spread, batch.y, down)
        loss, logs = reconstruction + self.kl_weight * kl, {"reconstruction": reconstruction, "kl": kl}
        if self.encoder_learns:
            logs["cross_entropy"] = nets.loss(nets.head(z), batch.y)
            loss = loss + logs["cross_entropy"]
        if not self.matching_weight:  # without the matching, a step takes half of the work
            return loss, logs
        labels, latents = self.latents(batch.draws, down)
        made = (nets.frozen if self.encoder_learns else nets).body(nets.generator(latents))
        matching = self.match(made, latents, labels=labels, z=z.detach(), y=batch.y, down=down)
        return loss + self.matching_weight * matching, logs | {"matching": matching}

    def centre(self, z: Tensor, labels: Tensor, down: Tree) -> Tensor:
        """Return the means (B, p) of the latents from which examples are reconstructed."""
        if self.latent == "features":
            return z
        known = (down["counts"][labels] > 0)[:, None]
        return torch.where(known, down["prototypes"][labels].to(z.dtype), z)

    def own_spread(self, nets: Nets, labels: Tensor, memory: Tree) -> Tensor:
        """Return sigma_k for each example (B, p)."""
        variance = feature_statistics.within(memory["statistics"], self.covariance)
        per_row = feature_statistics.own_deviations(variance, self.spread_floor, labels, self.covariance).expand(
            len(labels), -1
        )
        return per_row * nets.spread() if self.learn_spread else per_row

    def kl(self, z: Tensor, spread: Tensor, labels: Tensor, down: Tree) -> Tensor:
        """Return KL(N(z, sigma_k^2) || N(c_y, sigma^2)) in nats per feature, as a mean over examples; 0 for classes without a prototype."""
        sigma = self.sigma(down, labels)
        known = (down["counts"][labels] > 0)[:, None]
        mean = (z - down["prototypes"][labels]) / sigma
        log_variance = 2 * (spread / sigma).log()
        return losses.gaussian_kl(known * mean, known * log_variance) / z.shape[1]

    def latents(self, draws: Mapping[str, Tensor], down: Tree) -> tuple[Tensor, Tensor]:
        """Return classes y (S,), uniform over those with a prototype (0 if there is none), and latents v ~ N(c_y, sigma^2) (S, p)."""
        labels = feature_statistics.among(down["counts"] > 0, draws["class_choice"])
        away = feature_statistics.scaled(draws["latent_noise"], down["spread"], labels, self.covariance)
        return labels, down["prototypes"][labels] + away

    def match(self, made: Tensor, latents: Tensor, labels: Tensor, z: Tensor, y: Tensor, down: Tree) -> Tensor:
        """Return the distance per feature between the features of synthetic images `made` (S, p) and their target; 0 without prototypes."""
        made = losses.wide(made)
        known: Tensor = down["counts"] > 0
        target: Tensor = down["prototypes"]
        if self.matching == "cycle":
            return (made - latents).square().mean() * known.any()
        if self.matching == "mahalanobis":
            return ((made - target[labels]) / self.sigma(down, labels)).square().mean() * known.any()
        means, counted = feature_statistics.class_means(made, labels, len(known))
        if self.matching == "real":
            target, held = feature_statistics.class_means(losses.wide(z), y, len(known))
            counted = counted * held
        counted = counted * known  # without any prototypes, all labels are 0
        return ((means - target).square().mean(1) * counted).sum() / counted.sum().clamp(min=1)

    # phase 4: fine-tuning

    def finetune_loss(self, nets: Nets, batch: Batch, down: Tree, memory: Tree) -> Tensor:
        """Return the cross-entropy on synthetic images, alone or averaged with that on real examples.

        It is 0 without prototypes or before the first local update.
        """
        labels, latents = self.latents(batch.draws, down)
        error = nets.loss(self.predict(nets, nets.generator(latents), down, memory), labels)
        if self.finetune_mix:
            error = (error + nets.loss(self.predict(nets, batch.x, down, memory), batch.y)) / 2
        ready: Tensor = (down["counts"] > 0).any() & (memory["statistics"]["counts"] > 0).any()
        return error * ready
