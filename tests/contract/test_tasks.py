"""Every learning task on every engine, resumed and reported; and every method with every task."""

import importlib.util
import string
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fedloom
from contract import assert_close, assert_same, left_by
from fedloom.data import Dataset
from fedloom.errors import ConfigError
from fedloom.experiment.loop import Experiment, GivenObjects
from fedloom.methods.registry import METHODS
from fedloom.report import read, summary_table, write_page
from small import brief, interrupted_after

N, T, V = 120, 6, 11


def dataset(task: str) -> Dataset:
    """Return a small data set whose clients have different numbers of examples."""
    rng = np.random.default_rng(0)
    owners = np.repeat([0, 1, 2], [50, 40, 30])
    if task == "language":
        starts = rng.integers(V, size=(N, 1))
        tokens = (starts + np.arange(T + 1)) % V  # counting
        targets = tokens[:, 1:].copy()
        targets[::3, -2:] = -100
        return fedloom.from_arrays(tokens[:, :-1], targets, task="language", columns={"owner": owners})
    x = rng.normal(size=(N, 5)).astype(np.float32)
    if task == "classification":
        return fedloom.from_arrays(x, (x[:, 0] > 0).astype(int), columns={"owner": owners})
    if task == "multilabel":
        return fedloom.from_arrays(x, (x[:, :3] > 0).astype(int), task="multilabel", columns={"owner": owners})
    if task == "regression":
        return fedloom.from_arrays(x, 3 * x[:, 0] + x[:, 1], task="regression", columns={"owner": owners})
    if task == "two inputs":
        words = {"ids": rng.integers(1, V, size=(N, T)), "mask": (rng.random((N, T)) < 0.7).astype(int)}
        return fedloom.from_arrays(words, (words["ids"][:, 0] > 5).astype(int), columns={"owner": owners})
    raise ValueError(task)


class NextToken(nn.Module):
    """A recurrent language model."""

    def __init__(self, vocabulary, n_outputs):
        super().__init__()
        self.embedding, self.rnn = nn.Embedding(vocabulary, 4), nn.RNN(4, 6, batch_first=True)
        self.head = nn.Linear(6, n_outputs)

    def forward(self, ids):
        return self.head(self.rnn(self.embedding(ids))[0])


class MeanOfWords(nn.Module):
    """A classifier with two inputs."""

    def __init__(self, vocabulary, n_outputs):
        super().__init__()
        self.embedding, self.head = nn.Embedding(vocabulary, 4), nn.Linear(4, n_outputs)

    def forward(self, ids, mask):
        weight = mask[..., None].to(self.embedding.weight.dtype)
        return self.head((self.embedding(ids) * weight).sum(1) / weight.sum(1).clamp(min=1))


MODELS: dict[str, Any] = {
    "classification": "mlp",
    "multilabel": "mlp",
    "regression": "mlp",
    "language": NextToken,
    "two inputs": MeanOfWords,
}
PRIMARY = {"multilabel": "micro_f1", "regression": "rmse"}
SETTINGS = {"rounds": 2, "batch_size": 16, "partition": "natural", "engine.workers": 2, "precision": "fp64"}
ENGINES = ("sequential", "vectorised", "processes", "bytes+sequential", "debug+sequential")


@pytest.fixture
def make(tmp_path):
    """Return a function that creates an experiment with a task."""
    made = []

    def make_one(task: str, engine: str = "sequential", method: Any = "fedper", **settings: Any) -> Experiment:
        from fedloom.config.parsing import set_dotted
        from fedloom.config.settings import make_settings

        values: dict[str, Any] = {}
        chosen = {**SETTINGS, "method": method, "engine": engine, "out": str(tmp_path / f"run{len(made)}"), **settings}
        model = MODELS[task]
        names = {"data": "arrays", "model": model if isinstance(model, str) else model.__name__}
        for key, value in {**chosen, **names}.items():
            set_dotted(values, key, value)
        given = GivenObjects(dataset=dataset(task), model=None if isinstance(model, str) else model)
        made.append(Experiment(make_settings(values), given))
        return made[-1]

    return make_one


@pytest.mark.parametrize("task", MODELS)
def test_every_engine_gives_the_same_numbers_for_every_task(make, task):
    reference = left_by(make(task))
    for engine in ENGINES[1:]:
        run = left_by(make(task, engine))
        (assert_close if engine == "vectorised" else assert_same)(run, reference)


