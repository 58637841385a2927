"""FedRIR: masked client-specific learning and information distillation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fedloom import losses
from fedloom.errors import ConfigError
from fedloom.method import Architecture, Batch, Interleave, Logs, Method, Paper, Phase, Predictor, Task, Train
from fedloom.models.fedrir import ImageGenerator, InformationDistillation
from fedloom.nets import Nets
from fedloom.ranges import Fraction, NonNegative, Positive, Whole
from fedloom.rng import Stream
from fedloom.tree import Tree


@dataclass(frozen=True, kw_only=True)
class FedRIR(Method):
    """FedRIR (Huang et al., WWW 2025).

    Five nets: `gfe` global features f_g (B, D); `csfe` mean and log-variance of the client-specific features f_cs (B, 2 D);
    `generator` images from latents; `idm` q(f_cs | f_g); `head` logits from [f_g, f_cs].

    Travels: gfe, both ways. Stays: csfe, generator, idm, head, the optimisers' moments, and (by default) BatchNorm's running statistics.

    A turn has two stages:

    1. MCSL: csfe sees images with masked patches, draws a latent, and generator rebuilds the whole image; reconstruction + KL.
    2. Classification: head on [f_g, f_cs], f_cs the mean of the unmasked image without gradient, while the IDM keeps
       client-specific information out of f_g by an upper bound on I(f_g; f_cs) (vCLUB, Cheng et al., ICML 2020), or by
       their correlation within classes (`idm_mode=decorrelated`, which has no q and no `idm` net).

    Differences from the released code, and `docs/methods/fedrir.md` for what each is worth: the released information loss
    makes f_g *predict* f_cs; ours (`idm_mode=vclub`) fits q first and then lowers the bound with q fixed, as the paper states
    its aim. csfe is in evaluation mode in stage 2 (`csfe_mode`). Clients start from equal weights.
    """

    optimizer: Literal["sgd", "adam"] = "adam"
    lr: Positive = 5e-4
    buffers: Literal["shared", "private"] = "private"
    keep_optimizer: bool = True
    """Whether the optimisers' moments last over rounds."""
    mcsl: Literal["masked", "unmasked", "supervised", "off"] = "masked"
    """How csfe learns: a masked VAE (the paper), a VAE without masks, by the cross-entropy, or not at all (head on f_g alone). The last
    two have no stage 1, and no use for its hyper-parameters."""
    csfe_mode: Literal["evaluation", "training"] = "evaluation"
    """csfe's mode in stage 2. In evaluation BatchNorm goes by running statistics of masked images; in training (the released code) it
    goes by the batch's, and the running ones become those of whole images."""
    mask_ratio: Fraction = 0.6
    """The part of the patches that is masked."""
    patch_size: Whole = 0
    """Side of a masked patch in pixels; 0 means 4, or 2 for images under 28 pixels."""
    kl_weight: NonNegative = 0.1
    """Weight of the KL divergence in stage 1."""
    rec_reduction: Literal["mean", "sum"] = "mean"
    """Whether the squared error is a mean over the pixels of an image (released code) or a sum, as the KL is over features."""
    loss_region: Literal["all", "masked"] = "all"
    """The pixels that the squared error counts."""
    idm_mode: Literal["vclub", "vclub_sampled", "decorrelated", "released", "none"] = "vclub"
    """The information term: the bound over all pairs, over one drawn pair a row, the covariance of f_g and f_cs within classes, the
    released code's loss, or none."""
    idm_weight: NonNegative = 1.0
    """Weight w of the information term in stage 2."""

    shared: ClassVar[tuple[str, ...]] = ("gfe",)
    accepts_late: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        "FedRIR: Rethinking information representation in federated learning",
        "Huang, Shao, Yang, Lu, Zhang",
        "WWW 2025",
        "https://arxiv.org/abs/2502.00859",
    )

    def __post_init__(self) -> None:
        """Masked pixels need masks."""
        super().__post_init__()
        if self.loss_region == "masked" and (self.mcsl != "masked" or self.mask_ratio == 0):
            raise ValueError("loss_region=masked needs mcsl=masked and a mask_ratio above 0")

    def nets(self, arch: Architecture, task: Task) -> dict[str, nn.Module]:
        """gfe and csfe of any architecture; the others follow its features D and the image's size."""
        if len(task.input_shape) != 3:
            raise ConfigError(f"method=fedrir: needs images (C, H, W), but inputs have shape {task.input_shape}")
        side, rows, columns = self.patches(*task.input_shape[1:])
        if self.mcsl == "masked" and 0 < self.mask_ratio * rows * columns < 1:
            raise ConfigError(
                f"method.mask_ratio={self.mask_ratio}: masks none of an image's {rows * columns} patches of {side}x{side} pixels"
            )
        gfe, d = arch.body(), arch.features
        if self.mcsl == "off":
            return {"gfe": gfe, "head": arch.head()}
        nets: dict[str, nn.Module] = {"gfe": gfe, "csfe": arch.body(2 * d), "head": arch.head(2 * d)}
        if self.generates:
            nets["generator"] = ImageGenerator(d, task.input_shape)
        if self.predicts:
            nets["idm"] = InformationDistillation(d)
        return nets

    def phases(self) -> tuple[Phase, ...]:
        """Stage 1 and stage 2."""
        optimizer, epochs = self.local_optimizer(), self.local_epochs
        train = partial(Train, optimizer=optimizer, epochs=epochs, keep_state=self.keep_optimizer)
        first = train("mcsl", self.mcsl_loss, ("csfe", "generator"), draw=self.draw_mask)
        classifier: tuple[str, ...] = ("gfe", "csfe", "head") if self.mcsl == "supervised" else ("gfe", "head")
        if self.predicts and self.idm_mode == "released":
            classifier = (*classifier, "idm")
        modes = (*classifier, "csfe") if self.generates and self.csfe_mode == "training" else classifier
        classify = train("classify", self.loss, classifier, draw=self.draw_pairs, train_mode=modes)
        second: Phase = classify
        if self.predicts and self.idm_mode != "released":
            second = Interleave("distil", (train("idm", self.q_loss, ("idm",)), classify), epochs, precompute=self.both)
        return (first, second) if self.generates else (second,)

    # stage 1: masked client-specific learning

    def draw_mask(self, batch: Batch, task: Task, rng: Stream) -> dict[str, Tensor]:
        """Which pixels stay, (B, 1, H, W) of 0 and 1, floor(mask_ratio N) of an image's N patches masked; and the latent's noise (B, D)."""
        n, _, height, width = batch.x.shape
        side, rows, columns = self.patches(height, width)
        rank = rng.uniform((n, rows * columns)).argsort(1).argsort(1)
        stays = (rank >= int(self.mask_ratio * rows * columns)).to(batch.x.dtype).view(n, 1, rows, columns)
        stays = stays.repeat_interleave(side, 2).repeat_interleave(side, 3)[:, :, :height, :width]
        return {"stays": stays, "noise": rng.normal((n, task.width))}

    def patches(self, height: int, width: int) -> tuple[int, int, int]:
        """Side of a patch in pixels, and how many there are below and beside each other."""
        side = self.patch_size or (4 if min(height, width) >= 28 else 2)
        return side, -(-height // side), -(-width // side)

    def mcsl_loss(self, nets: Nets, batch: Batch, down: Tree, memory: Tree) -> tuple[Tensor, Logs]:
        """Reconstruction of the whole image from a latent of the masked one, plus kl_weight KL(q(z | x) || N(0, 1))."""
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
        return reconstruction + self.kl_weight * kl, {"reconstruction": reconstruction, "kl": kl}

    # stage 2: classification with information distillation

    def features(self, nets: Nets, x: Tensor) -> dict[str, Tensor]:
        """f_g and, unless MCSL is off, f_cs, (B, D) each; no gradient flows into csfe unless the cross-entropy trains it."""
        if self.mcsl == "off":
            return {"f_g": nets.gfe(x)}
        specific = nets.csfe(x).chunk(2, 1)[0]
        return {"f_g": nets.gfe(x), "f_cs": specific if self.mcsl == "supervised" else specific.detach()}

    def both(self, nets: Nets, batch: Batch, down: Tree, memory: Tree) -> dict[str, Tensor]:
        """The features that both steps on a batch use."""
        return self.features(nets, batch.x)

    def q_loss(self, nets: Nets, batch: Batch, down: Tree, memory: Tree) -> Tensor:
        """-log q(f_cs | f_g): fits q before each use; no gradient flows into f_g or f_cs."""
        mean, log_variance = nets.idm(batch.precomputed["f_g"])
        return losses.gaussian_nll(mean, log_variance, batch.precomputed["f_cs"])

    def draw_pairs(self, batch: Batch, task: Task, rng: Stream) -> dict[str, Tensor]:
        """For the sampled bound: another row for every row."""
        return {"other": rng.permutation(len(batch.y))} if self.idm_mode == "vclub_sampled" else {}

    def loss(self, nets: Nets, batch: Batch, down: Tree, memory: Tree) -> tuple[Tensor, Logs]:
        """Cross-entropy of head([f_g, f_cs]) plus idm_weight times the information term."""
        features = batch.precomputed or self.features(nets, batch.x)
        logits = nets.head(torch.cat(list(features.values()), 1))
        error = losses.cross_entropy(logits, batch.y)
        if not self.informs:
            return error, {}
        common, specific = features["f_g"], features["f_cs"].detach()
        if self.idm_mode == "decorrelated":
            information = losses.class_decorrelation(common, specific, batch.y, logits.shape[1])
        else:
            information = self.information(nets, common, specific, batch)
        return error + self.idm_weight * information, {"cross_entropy": error, "information": information}

    def information(self, nets: Nets, common: Tensor, specific: Tensor, batch: Batch) -> Tensor:
        """The term that q gives, in nats per feature; the bound is clamped at 0, as there is nothing below independence to reward."""
        if self.idm_mode == "released":
            mean, log_variance = nets.idm(common)
            # summed over features, and without the likelihood's 1/2
            return 2 * common.shape[1] * losses.gaussian_nll(mean, log_variance, specific)
        mean, log_variance = nets.frozen.idm(common)
        return losses.vclub(mean, log_variance, specific, batch.draws.get("other")).clamp(min=0)

    def predictors(self) -> dict[str, Predictor]:
        """head([f_g, f_cs]); there is no server model, since csfe and head never leave a client."""
        return {"personal": self.predict}

    def predict(self, nets: Nets, x: Tensor, down: Tree, memory: Tree) -> Tensor:
        """Logits (B, Y)."""
        logits: Tensor = nets.head(torch.cat(list(self.features(nets, x).values()), 1))
        return logits

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
        """Whether there is a q(f_cs | f_g): every form of the information term but `decorrelated` has one."""
        return self.informs and self.idm_mode != "decorrelated"
