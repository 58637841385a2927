"""Images from clients' generators: their similarity to real images and to training images, and an independent classifier's accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedloom import losses, optim
from fedloom.analysis.subject import Owner, Subject
from fedloom.errors import UsageError
from fedloom.method import Batch, Client, Task, Train, Turn
from fedloom.methods import FedRIR, FedVTC
from fedloom.models import arch
from fedloom.nets import Nets, read_weights
from fedloom.rng import Stream
from fedloom.training.batches import Plan, Rows
from fedloom.training.context import ClientContext
from fedloom.training.gradients import Gradients
from fedloom.training.turn import fresh_modules, run_phases

PER_CLASS = 10  # number of images per class and client
MOST_TRAINING_ROWS = 3000  # maximum number of a client's training examples in the search for the nearest
CLASSIFIER, CLASSIFIER_ROWS, CLASSIFIER_STEPS, CLASSIFIER_BATCH = "fedavg_cnn", 10_000, 600, 64
WINDOW = 7  # width and height in pixels of SSIM's uniform window
HIGHEST_DB = 100.0  # PSNR of two equal images, and its upper limit


class Made(NamedTuple):
    """Generated images (S, C, H, W) as model inputs, and their intended labels (S,).

    If the images reconstruct real images, the originals are also included.
    """

    images: Tensor
    labels: Tensor
    sources: Tensor | None = None


class Pairs(NamedTuple):
    """Images and the nearest training image of each (S, C, H, W), in [0, 1], with SSIM and PSNR (dB) of each pair (S,)."""

    images: Tensor
    nearest: Tensor
    ssim: Tensor
    psnr: Tensor


@torch.no_grad()
def made_by(subject: Subject, i: int) -> Made | None:
    """Return images from client `i`'s generator, or None if the client has no generator or no input for it.

    For FedVTC, the images are generated from latents v ~ N(c_y, sigma^2), `PER_CLASS` for each class with a global prototype. For FedRIR,
    they are reconstructions of the client's own test examples, which are masked as in training, from the mean of the latent.
    """
    method, owner = subject.method, subject.owner(i)
    if "generator" not in owner.nets.modules:
        return None
    rng = subject.rng("samples", i)
    if isinstance(method, FedVTC):
        return _drawn(method, owner, subject.task, rng)
    if isinstance(method, FedRIR):
        return _rebuilt(method, owner, subject, i, rng)
    return None


def _drawn(method: FedVTC, owner: Owner, task: Task, rng: Stream) -> Made | None:
    known = int((owner.down["counts"] > 0).sum())
    if not known:
        return None
    n = PER_CLASS * known
    evenly = (torch.arange(n) + 0.5) / n
    draws = {"latent_noise": rng.normal((n, task.width)), "class_choice": evenly}
    labels, latents = method.latents(draws, owner.down)
    return Made(owner.nets.generator(latents), labels)


def _rebuilt(method: FedRIR, owner: Owner, subject: Subject, i: int, rng: Stream) -> Made | None:
    rows, labels = subject.data.partition.test[i], subject.data.dataset.labels.numpy()
    chosen = [rows[labels[rows] == c][:PER_CLASS] for c in range(subject.data.n_classes)]
    if not len(rows):
        return None
    x, y = subject.rows(np.concatenate(chosen))
    seen = x
    if method.mcsl == "masked":
        seen = x * method.draw_mask(Batch(x, y), subject.task, rng)["stays"]
    return Made(owner.nets.generator(owner.nets.csfe(seen).chunk(2, 1)[0]), y, x)


class Likeness(NamedTuple):
    """SSIM and PSNR (dB) of pairs of images (S,)."""

    ssim: Tensor
    psnr: Tensor


# similarity


def pairs(images: Tensor, training: Tensor) -> Pairs:
    """Pair each image with the training image at the smallest mean squared distance. Both are (., C, H, W) in [0, 1]."""
    nearest = training[torch.cdist(images.flatten(1), training.flatten(1)).argmin(1)]
    return Pairs(images, nearest, *likeness(images, nearest))


def likeness(a: Tensor, b: Tensor) -> Likeness:
    """Return SSIM and PSNR (dB, at most 100) of pairs of images (S, C, H, W) in [0, 1]. Both have shape (S,)."""
    try:
        from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
    except ImportError as missing:
        raise UsageError("analyse samples needs torchmetrics: pip install 'fedloom[analyse]'") from missing
    ssim = structural_similarity_index_measure(
        a, b, gaussian_kernel=False, kernel_size=WINDOW, data_range=1.0, reduction="none"
    )
    psnr = peak_signal_noise_ratio(a, b, data_range=1.0, dim=(1, 2, 3), reduction="none")
    assert isinstance(ssim, Tensor)
    return Likeness(ssim.reshape(len(a)), psnr.reshape(len(a)).clamp(max=HIGHEST_DB))


def deciles_of(values: Tensor) -> dict[str, Any]:
    """Return the mean, maximum, deciles (from minimum to maximum) and number of the values."""
    deciles = torch.quantile(values.double(), torch.linspace(0, 1, 11, dtype=torch.float64))
    return {"mean": float(values.mean()), "max": float(values.max()), "deciles": deciles.tolist(), "n": len(values)}


# an independent classifier


class Classifier(NamedTuple):
    """A small CNN that is trained centrally on the clients' training examples: its nets, and its accuracy on the common test set."""

    nets: Nets
    accuracy: float

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Return the most likely class of each image (B,)."""
        answers: Tensor = torch.cat([self.nets.model(part) for part in torch.split(x, 512)]).argmax(1)
        return answers


def classifier(subject: Subject) -> Classifier:
    """Train a `Classifier` without using the run's own models."""
    choice = arch(CLASSIFIER, subject.data.spec, subject.data.objective)
    modules = fresh_modules(lambda: {"model": choice.model()}, subject.rng("classifier"))
    x, y = subject.training_rows(CLASSIFIER_ROWS, "classifier")

    def loss(nets: Nets, batch: Batch, down: Any, memory: Any) -> Tensor:
        return losses.cross_entropy(nets.model(batch.x), batch.y)

    fit = Train("classifier", loss, ("model",), optim.adam(1e-3), steps=CLASSIFIER_STEPS)
    site = ClientContext(
        rows=Rows(x, y), plan=Plan(CLASSIFIER_BATCH), task=subject.task, rng=subject.rng("classifier", "rows")
    )
    blank = Client(read_weights(modules), {}, {})
    client, _, _ = run_phases((fit,), Gradients(modules), blank, {}, site, turn=Turn(0, 0, len(y)))
    trained = Classifier(Nets(modules, client.weights["params"], client.weights["buffers"]), float("nan"))
    test, labels = subject.rows(subject.some(subject.data.partition.common, 2000, "classifier"))
    return trained._replace(
        accuracy=float((trained.predict(test) == labels).double().mean()) if len(labels) else float("nan")
    )


