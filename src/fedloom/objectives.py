"""Learning tasks: the form of the targets, the loss, and the scoring of predictions.

Scores are sums of integers, so their total is the same in any order. A real value v is added as `round(v * 2**24)`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from fedloom import losses
from fedloom.errors import DataError

Ints = npt.NDArray[np.int64]

UNIT: Final = 2.0**24
"""Real values are rounded to multiples of 1 / UNIT before they are added."""
MOST: Final = 2.0**38
"""The largest summand, in multiples of 1 / UNIT, so that the sum over 2**24 examples fits into 64 bits."""


@dataclass(frozen=True)
class Score:
    """Integer sums over scored examples, by name. `rows` holds the number of examples, as an array (one entry per class, or length 1)."""

    sums: Mapping[str, Ints]

    @property
    def n_rows(self) -> int:
        """Number of scored examples."""
        return int(self.sums["rows"].sum())

    def __getitem__(self, name: str) -> Ints:
        return self.sums[name]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Score)
            and self.sums.keys() == other.sums.keys()
            and all(np.array_equal(self.sums[name], other.sums[name]) for name in self.sums)
        )

    __hash__ = None  # type: ignore[assignment]


def sum_scores(scores: Iterable[Score]) -> Score:
    """Return the sum of at least one score."""
    every = list(scores)
    return Score({name: np.sum([s.sums[name] for s in every], axis=0) for name in every[0].sums})


class Metric(NamedTuple):
    """The name and properties of a number that is computed from a score."""

    name: str
    better: Literal["higher", "lower"] = "higher"
    percent: bool = False  # whether the number is a fraction that is shown in percent
    unit: str = ""


class Strata(NamedTuple):
    """Groups of examples with similar targets, which label-skewed partitions divide among clients."""

    of: Ints  # (N,): the stratum of each example
    names: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """A learning task. `names` are the classes, labels or targets in the order of the outputs, or empty if they have no names."""

    names: tuple[str, ...] = ()
    task: ClassVar[str]
    primary: ClassVar[Metric]
    output_ndim: ClassVar[int] = 2  # dimensions of a model's outputs
    skew: ClassVar[str] = ""  # reason why there are no strata, for messages

    @property
    def n_outputs(self) -> int:
        """Number of outputs of a model's head."""
        return len(self.names)

    @property
    def n_classes(self) -> int:
        """Number of classes, Y. Raise DataError if the task has no classes."""
        raise DataError(f"needs classes, but the task is {self.task}")

    @property
    def metric(self) -> Metric:
        """The primary metric, with its unit."""
        return self.primary

    @abstractmethod
    def checked(self, targets: Tensor) -> str:
        """Return what is wrong with the targets of all examples, or ""."""

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of a batch, 0-d. It is safe under vmap."""

    @abstractmethod
    def scores(self, outputs: Tensor, targets: Tensor, sizes: Sequence[int]) -> list[Score]:
        """Return one score per client.

        Outputs and targets of all clients are concatenated; `sizes` are the clients' numbers of examples.
        """

    @abstractmethod
    def shapes(self) -> dict[str, int]:
        """Return the lengths of a score's arrays, by name."""

    @abstractmethod
    def metrics(self, score: Score) -> dict[str, float]:
        """Return the metrics, the primary one first. A metric is NaN if it is undefined, for example without examples."""

    def by_name(self, score: Score) -> tuple[str, list[float]]:
        """Return the name of a metric, and its value per class or label (NaN without examples). Both are empty if the task has none."""
        return "", []

    @abstractmethod
    def answer(self, outputs: Tensor) -> npt.NDArray[Any]:
        """Return the predictions in the form of the data: class names, label names, numbers in the targets' units, or token ids."""

    def strata(self, targets: Tensor, n_train: int, bins: int = 10) -> Strata | None:
        """Return groups of examples with similar targets, or None if the task has no such groups.

        Args:
            targets: the targets of all examples.
            n_train: the number of leading examples (the training examples) from which the groups are derived.
            bins: the maximum number of groups if targets are numbers.
        """
        return None

    def excess(self, score: Score, most: Score) -> str:
        """Return the reason why a device cannot have obtained this score, or "".

        `most` is a score with the largest `rows` that it may report.
        """
        if np.any(score["rows"] > most["rows"]):
            return "more examples than the client has"
        return ""

    def none(self) -> Score:
        """Return the score of zero examples."""
        return Score({name: np.zeros(n, np.int64) for name, n in self.shapes().items()})

    def value(self, score: Score) -> float:
        """Return the primary metric, or NaN if it is undefined."""
        return self.metrics(score)[self.primary.name]

    def content(self) -> dict[str, Any]:
        """Return the objective as JSON values, which `from_content` reads."""
        content = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}
        return {"task": self.task, **content}


