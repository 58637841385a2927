"""Information in features, measured by the accuracy of linear probes for the class and for the client."""

from __future__ import annotations

import warnings
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

OWN_ROWS = 40  # number of examples of each client
SAME_ROWS = 60  # number of common examples, which are the same for all clients
FACTOR_ROWS = 500  # number of common examples for the probes of a known client factor
FORMS = ("linear", "mlp")
FACTOR_CLIENTS = 8  # maximum number of clients with these probes; the clients are evenly spaced


class Table(NamedTuple):
    """Features that clients' nets extract from examples.

    They are (n, D) by name. The class, client and number of each example are (n,).
    """

    features: dict[str, Floats]
    classes: Numbers
    clients: Numbers
    rows: Numbers


@torch.no_grad()
def features_of(method: Method, owner: Owner, x: Tensor) -> dict[str, Tensor]:
    """Return a client's features of inputs by name (B, D): FedRIR's f_g and f_cs, or the output of the body for other methods.

    Raises:
        ConfigError: the personal predictor uses no module with the name `body`.
    """
    nets, down, memory = owner
    if isinstance(method, FedRIR):
        return method.features(nets, x)
    with _watched(owner) as seen:
        method.predictors()["personal"](nets, x, down, memory)
    if not seen:
        raise ConfigError(f"analyse features: {type(method).__name__}'s predictor uses no module named 'body'")
    return {"body": seen[-1].flatten(1)}


@contextmanager
def _watched(owner: Owner) -> Iterator[list[Tensor]]:
    """Collect the outputs of modules named `body` within the context."""
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
    """Return the features of each client's own test examples from its own nets, or None if fewer than two clients have test examples."""
    parts = [(i, subject.some(subject.data.partition.test[i], OWN_ROWS, "own", i)) for i in subject.clients]
    parts = [(i, rows) for i, rows in parts if len(rows)]
    return _table(subject, parts) if len(parts) > 1 else None


def same_rows(subject: Subject) -> Table | None:
    """Return the features of the same common test examples from every client's nets, or None if there are no such examples."""
    rows = subject.some(subject.data.partition.common, SAME_ROWS, "same")
    return _table(subject, [(i, rows) for i in subject.clients]) if len(rows) and len(subject.clients) > 1 else None


def _table(subject: Subject, parts: list[tuple[int, Any]]) -> Table:
    found: list[dict[str, Tensor]] = []
    labels: list[Tensor] = []
    for i, rows in parts:
        x, y = subject.rows(rows)
        found.append(features_of(subject.method, subject.owner(i), x))
        labels.append(y)
    named = {name: torch.cat([f[name] for f in found]).double().numpy() for name in found[0]}
    clients = np.concatenate([np.full(len(rows), i) for i, rows in parts])
    return Table(named, torch.cat(labels).numpy(), clients, np.concatenate([rows for _, rows in parts]))


def measure_features(table: Table, rng: Stream) -> dict[str, dict[str, float]]:
    """Return the accuracy of linear probes for class and client, and the accuracy of guessing, for each kind of features.

    A probe is a ridge classifier on standardised features, which is fitted on half of the examples and scored on the other half, and vice
    versa. Copies of an example are always in the same half. `*_chance` is the frequency of the most frequent answer. `client_from_class`
    is the accuracy of a probe for the client that uses only the label: if clients have different classes, features that separate classes
    also separate clients. Silhouettes are in [-1, 1].
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


def measure_factor(subject: Subject) -> dict[str, dict[str, float]] | None:
    """Return how accurately a known client factor and the class can be predicted from each kind of features.

    Return None without a known factor. The examples are common test examples, whose factor is random. For each client, linear and MLP
    probes are fitted on the features of one half of the examples and scored on the other half, and vice versa. Values are means over
    clients. `factor_from_class` is the accuracy of a linear probe that uses only the label.
    """
    dataset, rng = subject.data.dataset, subject.rng("probe", "factor")
    rows = subject.some(subject.data.partition.common, FACTOR_ROWS, "factor")
    if not dataset.factor or len(rows) < 2:
        return None
    require_sklearn()
    x, y = subject.rows(rows)
    answers = {"factor": np.asarray(dataset.columns[dataset.factor][rows]), "class": y.numpy()}
    first = _half(rows, rng)
    places = np.linspace(0, len(subject.clients) - 1, min(len(subject.clients), FACTOR_CLIENTS)).round()
    each: dict[str, list[dict[str, float]]] = {}
    for i in (subject.clients[int(place)] for place in places):
        for name, found in features_of(subject.method, subject.owner(i), x).items():
            z = found.double().numpy()
            each.setdefault(name, []).append(
                {f"{what}_{form}": probe(z, a, first, form) for what, a in answers.items() for form in FORMS}
            )
    common = {f"{what}_chance": _chance(a) for what, a in answers.items()}
    common["factor_from_class"] = probe(np.eye(dataset.n_classes)[answers["class"]], answers["factor"], first)
    return {
        name: {key: float(np.mean([one[key] for one in found])) for key in found[0]} | common
        for name, found in each.items()
    }


def require_sklearn() -> None:
    """Raise UsageError if scikit-learn is not installed."""
    try:
        import sklearn  # noqa: F401
    except ImportError as missing:
        raise UsageError("analyse features needs scikit-learn: pip install 'fedloom[analyse]'") from missing


def probe(x: Floats, answers: Numbers, first: npt.NDArray[np.bool_], form: str = "linear") -> float:
    """Return the accuracy of a probe: the mean over fitting on the half `first` and scoring on the other, and vice versa.

    `form` is `linear` for a ridge classifier, or `mlp` for a network with one hidden layer of 64 units. Both use standardised features.
    """
    found = []
    for half in (first, ~first):
        if len(np.unique(answers[half])) < 2:
            return _chance(answers)
        model = _probe_model(form)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the MLP stops after a fixed number of epochs
            found.append(float((model.fit(x[half], answers[half]).predict(x[~half]) == answers[~half]).mean()))
    return float(np.mean(found))


def _probe_model(form: str) -> Any:
    from sklearn.linear_model import RidgeClassifierCV
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if form == "linear":
        return make_pipeline(StandardScaler(), RidgeClassifierCV(alphas=np.logspace(-2, 4, 7)))
    return make_pipeline(StandardScaler(), MLPClassifier((64,), max_iter=100, random_state=0))


def _half(rows: Numbers, rng: Stream) -> npt.NDArray[np.bool_]:
    distinct = np.unique(rows)
    chosen = distinct[rng.permutation(len(distinct)).numpy()[: len(distinct) // 2]]
    return np.isin(rows, chosen)


def _chance(answers: Numbers) -> float:
    """Return the frequency of the most frequent answer."""
    return float(np.bincount(answers).max() / len(answers))


def _silhouette(x: Floats, answers: Numbers) -> float:
    from sklearn.metrics import silhouette_score

    return float(silhouette_score(x, answers)) if 1 < len(np.unique(answers)) < len(answers) else float("nan")


class Plane(NamedTuple):
    """Features projected onto their first two principal components (n, 2), and the fraction of variance that each component explains."""

    points: Floats
    explained: tuple[float, float]


def plane(x: Floats) -> Plane:
    """Project features onto their first two principal components."""
    from sklearn.decomposition import PCA

    pca = PCA(2, svd_solver="full")
    points = pca.fit_transform(x)
    first, second = pca.explained_variance_ratio_ if x.std() > 0 else (0.0, 0.0)
    return Plane(points, (float(first), float(second)))
