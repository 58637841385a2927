"""The Python interface, `fedloom.run(...)`. Its arguments have the same names as the settings on the command line."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from fedloom.config.parsing import set_dotted
from fedloom.config.settings import Settings, Values, make_settings
from fedloom.data import SOURCES, Dataset, Federation
from fedloom.data.absent import absent_data
from fedloom.data.preprocess import PREPROCESS, Preprocess
from fedloom.errors import ConfigError
from fedloom.experiment.build import make_dataset
from fedloom.experiment.loop import Experiment, GivenObjects, OnRound
from fedloom.experiment.metrics import NOTHING_LEARNT, nothing_learnt
from fedloom.experiment.personal_model import PersonalModel
from fedloom.experiment.predictions import AT_ONCE, Predictions
from fedloom.experiment.run_folder import RunFolder
from fedloom.method import Method
from fedloom.methods.registry import method_name
from fedloom.objectives import Objective
from fedloom.tools.export import Exported, export_client, needs, targets

if TYPE_CHECKING:
    import numpy.typing as npt
    import pandas as pd

log = logging.getLogger(__name__)

Model = nn.Module | Callable[..., nn.Module]


class Run:
    """A run: its settings, tables and models."""

    def __init__(
        self, experiment: Experiment, summary: Values, with_data: Callable[[], Experiment] | None = None
    ) -> None:
        """Open the run. If `experiment` is without its data, `with_data` returns the run with its data."""
        self._experiment, self._reopen = experiment, with_data
        self.summary = summary
        """The contents of `summary.json`, or an empty dictionary if the run is not finished."""
        self.folder: Path = experiment.folder.path
        """The folder with all files of the run."""
        self._predictions = Predictions(experiment, lambda: self._whole)

    @cached_property
    def _whole(self) -> Experiment:
        return self._reopen() if self._reopen else self._experiment

    @property
    def finished(self) -> bool:
        """Whether the run is finished: all rounds are completed, or it stopped early."""
        return bool(self.summary)

    @property
    def settings(self) -> Settings:
        """The settings of the run."""
        return self._experiment.settings

    @property
    def objective(self) -> Objective:
        """The learning task, with the names of classes, labels or targets."""
        return self._experiment.data.objective

    @property
    def preprocess(self) -> Preprocess:
        """The conversion of raw values to model inputs (`preprocess.json`)."""
        return self._experiment.data.preprocess

    @property
    def n_clients(self) -> int:
        """Number of clients, including those that joined after training."""
        return self._experiment.data.n_clients

    @property
    def owners(self) -> tuple[str, ...]:
        """Names of the clients' owners, in the order of the clients. Empty if the clients have no names."""
        return self._experiment.data.partition.owners

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """The metrics table, with one row per evaluated round."""
        import pandas as pd

        return pd.DataFrame(self._experiment.rows)

    @cached_property
    def clients(self) -> pd.DataFrame:
        """The clients table, with one row per client and round in which the client was trained or scored."""
        import pandas as pd

        return pd.DataFrame(self._experiment.client_rows)

    @property
    def federation(self) -> Federation:
        """The clients' examples. Raise UsageError if the data of an opened run are missing."""
        return self._whole.data

    def predict(self, client: int | str, inputs: Any, *, batch: int = AT_ONCE, adapt: bool = True) -> npt.NDArray[Any]:
        """Return a model's predictions for new raw values, in the form of the data.

        Args:
            client: the client's number, the name of its owner (`partition=natural`), or "server" for the server's model.
            inputs: one or several examples. For tables, a file, a pandas table or a dictionary of columns; columns are found by name. For
                images, files, Pillow images or uint8 arrays. Otherwise, arrays as in training, or an .npy or .npz file.
            batch: number of examples that are computed at once.
            adapt: whether to adapt the model to the client's own examples before it predicts, if the method does so. This requires the
                run's data.

        Returns:
            Class names (N,), tuples of label names (N,), numbers in the targets' units (N,) or (N, M), or token ids or names (N, T).

        Raises:
            UsageError: inputs do not fit the run, there is no such client, or the run's data are required but missing.
        """
        return self._predictions.predict(client, inputs, adapt, batch)

    def predict_proba(
        self, client: int | str, inputs: Any, *, batch: int = AT_ONCE, adapt: bool = True
    ) -> pd.DataFrame:
        """Return the probability of each class or label, with one row per example. For the arguments, see `predict`."""
        return self._predictions.probabilities(client, inputs, adapt, batch)

    def score(self, client: int | str, data: Any, *, batch: int = AT_ONCE, adapt: bool = True) -> dict[str, float]:
        """Return the metrics of a model on new raw values with targets, the primary metric first.

        `data` is a table with the label columns of the training table, a folder with one folder of images for each class, a pair of inputs
        and targets, or a data set whose inputs were made as in training. For the other arguments, see `predict`.
        """
        return self._predictions.score(client, data, adapt, batch)

    def generate(self, client: int | str, text: str, n: int = 80, *, temperature: float = 0.0, seed: int = 0) -> str:
        """Return a text and its continuation by a language model.

        Args:
            client: see `predict`.
            text: the beginning of the text.
            n: the maximum number of new tokens (words, characters or bytes). The text ends earlier if the model predicts the end token.
            temperature: with 0, the most probable token is used. If positive, tokens are drawn, and a higher value makes them more random.
            seed: the seed of the draws.
        """
        return self._predictions.generate(client, text, n=n, temperature=temperature, seed=seed)

    def model(self, client: int | str, *, adapt: bool = True) -> PersonalModel:
        """Return a model in evaluation mode. `model(x)` returns outputs, such as logits (B, Y).

        For `client` and `adapt`, see `predict`. Inputs are tensors as in training, such as those from `run.federation.test(i)`;
        `model.preprocess` converts raw values to them.
        """
        return self._predictions.model(client, adapt)

    def shared_model(self, client: int = 0) -> PersonalModel:
        """Return the shared body with one linear classifier for all clients. `model(x)` returns scores (B, Y).

        The classifier is fitted to sums over the features of all clients' training examples (see `eval.shared_head`). Unlike `model`, it
        is trained on the classes of all clients. `client` has an effect only if clients keep parts of the body, such as BatchNorm's
        statistics.

        Raises:
            ConfigError: the run did not use `eval.shared_head`.
        """
        return self._experiment.shared_model(client)

    def export(self, client: int = 0, out: str | Path | None = None) -> Exported:
        """Write a client's model as an ONNX file, and compare its outputs with torch on the client's examples. This requires the run's
        data.

        `out` is the folder of the file; default: `export` in the run's folder. Files are never overwritten.
        """
        needs()
        folder = self.folder / "export" if out is None else Path(out)
        (i, file), *_ = targets(folder, [client]).items()
        return export_client(self._whole, i, file)

    def __repr__(self) -> str:
        s = self.settings
        if not self.finished:
            return (
                f"<Run {s.method.name} on {s.data.name}, {self._experiment.done} of {s.rounds} rounds; {self.folder}>"
            )
        found = {k: v["final"] for k, v in self.summary.items() if isinstance(v, dict) and "final" in v}
        scores = ", ".join(f"{name} {value:.4f}" for name, value in found.items() if value is not None)
        return f"<Run {self.summary['method']} on {self.summary['data']}, {self.summary['rounds']} rounds: {scores}; {self.folder}>"