@dataclass(frozen=True, kw_only=True)
class Classification(Objective):
    """Classification with one class per example, by cross-entropy. Targets (N,) are int64 from 0 to Y-1; outputs (N, Y) are logits."""

    task = "classification"
    primary = Metric("accuracy", percent=True)

    @classmethod
    def numbered(cls, n: int) -> Classification:
        """Return the task with `n` classes whose names are 0 to n - 1."""
        return cls(names=tuple(map(str, range(n))))

    @property
    def n_classes(self) -> int:
        return len(self.names)

    def checked(self, targets: Tensor) -> str:
        if targets.ndim != 1 or targets.is_floating_point():
            return f"labels have shape {tuple(targets.shape)} and type {targets.dtype}; they must be (N,) integers"
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= self.n_classes:
            return f"labels run from {low} to {high}; they must be from 0 to {self.n_classes - 1}"
        return ""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats; outputs (B, Y), targets (B,)."""
        return losses.cross_entropy(outputs, targets)

    def scores(self, outputs: Tensor, targets: Tensor, sizes: Sequence[int]) -> list[Score]:
        """Return the numbers of correct predictions (`right`) and examples (`rows`) per class (Y,).

        An example with a non-finite logit counts as wrong.
        """
        labels, n = targets.to(outputs.device), self.n_classes
        right = (outputs.argmax(1) == labels) & outputs.isfinite().all(1)
        places = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        cells = places.to(labels.device) * n + labels
        counts = (
            torch.bincount(c, minlength=len(sizes) * n).cpu().numpy().reshape(-1, n) for c in (cells[right], cells)
        )
        return [Score({"right": r, "rows": a}) for r, a in zip(*counts, strict=True)]

    def shapes(self) -> dict[str, int]:
        return {"right": self.n_classes, "rows": self.n_classes}

    def metrics(self, score: Score) -> dict[str, float]:
        return {"accuracy": _ratio(score["right"].sum(), score["rows"].sum())}

    def by_name(self, score: Score) -> tuple[str, list[float]]:
        return "recall", [_ratio(r, n) for r, n in zip(score["right"], score["rows"], strict=True)]

    def answer(self, outputs: Tensor) -> npt.NDArray[Any]:
        found: npt.NDArray[Any] = np.array(self.names)[outputs.argmax(1).cpu().numpy()]
        return found

    def strata(self, targets: Tensor, n_train: int, bins: int = 10) -> Strata:
        return Strata(targets.numpy(), self.names)

    def excess(self, score: Score, most: Score) -> str:
        if np.any(score["right"] > score["rows"]):
            return "more correct predictions than examples"
        return super().excess(score, most)


@dataclass(frozen=True, kw_only=True)
class MultiLabel(Objective):
    """Classification with any number of labels per example, by binary cross-entropy.

    Targets (N, L) are 0 or 1; outputs (N, L) are logits. A label is predicted if its logit is positive.
    """

    task = "multilabel"
    primary = Metric("micro_f1", percent=True)

    def checked(self, targets: Tensor) -> str:
        if targets.ndim != 2 or targets.shape[1] != self.n_outputs:
            return (
                f"targets have shape {tuple(targets.shape)}; they must be (N, {self.n_outputs}), one column per label"
            )
        return "" if bool(((targets == 0) | (targets == 1)).all()) else "targets must be 0 or 1"

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean binary cross-entropy over examples and labels, in nats."""
        outputs = losses.wide(outputs)
        return F.binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype))

    def scores(self, outputs: Tensor, targets: Tensor, sizes: Sequence[int]) -> list[Score]:
        """Return `tp`, `fp` and `fn` per label (L,), and `exact` matches.

        All labels of an example with a non-finite logit count as wrong.
        """
        true = targets.to(outputs.device).bool()
        said = torch.where(outputs.isfinite().all(1, keepdim=True), outputs > 0, ~true)
        found = {"tp": said & true, "fp": said & ~true, "fn": ~said & true, "exact": (said == true).all(1)[:, None]}
        return _sums(found, sizes)

    def shapes(self) -> dict[str, int]:
        return {"tp": self.n_outputs, "fp": self.n_outputs, "fn": self.n_outputs, "exact": 1, "rows": 1}

    def metrics(self, score: Score) -> dict[str, float]:
        """Return the F1 score over all labels together (`micro_f1`), its mean over the labels that occur
        (`macro_f1`), and `exact_match`.
        """
        tp, wrong = score["tp"], score["fp"] + score["fn"]
        occurs = (tp + score["fn"]) > 0
        each = [_ratio(2 * t, 2 * t + w) for t, w in zip(tp[occurs], wrong[occurs], strict=True)]
        micro = _ratio(2 * tp.sum(), 2 * tp.sum() + wrong.sum())
        if score.n_rows and math.isnan(micro):  # no label occurs and none was predicted
            micro = 1.0
        return {
            "micro_f1": micro,
            "macro_f1": float(np.mean(each)) if each else math.nan,
            "exact_match": _ratio(score["exact"].sum(), score.n_rows),
        }

    def by_name(self, score: Score) -> tuple[str, list[float]]:
        tp, wrong = score["tp"], score["fp"] + score["fn"]
        occurs = tp + score["fn"] > 0
        return "f1", [_ratio(2 * t, 2 * t + w) if o else math.nan for t, w, o in zip(tp, wrong, occurs, strict=True)]

    def answer(self, outputs: Tensor) -> npt.NDArray[Any]:
        found = np.empty(len(outputs), dtype=object)
        found[:] = [tuple(np.array(self.names)[row].tolist()) for row in (outputs > 0).cpu().numpy()]
        return found

    def strata(self, targets: Tensor, n_train: int, bins: int = 10) -> Strata:
        """Return groups of examples by their rarest label in the training examples. Examples without labels form one group."""
        has = targets.bool().numpy()
        counts = has[:n_train].sum(0)
        order = np.argsort(counts, kind="stable")  # the rarest label first; the lower index first if equal
        first = has[:, order].argmax(1)
        return Strata(np.where(has.any(1), order[first], self.n_outputs), (*self.names, "(no label)"))

    def excess(self, score: Score, most: Score) -> str:
        rows = score.n_rows
        if any(np.any(score[name] > rows) for name in ("tp", "fp", "fn", "exact")):
            return "more predictions than examples"
        return super().excess(score, most)


