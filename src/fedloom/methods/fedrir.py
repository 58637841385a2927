"""FedRIR: masked client-specific learning and information distillation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fedloom import losses
from fedloom.errors import ConfigError
from fedloom.method import Architecture, Batch, Interleave, Logs, Method, Need, Paper, Phase, Predictor, Task, Train
from fedloom.models.fedrir import ImageGenerator, InformationDistillation
from fedloom.nets import Nets
from fedloom.ranges import Count, Fraction, NonNegative, Positive, Whole
from fedloom.rng import Stream
from fedloom.tree import Tree


@dataclass(frozen=True, kw_only=True)
class FedRIR(Method):
    """FedRIR (Huang et al., WWW 2025).

    The method has five nets. `gfe` outputs global features f_g (B, D). `csfe` outputs the mean and log-variance of client-specific
    features f_cs (B, 2 D). `generator` maps latents to images. `idm` is q(f_cs | f_g). `head` maps [f_g, f_cs] to logits.

    Sent: gfe is sent in both directions. Kept: Each client keeps csfe, generator, idm, head, the optimisers' moments, and (by default)
    BatchNorm's running statistics.

    A local update has two stages:

    1. MCSL: csfe encodes an image with masked patches as the distribution of a latent, and generator reconstructs the whole image from a
       sample of it. The loss is the reconstruction error plus the KL divergence.
    2. Classification: head classifies [f_g, f_cs], where f_cs is csfe's mean for the unmasked image, without a gradient. The IDM removes
       client-specific information from f_g by minimising an upper bound on I(f_g; f_cs) (vCLUB, Cheng et al., ICML 2020), or their
       correlation within classes (`idm_mode=decorrelated`, which has no q and no `idm` net).

    Differences from the released code (`docs/methods/fedrir.md` describes their effects): the released information loss makes f_g
    *predict* f_cs. fedloom's loss (`idm_mode=vclub`) first fits q and then minimises the bound with q fixed, which is the paper's stated
    aim. csfe is in evaluation mode in stage 2 (`csfe_mode`). Clients start from equal weights.
    """

    optimizer: Literal["sgd", "adam"] = "adam"
    lr: Positive = 5e-4
    buffers: Literal["shared", "private"] = "private"
    keep_optimizer: bool = True
    """Whether the optimisers' moments are kept between rounds."""
    mcsl: Literal["masked", "unmasked", "supervised", "off"] = "masked"
    """How csfe is trained: as a masked VAE (the paper), as a VAE without masks, by the cross-entropy, or not at all (head uses only f_g).
    The last two options have no stage 1 and do not use its hyper-parameters."""
    csfe_mode: Literal["evaluation", "training"] = "evaluation"
    """csfe's mode in stage 2. In evaluation mode, BatchNorm uses the running statistics of masked images. In training mode (the released
    code), BatchNorm uses the statistics of the batch, and the running statistics become those of unmasked images."""
    mask_ratio: Fraction = 0.6
    """Fraction of the patches that is masked."""
    patch_size: Whole = 0
    """Side of a masked patch in pixels. With 0, the side is 4, or 2 for images smaller than 28 pixels."""
    kl_weight: NonNegative = 0.1
    """Weight of the KL divergence in stage 1."""
    free_bits: NonNegative = 0.0
    """Lower limit of the KL divergence in the loss of stage 1, in nats for each of the D features."""
    rec_reduction: Literal["mean", "sum"] = "mean"
    """Whether the squared error is a mean over the pixels of an image (released code), or a sum, as in the KL divergence over features."""
    loss_region: Literal["all", "masked"] = "all"
    """Pixels that are included in the squared error."""
    idm_mode: Literal["vclub", "vclub_sampled", "vclub_class", "decorrelated", "released", "none"] = "vclub"
    """The information term: the bound over all pairs of examples, the bound over one sampled pair per example, the bound within classes,
    the correlation of f_g and f_cs within classes, the released code's loss, or none."""
    idm_weight: NonNegative = 1.0
    """Weight w of the information term in the loss of stage 2."""
    q_steps: Count = 1
    """Number of steps that fit q on each batch, before its bound is used once."""
    standardise: bool = False
    """Whether f_cs is standardised over the batch for q and the bound, so that the scale of f_cs does not limit the bound."""
    control: Literal["none", "same-steps", "same-steps-balanced"] = "none"
    """Control arm. All steps of both stages train gfe, csfe and head with the cross-entropy on the client's examples, either on plain
    batches or on batches in which the client's classes are equally frequent. There is no generator and no q."""

    shared: ClassVar[tuple[str, ...]] = ("gfe",)
    accepts_late: ClassVar[bool] = True
    needs: ClassVar[tuple[Need, ...]] = ("pictures", "vector", "head")
    paper: ClassVar[Paper] = Paper(
        "FedRIR: Rethinking information representation in federated learning",
        "Huang, Shao, Yang, Lu, Zhang",
        "WWW 2025",
        "https://arxiv.org/abs/2502.00859",
    )

    def __post_init__(self) -> None:
        """Raise ValueError for a loss over masked pixels if nothing is masked, and for a control arm if there are no extra steps."""
        super().__post_init__()
        if self.control != "none" and self.steps_per_batch == 1:
            raise ValueError(f"control={self.control}: these settings take no more steps than plain training")
        if self.loss_region == "masked" and (self.mcsl != "masked" or self.mask_ratio == 0):
            raise ValueError("loss_region=masked needs mcsl=masked and a mask_ratio above 0")
        for key, is_set in (("q_steps", self.q_steps > 1), ("standardise", self.standardise)):
            if is_set and not self.fits_q:
                raise ValueError(
                    f"{key}={getattr(self, key)} needs a bound: idm_mode=vclub, vclub_sampled or vclub_class"
                )
        if self.free_bits and not self.generates:
            raise ValueError(f"free_bits={self.free_bits:g} needs mcsl=masked or unmasked")

    def nets(self, arch: Architecture, task: Task) -> dict[str, nn.Module]:
        """Return gfe and csfe for any architecture, and the other nets for its number of features D and the image size."""
        if self.mcsl == "masked":
            side, rows, columns = self.patches(*task.input_shape[1:])
            if 0 < self.mask_ratio * rows * columns < 1:
                raise ConfigError(
                    f"method.mask_ratio={self.mask_ratio}: masks none of an image's {rows * columns} patches of {side}x{side} pixels"
                )
        gfe, d = arch.body(), arch.features
        if self.mcsl == "off":
            return {"gfe": gfe, "head": arch.head()}
        nets: dict[str, nn.Module] = {"gfe": gfe, "csfe": arch.body(2 * d), "head": arch.head(2 * d)}
        if self.control != "none":
            return nets
        if self.generates:
            nets["generator"] = ImageGenerator(d, task.input_shape)
        if self.predicts:
            nets["idm"] = InformationDistillation(d)
        return nets

    def phases(self) -> tuple[Phase, ...]:
        """Return stage 1 (if there is one) and stage 2."""
        optimizer, epochs = self.local_optimizer(), self.local_epochs
        train = partial(Train, optimizer=optimizer, epochs=epochs, keep_state=self.keep_optimizer)
        if self.control != "none":
            more, balanced = epochs * self.steps_per_batch, self.control == "same-steps-balanced"
            return (train("classify", self.plain_loss, ("gfe", "csfe", "head"), epochs=more, balanced=balanced),)
        first = train("mcsl", self.mcsl_loss, ("csfe", "generator"), draw=self.draw_mask)
        classifier: tuple[str, ...] = ("gfe", "csfe", "head") if self.mcsl == "supervised" else ("gfe", "head")
        if self.predicts and self.idm_mode == "released":
            classifier = (*classifier, "idm")
        modes = (*classifier, "csfe") if self.generates and self.csfe_mode == "training" else classifier
        classify = train("classify", self.loss, classifier, draw=self.draw_pairs, train_mode=modes)
        second: Phase = classify
        if self.fits_q:
            fit_q = train("idm", self.q_loss, ("idm",), repeats=self.q_steps)
            second = Interleave("distil", (fit_q, classify), epochs, precompute=self.both)
        return (first, second) if self.generates else (second,)

    # stage 1: masked client-specific learning

    def draw_mask(self, batch: Batch, task: Task, rng: Stream) -> dict[str, Tensor]:
        """Draw masks (B, 1, H, W), which are 0 in floor(mask_ratio N) of an image's N patches and 1 elsewhere, and
        the latents' noise (B, D).
        """
        n, _, height, width = batch.x.shape
        side, rows, columns = self.patches(height, width)
        rank = rng.uniform((n, rows * columns)).argsort(1).argsort(1)
        stays = (rank >= int(self.mask_ratio * rows * columns)).to(batch.x.dtype).view(n, 1, rows, columns)
        stays = stays.repeat_interleave(side, 2).repeat_interleave(side, 3)[:, :, :height, :width]
        return {"stays": stays, "noise": rng.normal((n, task.width))}

    def patches(self, height: int, width: int) -> tuple[int, int, int]:
        """Return the side of a patch in pixels, and the number of rows and columns of patches."""
        side = self.patch_size or (4 if min(height, width) >= 28 else 2)
        return side, -(-height // side), -(-width // side)

    def mcsl_loss(self, nets: Nets, batch: Batch, down: Tree, memory: Tree) -> tuple[Tensor, Logs]:
        """Return the reconstruction error of the whole image from a latent of the masked image, plus kl_weight KL(q(z | x) || N(0, 1))."""
        stays = batch.draws["stays"]
        seen = batch.x * stays if self.mcsl == "masked" else batch.x
        mean, log_variance = nets.csfe(seen).chunk(2, 1)
        image = nets.generator(mean + (log_variance / 2).exp() * batch.draws["noise"])
        error = (image - batch.x).square()
        if self.loss_region == "masked":
            share = (1 - stays).mean() if self.rec_reduction == "mean" else 1.0
            error = error * (1 - stays) / share
        reconstruction = error.mean() if self.rec_reduction == "mean" else error.sum((1, 2, 3)).mean()
        kl = losses.gaussian_kl(mean, log_variance)
        logs = {"reconstruction": reconstruction, "kl": kl}
        if self.free_bits:
            kl = losses.gaussian_kl_by_feature(mean, log_variance).clamp(min=self.free_bits).sum()
        return reconstruction + self.kl_weight * kl, logs

    # stage 2: classification with information distillation

    def features(self, nets: Nets, x: Tensor) -> dict[str, Tensor]:
        """Return f_g (B, D) and, unless MCSL is off, f_cs (B, D). Gradients flow to csfe only if the cross-entropy trains it."""
        if self.mcsl == "off":
            return {"f_g": nets.gfe(x)}
        specific = nets.csfe(x).chunk(2, 1)[0]
        is_trained = self.mcsl == "supervised" or self.control != "none"
        return {"f_g": nets.gfe(x), "f_cs": specific if is_trained else specific.detach()}

    def both(self, nets: Nets, batch: Batch, down: Tree, memory: Tree) -> dict[str, Tensor]:
        """Return the features that both steps on a batch use: the step for q and the classification step."""
        return self.features(nets, batch.x)

    def q_loss(self, nets: Nets, batch: Batch, down: Tree, memory: Tree) -> Tensor:
        """Return -log q(f_cs | f_g), the loss that fits q before q is used. No gradient flows to f_g or f_cs."""
        mean, log_variance = nets.idm(batch.precomputed["f_g"])
        target = self.target(batch.precomputed["f_cs"])
        if self.idm_mode == "vclub_class":
            target = losses.within_classes(target, batch.y)[0]
        return losses.gaussian_nll(mean, log_variance, target)

    def target(self, specific: Tensor) -> Tensor:
        """Return the target of q: f_cs, which is standardised if `standardise` is set."""
        return losses.standardised(specific) if self.standardise else specific

    def draw_pairs(self, batch: Batch, task: Task, rng: Stream) -> dict[str, Tensor]:
        """Draw a second example for each example, for the sampled bound."""
        return {"other": rng.permutation(len(batch.y))} if self.idm_mode == "vclub_sampled" else {}

    def loss(self, nets: Nets, batch: Batch, down: Tree, memory: Tree) -> tuple[Tensor, Logs]:
        """Return the loss of head([f_g, f_cs]) (cross-entropy for classes) plus idm_weight times the information term."""
        return self.loss_of(batch.precomputed or self.features(nets, batch.x), nets, batch, down)

    def loss_of(
        self, features: Mapping[str, Tensor], nets: Nets, batch: Batch, down: Tree
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return `loss` and its logs for the batch's features."""
        outputs = nets.head(torch.cat(list(features.values()), 1))
        error = nets.loss(outputs, batch.y)
        if not self.informs:
            return error, {}
        common, specific = features["f_g"], features["f_cs"].detach()
        if self.idm_mode == "decorrelated":
            information = losses.class_decorrelation(common, specific, batch.y, outputs.shape[1])
        else:
            information = self.information(nets, common, specific, batch)
        return error + self.idm_weight * information, {"cross_entropy": error, "information": information}

    def plain_loss(self, nets: Nets, batch: Batch, down: Tree, memory: Tree) -> Tensor:
        """Return the loss of head([f_g, f_cs]) alone, which control arms use."""
        return nets.loss(self.predict(nets, batch.x, down, memory), batch.y)

    def information(self, nets: Nets, common: Tensor, specific: Tensor, batch: Batch) -> Tensor:
        """Return the information term, computed with q, in nats per feature.

        The bound is clamped at 0, its value for independent variables.
        """
        if self.idm_mode == "released":
            mean, log_variance = nets.idm(common)
            # this is the sum over features, without the factor 1/2 of the likelihood
            return 2 * common.shape[1] * losses.gaussian_nll(mean, log_variance, specific)
        mean, log_variance = nets.frozen.idm(common)
        target = self.target(specific)
        if self.idm_mode == "vclub_class":
            bound = losses.vclub_within(mean, log_variance, target, batch.y)
        else:
            bound = losses.vclub(mean, log_variance, target, batch.draws.get("other"))
        return bound.clamp(min=0)

    def predictors(self) -> dict[str, Predictor]:
        """Return the client's predictor, head([f_g, f_cs]). There is no server model, because csfe and head are never sent."""
        return {"personal": self.predict}

    def predict(self, nets: Nets, x: Tensor, down: Tree, memory: Tree) -> Tensor:
        """Return the outputs, such as logits (B, Y)."""
        logits: Tensor = nets.head(torch.cat(list(self.features(nets, x).values()), 1))
        return logits

    def shared_features(self) -> Predictor:
        """Return the predictor of f_g, the features of gfe."""
        return self.common_features

    def common_features(self, nets: Nets, x: Tensor, down: Tree, memory: Tree) -> Tensor:
        """Return f_g (B, D)."""
        features: Tensor = nets.gfe(x)
        return features

    @property
    def needed(self) -> frozenset[Need]:
        """The method needs a feature vector per example and a head.

        It also needs images for stage 1, and classes to decorrelate within them.
        """
        needs: set[Need] = {"vector", "head"}
        if self.generates:
            needs.add("pictures")
        if (self.informs and self.idm_mode in ("decorrelated", "vclub_class")) or self.control == "same-steps-balanced":
            needs.add("classes")
        return frozenset(needs)

    @property
    def remedy(self) -> str:
        """The setting that makes the method usable for inputs that are not images, for error messages."""
        return "set method.mcsl=supervised, or " if self.generates else ""

    @property
    def steps_per_batch(self) -> int:
        """The number of optimiser steps on each batch of an epoch, in both stages together."""
        return 1 + self.generates + self.q_steps * self.fits_q

    @property
    def fits_q(self) -> bool:
        """Whether q has its own steps."""
        return self.predicts and self.idm_mode != "released"

    @property
    def generates(self) -> bool:
        """Whether there is a stage 1."""
        return self.mcsl in ("masked", "unmasked")

    @property
    def informs(self) -> bool:
        """Whether there is an information term."""
        return self.mcsl != "off" and self.idm_mode != "none"

    @property
    def predicts(self) -> bool:
        """Whether the information term needs q(f_cs | f_g). Every form except `decorrelated` needs it."""
        return self.informs and self.idm_mode != "decorrelated"