@pytest.mark.xdist_group("ray")
@pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="Ray is not installed (pip install ray)")
@pytest.mark.parametrize("task", ["language", "two inputs"])
def test_a_ray_cluster_gives_the_same_numbers(make, task):
    assert_same(left_by(make(task, "ray")), left_by(make(task)))


@pytest.mark.parametrize("task", MODELS)
def test_a_resumed_run_ends_the_same_and_is_reported(make, tmp_path, task):
    whole = make(task, rounds=3, checkpoint_every=1)
    expected = left_by(whole)
    cut = make(task, rounds=3, checkpoint_every=1)
    folder = interrupted_after(cut, 1)
    given = GivenObjects(dataset=dataset(task), model=None if isinstance(MODELS[task], str) else MODELS[task])
    resumed = left_by(Experiment.resume(folder, given))
    assert resumed.rows == expected.rows
    name = f"personal_{PRIMARY.get(task, 'accuracy')}"
    assert expected.summary[name]["final"] == expected.rows[-1][name]
    records = read([whole.folder.path])
    assert summary_table(records).row_count == 1
    write_page(records, tmp_path / "page.html")
    assert PRIMARY.get(task, "accuracy").replace("_", " ") in (tmp_path / "page.html").read_text().replace("_", " ")


FITS = {
    "fedproto": {"classification", "two inputs"},
    "fedvtc": set(),  # these inputs are no images
    "fedrir": set(),
    "fedrir_moments": set(),
    **{
        name: {"classification", "two inputs"}
        for name in (
            "ccvr",
            "fd",
            "fedas",
            "feddisco",
            "fedgen",
            "fedgh",
            "fedkd",
            "fedlc",
            "fedntd",
            "fedpac",
            "fedrod",
            "fedtgp",
            "fedtype",
            "fml",
            "gpfl",
        )
    },
    **{name: {*MODELS} - {"language"} for name in ("fedcp", "feddbe", "fedmrl", "moon")},
}
EVERY = set(MODELS)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_a_task_or_refuses_it_in_one_line(make, method):
    fitting = [task for task in MODELS if task in FITS.get(method, EVERY)]
    for task in MODELS:
        settings = {**brief(method), "rounds": 1}
        if task in fitting[-1:]:
            run = make(task, method=method, **settings)
            row = run.run() and run.rows[-1]
            assert row[f"personal_{PRIMARY.get(task, 'accuracy')}"] is not None
        elif task in fitting:
            make(task, method=method, **settings)
        else:
            with pytest.raises(ConfigError, match=rf"^method={method}: needs .*; .*use (another|a) method") as caught:
                make(task, method=method, **settings)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("task", ["multilabel", "regression", "two inputs"])
def test_fedrir_without_a_generator_runs_where_there_is_a_feature_vector(make, task):
    run = make(task, method={"name": "fedrir", "mcsl": "supervised"})
    run.run()
    assert run.rows[-1]["classify.loss"] > 0


def test_fedrir_refuses_a_sequence_of_features(make):
    with pytest.raises(ConfigError, match="needs one feature vector per example"):
        make("language", method={"name": "fedrir", "mcsl": "supervised"})


class Pooled(nn.Module):
    """A convolutional classifier without a linear head."""

    def __init__(self, n_classes):
        super().__init__()
        self.conv = nn.Conv2d(1, n_classes, 3)

    def forward(self, x):
        return self.conv(x).mean((2, 3))


def test_a_model_without_a_head_trains_with_methods_that_need_none(tmp_path):
    run = fedloom.run("fedavg", model=Pooled, rounds=2, out=str(tmp_path / "run"), progress=False)
    assert run.summary["personal_accuracy"]["final"] > 0.1
    with pytest.raises(ConfigError, match=r"method=fedper: needs a model with a linear head.*use a method such as"):
        fedloom.run("fedper", model=Pooled, out=str(tmp_path / "other"), progress=False)


@dataclass(frozen=True)
class Watched(fedloom.FedAvg):
    """FedAvg that checks the content of batches."""

    def loss(self, nets, batch, down, memory):
        assert batch.x["ids"].dtype == batch.x["mask"].dtype == torch.int64
        assert batch.y.dtype == torch.int64
        return super().loss(nets, batch, down, memory)