@dataclass(frozen=True, kw_only=True)
class Regression(Objective):
    """Regression. Targets and outputs (N, M) are numbers, in standard deviations from the mean of the training targets.

    Attributes:
        mean, std: mean and standard deviation (M,) of the training targets, in their own units.
        loss_name: `mse`, or `huber` with threshold `delta` (in standard deviations).
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    loss_name: Literal["mse", "huber"] = "mse"
    delta: float = 1.0
    task = "regression"
    primary = Metric("rmse", "lower")

    @property
    def metric(self) -> Metric:
        return self.primary._replace(unit="" if len(self.names) == 1 else "standard deviations")

    def checked(self, targets: Tensor) -> str:
        if targets.ndim != 2 or targets.shape[1] != self.n_outputs or not targets.is_floating_point():
            return f"targets have shape {tuple(targets.shape)}; they must be (N, {self.n_outputs}) floating point"
        return (
            "" if bool(targets.isfinite().all()) else "targets contain NaN or infinite values; remove or replace them"
        )

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean squared or Huber error over examples and targets, in (squared) standard deviations."""
        outputs = losses.wide(outputs)
        targets = targets.to(outputs.dtype)
        return (
            F.mse_loss(outputs, targets)
            if self.loss_name == "mse"
            else F.huber_loss(outputs, targets, delta=self.delta)
        )

    def scores(self, outputs: Tensor, targets: Tensor, sizes: Sequence[int]) -> list[Score]:
        """Return sums over examples: squared errors `se`, absolute errors `ae`, targets `t` and squared targets `t2`, (M,) each, and
        `bad`.

        `bad` is the number of examples with non-finite outputs. Their errors count as the largest possible error.
        """
        t = targets.to(outputs.device).double()
        error = outputs.double() - t
        parts = {"se": error.square(), "ae": error.abs(), "t": t, "t2": t.square()}
        found = {name: _fixed(value) for name, value in parts.items()}
        return _sums(found | {"bad": ~outputs.isfinite().all(1, keepdim=True)}, sizes)

    def shapes(self) -> dict[str, int]:
        return {**dict.fromkeys(("se", "ae", "t", "t2"), self.n_outputs), "bad": 1, "rows": 1}

    def metrics(self, score: Score) -> dict[str, float]:
        """Return `rmse`, `mae` and `r2`. With one target, errors are in its units; with several targets, in standard deviations.

        `r2` is the mean over targets of 1 - (mean squared error) / (variance of the scored targets), or NaN if a variance is 0. All three
        are NaN if an output was not finite.
        """
        n = score.n_rows
        if not n or score["bad"].any():
            return dict.fromkeys(("rmse", "mae", "r2"), math.nan)
        se, ae, t, t2 = (score[name] / UNIT / n for name in ("se", "ae", "t", "t2"))
        variance = t2 - np.square(t)
        scale = self.std[0] if len(self.names) == 1 else 1.0
        r2 = float(np.mean(1 - se / variance)) if np.all(variance > 1e-12) else math.nan
        return {"rmse": scale * math.sqrt(float(se.mean())), "mae": scale * float(ae.mean()), "r2": r2}

    def answer(self, outputs: Tensor) -> npt.NDArray[Any]:
        found: npt.NDArray[Any] = outputs.double().cpu().numpy() * np.array(self.std) + np.array(self.mean)
        return found[:, 0] if len(self.names) == 1 else found

    def strata(self, targets: Tensor, n_train: int, bins: int = 10) -> Strata:
        """Return quantile bins of the first target, computed from the training examples. Bins with equal edges are merged."""
        values = targets[:, 0].double().numpy()
        edges = np.unique(np.quantile(values[:n_train], np.linspace(0, 1, bins + 1)[1:-1]))
        edges = edges[edges > values[:n_train].min()]  # no empty first bin
        if not len(edges):
            return Strata(np.zeros(len(values), np.int64), ("all",))
        ends = [f"{e * self.std[0] + self.mean[0]:.4g}" for e in edges]
        names = (
            [f"below {ends[0]}", *(f"{a} to {b}" for a, b in zip(ends, ends[1:], strict=False)), f"{ends[-1]} or more"]
        )  # fmt: skip
        return Strata(np.searchsorted(edges, values, side="right").astype(np.int64), tuple(names))

    def excess(self, score: Score, most: Score) -> str:
        if any(np.any(score[name] < 0) for name in ("se", "ae", "t2")):
            return "a negative sum of errors"
        if score["bad"].sum() > score.n_rows:
            return "more non-finite outputs than examples"
        return super().excess(score, most)


