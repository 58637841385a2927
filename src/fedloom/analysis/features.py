"""What features hold: how well a linear probe finds the class, and the client, in them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedloom.analysis.subject import Owner, Subject
from fedloom.errors import ConfigError, UsageError
from fedloom.method import Method
from fedloom.methods import FedRIR
from fedloom.rng import Stream

Floats = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]

OWN_ROWS = 40  # rows of each client
SAME_ROWS = 60  # rows that all clients see


class Table(NamedTuple):
    """Features of rows as clients see them: (n, D) by name; class, client and row number of each, (n,)."""

    features: dict[str, Floats]
    classes: Numbers
    clients: Numbers
    rows: Numbers


@torch.no_grad()
def features_of(method: Method, owner: Owner, x: Tensor) -> dict[str, Tensor]:
    """A client's features of inputs, by name, (B, D): f_g and f_cs of FedRIR, else what the body gives on the way to the prediction.

    Raises:
        ConfigError: the personal predictor calls no net and no part of a net with the name `body`.
    """
    nets, down, memory = owner
    if isinstance(method, FedRIR):
        return method.features(nets, x)
    with _watched(owner) as seen:
        method.predictors()["personal"](nets, x, down, memory)
    if not seen:
        raise ConfigError(f"analyse features: {type(method).__name__}'s predictor uses no net or part called 'body'")
    return {"body": seen[-1].flatten(1)}


@contextmanager
def _watched(owner: Owner) -> Iterator[list[Tensor]]:
    """Collects what modules called `body` give, while it lasts."""
    seen: list[Tensor] = []

    def keep(module: Any, inputs: Any, output: Tensor) -> None:
        seen.append(output)

    bodies = [
        part
        for net, module in owner.nets.modules.items()
        for name, part in module.named_modules(prefix=net)
        if name.rpartition(".")[2] == "body"
    ]
    hooks = [body.register_forward_hook(keep) for body in bodies]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def own_rows(subject: Subject) -> Table | None:
    """Each client's own test rows through its own nets; None where clients have none."""
    parts = [(i, subject.some(subject.data.partition.test[i], OWN_ROWS, "own", i)) for i in subject.clients]
    parts = [(i, rows) for i, rows in parts if len(rows)]
    return _table(subject, parts) if len(parts) > 1 else None


def same_rows(subject: Subject) -> Table | None:
    """The same common rows through every client's nets; None where there are none."""
    rows = subject.some(subject.data.partition.common, SAME_ROWS, "same")
    return _table(subject, [(i, rows) for i in subject.clients]) if len(rows) and len(subject.clients) > 1 else None


def _table(subject: Subject, parts: list[tuple[int, Any]]) -> Table:
    found: list[dict[str, Tensor]] = []
    labels: list[Tensor] = []
    for i, rows in parts:
        x, y = subject.data.rows(rows)
        found.append(features_of(subject.method, subject.owner(i), x))
        labels.append(y)
    named = {name: torch.cat([f[name] for f in found]).double().numpy() for name in found[0]}
    clients = np.concatenate([np.full(len(rows), i) for i, rows in parts])
    return Table(named, torch.cat(labels).numpy(), clients, np.concatenate([rows for _, rows in parts]))


def measure_features(table: Table, rng: Stream) -> dict[str, dict[str, float]]:
    """For each kind of features: how well a linear probe finds class and client, beside what guessing finds.

    A probe is ridge regression onto the classes, on standardised features, fitted on half of the rows and scored on the
    other half, both ways; copies of a row are always in one half. `*_chance` is the share of the most frequent answer,
    `client_from_class` what the label alone says of the client: where clients hold different classes, features that tell classes
    apart tell clients apart too. Silhouettes lie in [-1, 1].
    """
    require_sklearn()
    first = _half(table.rows, rng)
    class_alone = np.eye(int(table.classes.max()) + 1)[table.classes]
    common = {
        "class_chance": _chance(table.classes),
        "client_chance": _chance(table.clients),
        "client_from_class": probe(class_alone, table.clients, first),
    }
    return {
        name: {
            "class_probe": probe(x, table.classes, first),
            "client_probe": probe(x, table.clients, first),
            "class_silhouette": _silhouette(x, table.classes),
            "client_silhouette": _silhouette(x, table.clients),
            **common,
        }
        for name, x in table.features.items()
    }


def require_sklearn() -> None:
    """Refuse in one line what cannot be done without scikit-learn."""
    try:
        import sklearn  # noqa: F401
    except ImportError as missing:
        raise UsageError("analyse features needs scikit-learn: pip install 'fedloom[analyse]'") from missing


def probe(x: Floats, answers: Numbers, first: npt.NDArray[np.bool_]) -> float:
    """The accuracy of a linear probe, fitted on the half `first` and scored on the other, and the reverse: the mean."""
    from sklearn.linear_model import RidgeClassifierCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    found = []
    for half in (first, ~first):
        if len(np.unique(answers[half])) < 2:
            return _chance(answers)
        model = make_pipeline(StandardScaler(), RidgeClassifierCV(alphas=np.logspace(-2, 4, 7)))
        found.append(float((model.fit(x[half], answers[half]).predict(x[~half]) == answers[~half]).mean()))
    return float(np.mean(found))


def _half(rows: Numbers, rng: Stream) -> npt.NDArray[np.bool_]:
    distinct = np.unique(rows)
    chosen = distinct[rng.permutation(len(distinct)).numpy()[: len(distinct) // 2]]
    return np.isin(rows, chosen)


def _chance(answers: Numbers) -> float:
    """The share of the most frequent answer."""
    return float(np.bincount(answers).max() / len(answers))


def _silhouette(x: Floats, answers: Numbers) -> float:
    from sklearn.metrics import silhouette_score

    return float(silhouette_score(x, answers)) if 1 < len(np.unique(answers)) < len(answers) else float("nan")


class Plane(NamedTuple):
    """Features on their first two principal components: (n, 2), and the part of the variance that each explains."""

    points: Floats
    explained: tuple[float, float]


def plane(x: Floats) -> Plane:
    """The two directions in which the features vary most."""
    from sklearn.decomposition import PCA

    pca = PCA(2, svd_solver="full")
    points = pca.fit_transform(x)
    first, second = pca.explained_variance_ratio_ if x.std() > 0 else (0.0, 0.0)
    return Plane(points, (float(first), float(second)))