# one run


class Sheet(NamedTuple):
    """A client's images to draw: blocks (S, C, H, W) in [0, 1] by title, and the labels of the images (S,)."""

    client: int
    blocks: dict[str, Tensor]
    labels: Tensor


class Findings(NamedTuple):
    """Results of an analysis: numbers for `analysis.json`, and sheets to draw."""

    numbers: dict[str, Any]
    sheets: list[Sheet]
    made: Likeness  # similarity of generated images to the nearest training image
    held_out: Likeness | None  # the same for held-out real images, if any


def measure_generators(subject: Subject, clients: Sequence[int]) -> Findings | None:
    """Measure the similarity and recognition of images from clients' generators. Return None if there are no generators."""
    found = [(i, made) for i in clients if (made := made_by(subject, i)) is not None]
    if not found:
        return None
    sheets, near, far = [], list[Pairs](), list[Pairs]()
    for i, made in found:
        sheet, mine, reference = _compared(subject, i, made)
        sheets.append(sheet)
        near.append(mine)
        far += [reference] if reference else []
    nearness, standard = _joined(near), _joined(far) if far else None
    numbers: dict[str, Any] = {"made": _nearness(nearness), "held_out": _nearness(standard) if standard else None}
    if found[0][1].sources is not None:
        rebuilt = [likeness(_shown(subject, i, made.images), _shown(subject, i, made.sources)) for i, made in found]
        numbers["rebuilt"] = _nearness(_joined(rebuilt))
    numbers["classifier"] = _recognised(subject, found)
    return Findings(numbers, sheets, nearness, standard)


def _compared(subject: Subject, i: int, made: Made) -> tuple[Sheet, Pairs, Pairs | None]:
    """Compare a client's images, and the same number of held-out images, with their nearest training images.

    Both sets must have the same size, because a maximum increases with the number of images.
    """
    training, _ = subject.rows(subject.some(subject.data.partition.train[i], MOST_TRAINING_ROWS, "nearest", i))
    real = _shown(subject, i, training)
    mine = pairs(_shown(subject, i, made.images), real)
    blocks = {} if made.sources is None else {"real": _shown(subject, i, made.sources)}
    blocks |= {"rebuilt" if blocks else "made": mine.images, "nearest in training": mine.nearest}
    sheet = Sheet(i, blocks, made.labels)
    held_out = subject.some(subject.data.partition.test[i], len(made.labels), "held out", i)
    if not len(held_out):
        return sheet, mine, None
    reference = pairs(_shown(subject, i, subject.rows(held_out)[0]), real)
    some = subject.rng("as many", i).permutation(len(made.labels))[: len(held_out)]
    return sheet, Pairs(*(part[some] for part in mine)), reference


def _shown(subject: Subject, i: int, x: Tensor | None) -> Tensor:
    assert x is not None
    return subject.data.pictures(x, i)


def _joined(groups: Sequence[Pairs | Likeness]) -> Likeness:
    return Likeness(torch.cat([group.ssim for group in groups]), torch.cat([group.psnr for group in groups]))


def _nearness(found: Likeness) -> dict[str, Any]:
    return {"ssim": deciles_of(found.ssim), "psnr_db": deciles_of(found.psnr)}


def _recognised(subject: Subject, found: Sequence[tuple[int, Made]]) -> dict[str, Any]:
    """Return the classifier's accuracy for the intended labels: for all images, for the client's own and other classes, and by class."""
    judge, n_classes = classifier(subject), subject.data.n_classes
    labels = subject.data.dataset.labels.numpy()
    counts = np.stack([np.bincount(labels[rows], minlength=n_classes) for rows in subject.data.partition.train])
    right = torch.cat([(judge.predict(made.images) == made.labels) for _, made in found]).double()
    intended = torch.cat([made.labels for _, made in found])
    held = torch.cat([torch.from_numpy(counts[i] > 0)[made.labels] for i, made in found])

    def share(which: Tensor) -> float | None:
        return float(right[which].mean()) if bool(which.any()) else None

    return {
        "model": CLASSIFIER,
        "accuracy_on_test_rows": judge.accuracy,
        "accuracy": float(right.mean()),
        "accuracy_held": share(held),
        "accuracy_not_held": share(~held),
        "by_class": [share(intended == c) for c in range(n_classes)],
    }