@dataclass(frozen=True, kw_only=True)
class Language(Objective):
    """Language modelling: predict the next token at every position.

    Targets (N, T) are int64 from 0 to V-1, or -100 if a position has no target; outputs (N, T, V) are logits. The loss is the
    cross-entropy, averaged over the tokens of the batch.
    """

    vocabulary: int  # V
    task = "language"
    primary = Metric("accuracy", percent=True)
    output_ndim = 3
    skew = "next tokens have no classes to skew"

    @property
    def n_outputs(self) -> int:
        return self.vocabulary

    def checked(self, targets: Tensor) -> str:
        if targets.ndim != 2 or targets.is_floating_point():
            return f"targets have shape {tuple(targets.shape)} and type {targets.dtype}; they must be (N, T) token ids"
        known = targets[targets != NO_TARGET]
        if len(known) and (int(known.min()) < 0 or int(known.max()) >= self.vocabulary):
            low, high = int(known.min()), int(known.max())
            return f"targets run from {low} to {high}; they must be from 0 to {self.vocabulary - 1}, or -100 for none"
        return ""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy per token in nats, or 0 if the batch has no tokens."""
        each, counts = self._errors(outputs, targets)
        return (each * counts).sum() / counts.sum().clamp(min=1)

    def scores(self, outputs: Tensor, targets: Tensor, sizes: Sequence[int]) -> list[Score]:
        """Return sums over positions with a target: `nll` (nats), `right` and `tokens`.

        A position with a non-finite logit counts as wrong.
        """
        targets = targets.to(outputs.device)
        each, counts = self._errors(outputs, targets)
        fine = outputs.isfinite().all(2)
        right = (outputs.argmax(2) == targets) & fine
        nll = _fixed(torch.where(counts, each.double().nan_to_num(MOST), 0.0).sum(1, keepdim=True))
        found = {"nll": nll, "right": right.sum(1, keepdim=True), "tokens": counts.sum(1, keepdim=True)}
        return _sums(found, sizes)

    def _errors(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy of each position (B, T), and whether the position has a target."""
        each = F.cross_entropy(losses.wide(outputs).transpose(1, 2), targets.clamp(min=0), reduction="none")
        return each, targets >= 0

    def shapes(self) -> dict[str, int]:
        return dict.fromkeys(("nll", "right", "tokens", "rows"), 1)

    def metrics(self, score: Score) -> dict[str, float]:
        """Return the `accuracy` of next-token predictions and the `perplexity`."""
        nll, tokens = float(score["nll"].sum() / UNIT), int(score["tokens"].sum())
        perplexity = math.exp(min(nll / tokens, 700.0)) if tokens else math.nan
        return {"accuracy": _ratio(score["right"].sum(), tokens), "perplexity": perplexity}

    def answer(self, outputs: Tensor) -> npt.NDArray[Any]:
        ids: npt.NDArray[np.int64] = outputs.argmax(2).cpu().numpy()
        names: npt.NDArray[Any] = np.array(self.names or range(self.vocabulary))
        found: npt.NDArray[Any] = np.take(names, ids)
        return found

    def excess(self, score: Score, most: Score) -> str:
        if np.any(score["right"] > score["tokens"]) or np.any(score["nll"] < 0):
            return "more correct predictions than tokens, or a negative log-likelihood"
        return super().excess(score, most)