def run(
    method: Method | str = "fedavg",
    *,
    data: Dataset | str = "digits",
    model: Model | str | None = None,
    partition: Any = None,
    progress: bool = True,
    **settings: Any,
) -> Run:
    """Run one experiment and return the finished run.

    Args:
        method: a method object (`fedloom.FedRIR(lr=5e-4)`), a registered name, or `my.py:Mine`.
        data: a name, or a data set from `fedloom.from_arrays(x, y)`.
        model: a name, an `nn.Module` (whose weights are the initial weights), or a class or function that creates one; default:
            fedavg_cnn.
        partition: the name of a scheme, a table of settings (`{"name": "dirichlet", "alpha": 0.5}`), or the partition itself: a
            `fedloom.data.Partition`, the numbers of each client's examples, or the owner of each example.
        progress: whether to show a live progress line.
        settings: any key of `fedloom run` (`clients=10`, `rounds=20`, `seed=1`). Write tables as dictionaries (`partition={"name":
            "iid"}`) or as dotted names (`**{"partition.alpha": 0.5}`).

    Raises:
        UsageError: settings are unknown or contradict each other, or data are missing.
    """
    _check_given(method, data, model, settings)
    values, parts = given_objects(data, model, partition, settings)
    set_dotted(values, "method", _method_table(method))
    parts = replace(parts, method=method if isinstance(method, Method) else None)
    experiment = Experiment(make_settings(values), parts)
    return _run(experiment, progress)