def test_tokens_reach_the_loss_as_integers(tmp_path):
    data = dataset("two inputs")
    assert data.inputs["ids"].dtype == torch.uint8  # stored in the smallest type
    run = fedloom.run(Watched(), data=data, model=MeanOfWords, rounds=1, out=str(tmp_path / "run"), progress=False)
    assert run.federation.normalisation(0) == {}
    run.model(0)(run.federation.test(0)[0])


METHODS_THAT_LEARN = ("fedavg", "fedper", "fedmr")


def mostly_slow(quick):
    """Return the methods that learn. All except one are marked slow."""
    return [pytest.param(name, marks=[] if name == quick else pytest.mark.slow) for name in METHODS_THAT_LEARN]


@pytest.mark.parametrize("method", METHODS_THAT_LEARN)
def test_a_regression_beats_the_mean(tmp_path, method):
    settings = {"model": "mlp", "clients": 4, "rounds": 8, "method.lr": 0.01, "method.local_epochs": 2}
    run = fedloom.run(method, data="diabetes", out=str(tmp_path / "run"), progress=False, **settings)
    assert run.summary["personal_r2"] > 0.2
    assert run.summary["primary"] == {"name": "rmse", "better": "lower", "percent": False, "unit": ""}


@pytest.mark.parametrize("method", mostly_slow("fedmr"))
def test_labels_beat_the_best_constant_answer(tmp_path, method):
    digits = fedloom.data.load("digits")
    y = digits.labels.numpy()
    labels = np.stack([y % 2 == 1, y >= 5, np.isin(y, [0, 6, 8, 9])], axis=1).astype(int)
    data = fedloom.from_arrays(digits.images, labels, task="multilabel", classes=["odd", "large", "loop"])
    settings = {
        "model": "mlp",
        "clients": 4,
        "rounds": 6,
        "method.lr": 0.2,
        "partition": {"name": "dirichlet", "alpha": 5.0},
    }
    run = fedloom.run(method, data=data, out=str(tmp_path / "run"), progress=False, **settings)
    share = labels.mean()
    assert run.summary["personal_micro_f1"]["final"] > 2 * share / (1 + share) + 0.05
    assert len(run.summary["personal_f1"]) == 3


@pytest.mark.parametrize("method", mostly_slow("fedper"))
def test_next_bytes_beat_the_most_frequent_one(tmp_path, method):
    blocks, owners = [], []
    for module in (textwrap, string):
        source = np.frombuffer(Path(module.__file__).read_bytes()[:4001], np.uint8).astype(np.int64) + 1
        blocks += [source[k : k + 41] for k in range(0, len(source) - 41, 40)]
        owners += [module.__name__] * len(range(0, len(source) - 41, 40))
    tokens = np.stack(blocks)
    columns = {"module": owners}
    data = fedloom.from_arrays(tokens[:, :-1], tokens[:, 1:], task="language", vocabulary=257, columns=columns)
    settings = {
        "model": NextToken,
        "rounds": 15,
        "method.lr": 0.02,
        "method.optimizer": "adam",
        "method.local_epochs": 2,
    }
    run = fedloom.run(method, data=data, out=str(tmp_path / "run"), progress=False, **settings)
    most_frequent = np.bincount(tokens[:, 1:].ravel()).max() / tokens[:, 1:].size
    assert run.summary["personal_accuracy"]["final"] > most_frequent + 0.02
    assert run.federation.partition.owners == ("string", "textwrap")


@pytest.mark.parametrize("task", ["multilabel", "regression"])
def test_fedrir_as_in_the_paper_runs_on_images_in_other_tasks(tmp_path, task):
    digits = fedloom.data.load("digits", rows=200)
    y = digits.labels.numpy()
    targets = np.stack([y % 2, y >= 5], axis=1).astype(int) if task == "multilabel" else y.astype(float)
    data = fedloom.from_arrays(digits.images, targets, task=task)
    settings = {"model": "mlp", "width": 16, "clients": 3, "rounds": 1, "partition": "iid"}
    run = fedloom.run("fedrir", data=data, out=str(tmp_path / "run"), progress=False, **settings)
    assert run.metrics["mcsl.reconstruction"].iloc[-1] > 0
    with pytest.raises(ConfigError, match=rf"method=fedvtc: needs classes, but data=arrays is {task}"):
        fedloom.run("fedvtc", data=data, out=str(tmp_path / "other"), progress=False, **settings)