NO_TARGET: Final = -100
"""The target of a position without a next token, which does not count."""

OBJECTIVES: Final[Mapping[str, type[Objective]]] = {
    cls.task: cls for cls in (Classification, MultiLabel, Regression, Language)
}


def from_content(content: Mapping[str, Any]) -> Objective:
    """Return the objective that `content()` describes. Raise DataError if it is malformed."""
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in content.items() if name != "task"}
    try:
        return OBJECTIVES[content["task"]](**values)
    except (KeyError, TypeError) as error:
        raise DataError(f"malformed learning task: {error}") from None


def _ratio(a: Any, b: Any) -> float:
    return float(a / b) if b else math.nan


def _fixed(values: Tensor) -> Tensor:
    """Return `round(values * UNIT)` as int64. Non-finite values and values that are too large become the largest summand."""
    return (values * UNIT).nan_to_num(MOST, MOST, -MOST).clamp(-MOST, MOST).round().to(torch.int64)


def _sums(values: Mapping[str, Tensor], sizes: Sequence[int]) -> list[Score]:
    """Return the sums over each client's consecutive examples, and the number of examples as `rows`."""
    device = next(iter(values.values())).device
    places = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).to(device)

    def summed(value: Tensor) -> Ints:
        total = torch.zeros(len(sizes), *value.shape[1:], dtype=torch.int64, device=device)
        found: Ints = total.index_add_(0, places, value.to(torch.int64)).cpu().numpy()
        return found

    found = {name: summed(value) for name, value in values.items()} | {"rows": np.array(sizes, np.int64)[:, None]}
    return [Score({name: value[k] for name, value in found.items()}) for k in range(len(sizes))]