def resume(
    folder: str | Path,
    *,
    method: Method | None = None,
    data: Dataset | None = None,
    model: Model | None = None,
    partition: Any = None,
    progress: bool = True,
    accept_changes: bool = False,
    rounds: int | None = None,
) -> Run:
    """Resume an interrupted run from its folder. The result is bit for bit the same as that of an uninterrupted run.

    A higher number of `rounds` extends a finished run. The run keeps the scores of its former last round.

    Settings, versions or code that differ from the start of the run are refused, unless `accept_changes` is true; the run then records the
    differences. If the run was started with Python objects, pass the same objects again. Everything else is read from the config file in
    the folder.
    """
    parts = GivenObjects(method=method, dataset=data, model=model, partition=partition)
    return _run(Experiment.resume(folder, parts, accept_changes, rounds), progress)


def open(
    folder: str | Path,
    *,
    method: Method | None = None,
    data: Dataset | None = None,
    model: Model | None = None,
) -> Run:
    """Open the folder of a finished or unfinished run, to predict with its latest checkpoint. The files of the run do not change.

    The run's data are read only if they are required: for `federation`, `export`, and methods that adapt models before they predict.

    Args:
        folder: the run's folder.
        method, model: the objects with which the run was started, if they were objects.
        data: the data set with which the run was started, if it was an object and is required.

    Raises:
        RunFolderError: the folder has no checkpoint, or a file was damaged.
    """
    return reopened(Path(folder).expanduser(), GivenObjects(method=method, dataset=data, model=model))


def reopened(folder: Path, parts: GivenObjects) -> Run:
    """Return the run in a folder. Its data are read when they are required. `parts` are the objects with which the run was started."""

    def with_data() -> Experiment:
        return Experiment.reopen(folder, parts)

    summary = RunFolder.open(folder).summary()
    if not (folder / PREPROCESS).is_file():  # earlier versions did not write this file
        return Run(with_data(), summary)
    absent = replace(parts, dataset=None, partition=None, federation=absent_data(folder))
    return Run(Experiment.reopen(folder, absent), summary, with_data)


def load_data(
    path_or_name: str | Path,
    *,
    label: str | None = None,
    text: str | Sequence[str] | None = None,
    task: Literal["classification", "multilabel", "regression", "language"] | None = None,
    split: str | None = None,
    owner: str | None = None,
    missing: Literal["refuse", "drop", "fill"] = "refuse",
    **options: Any,
) -> Dataset:
    """Return a data set by its name, or from your own file or folder.

    Args:
        path_or_name: a known name (`fedloom list datasets`), or a file or folder (docs/data.md).
        label: the label column of a table, or several columns, separated by commas.
        text: the column of a table that contains texts, or several columns.
        task: the learning task; by default, it is derived from the labels.
        split: the column of a table that contains train or test.
        owner: the column of a table that names the owner of each example, or "folder" for images with one folder per owner.
        missing: what to do if values of a table are missing.
        options: other settings `data.KEY`, such as `image_size=32`, and `name=` for the name of the data set, but not `path`.

    Raises:
        UsageError: the data are missing or malformed, or an option is unknown.
    """
    known = str(path_or_name).lower().replace("_", "-") in SOURCES
    by_folder = owner == "folder"
    values: Values = {"label": label, "text": text, "task": task, "split": split, "missing": missing, **options}
    values |= {"name": str(path_or_name)} if known else {"path": str(path_or_name), "name": options.get("name", "mine")}
    values |= {"owner": owner} if by_folder else {}
    given = {"data": {key: value for key, value in values.items() if value is not None}}
    partition = {"name": "natural", "column": owner} if owner and not by_folder else {}
    return make_dataset(make_settings({**given, **({"partition": partition} if partition else {})}))


WITH_OBJECTS = ("data.normalise", "data.augment")
"""The settings of data that apply to a data set that is given as an object."""


def given_objects(
    data: Dataset | str, model: Model | str | None, partition: Any, settings: Mapping[str, Any]
) -> tuple[Values, GivenObjects]:
    """Return the settings, and the objects that replace some of them."""
    for key in settings if isinstance(data, Dataset) else ():
        if key.startswith("data.") and key not in WITH_OBJECTS:
            raise ConfigError(f"{key}: the data were given as an object; change the data there")
    values: Values = {}
    chosen: dict[str, Any] = {**settings, "data": data.name if isinstance(data, Dataset) else data}
    if model is not None:
        chosen["model"] = model if isinstance(model, str) else getattr(model, "__name__", type(model).__name__)
    for key, value in chosen.items():
        set_dotted(values, key, value)
    if partition is not None:
        named = isinstance(partition, str | Mapping)
        set_dotted(values, "partition", partition if named else "given")
        partition = None if named else partition
    return values, GivenObjects(
        partition=partition,
        dataset=data if isinstance(data, Dataset) else None,
        model=None if model is None or isinstance(model, str) else model,
    )


def _check_given(method: Any, data: Any, model: Any, settings: Mapping[str, Any]) -> None:
    """Raise ConfigError if the method or data have a wrong type, or if settings of a method or data are set that is
    passed as an object.
    """
    if not isinstance(method, Method | str):
        name = method.__name__ if isinstance(method, type) else type(method).__name__
        raise ConfigError(f"method: must be a method object, such as FedAvg(), or a name, not {name}")
    if not isinstance(data, Dataset | str | Mapping):  # a table of settings also names the data
        raise ConfigError(
            f"data: must be a name, or a data set from fedloom.from_arrays(x, y), not {type(data).__name__}"
        )
    if settings.get("models") and not (model is None or isinstance(model, str)):
        raise ConfigError("models: cannot be combined with `model`, which was given as an object; remove one of them")
    for key in settings:
        if isinstance(method, Method) and key.startswith("method."):
            raise ConfigError(
                f"{key}: the method was given as an object; set the value there, {type(method).__name__}(...)"
            )


def _run(experiment: Experiment, progress: bool) -> Run:
    if progress:
        from fedloom.experiment.progress import live

        with live(experiment.settings.method.name, done=experiment.done) as on_round:
            summary = experiment.run(on_round)
    else:
        summary = experiment.run()
    if nothing_learnt(summary):
        log.warning("%s: %s", experiment.folder.path, NOTHING_LEARNT)
    return Run(experiment, summary)


def _method_table(method: Method | str) -> str | Mapping[str, Any]:
    return method if isinstance(method, str) else {"name": method_name(type(method)), **dataclasses.asdict(method)}


__all__ = ["OnRound", "Run", "load_data", "open", "resume", "run"]
