"""The Python interface, `fedloom.run(...)`. Its arguments have the same names as on the command line."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from fedloom.config.parsing import set_dotted
from fedloom.config.settings import Values, make_settings
from fedloom.data import Dataset
from fedloom.errors import ConfigError, suggest
from fedloom.experiment.build import arithmetic
from fedloom.experiment.loop import Experiment, GivenObjects, OnRound
from fedloom.experiment.metrics import NOTHING_LEARNT, nothing_learnt
from fedloom.experiment.personal_model import PersonalModel
from fedloom.method import Method
from fedloom.methods.registry import method_name

if TYPE_CHECKING:
    import numpy.typing as npt
    import pandas as pd

log = logging.getLogger(__name__)

AT_ONCE = 512  # examples in one batch of predictions
Model = nn.Module | Callable[..., nn.Module]


class Run:
    """A finished run."""

    def __init__(self, experiment: Experiment, summary: Values) -> None:
        self._experiment = experiment
        self.summary = summary
        """The contents of `summary.json`."""
        self.folder: Path = experiment.folder.path
        """The folder with all files of the run."""

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """The metrics table: one row per evaluated round."""
        import pandas as pd

        return pd.DataFrame(self._experiment.rows)

    @cached_property
    def clients(self) -> pd.DataFrame:
        """The clients table: one row per client and round in which the client trained or was scored."""
        import pandas as pd

        return pd.DataFrame(self._experiment.client_rows)

    def model(self, i: int) -> PersonalModel:
        """Return client `i`'s personal model in evaluation mode, adapted by the method: `model(x)` gives logits (B, Y).

        Inputs must be normalised as in training; `run.federation.test(i)` returns such inputs.
        """
        return self._experiment.personal_model(i)

    def shared_model(self, client: int = 0) -> PersonalModel:
        """Return the shared body with one linear classifier for all clients: `model(x)` gives scores (B, Y).

        The classifier is fitted on the features of all clients' training examples, from sums (see `eval.shared_head`). Unlike `model`,
        it knows the classes of all clients. `client` matters only if clients keep parts of the body, such as BatchNorm's statistics.

        Raises:
            ConfigError: the run was made without `eval.shared_head`.
        """
        return self._experiment.shared_model(client)

    def predict(self, client: int | str, inputs: Any) -> npt.NDArray[Any]:
        """Return a client's predictions for new examples, as values of the data.

        Args:
            client: the client's number, or the name of its owner (`partition=natural`).
            inputs: raw inputs like those of `fedloom.from_arrays`, (N, ...); they are normalised as in training.

        Returns:
            Class names (N,); tuples of label names (N,); numbers in the targets' units, (N,) or (N, M); token ids or names (N, T).
        """
        import torch

        from fedloom.data.arrays import stored_inputs
        from fedloom.inputs import map_inputs, n_examples

        data, owners = self.federation, self.federation.partition.owners
        if isinstance(client, str) and client not in owners:
            known = (
                suggest(client, owners)
                if owners
                else f"; clients have no names here, so give a number below {data.n_clients}"
            )
            raise ConfigError(f"client={client}: no such owner{known}")
        i = owners.index(client) if isinstance(client, str) else client
        if not 0 <= i < data.n_clients:
            raise ConfigError(f"client={client}: must be from 0 to {data.n_clients - 1}")
        with arithmetic(self._experiment.settings), torch.inference_mode():
            x, model = data.prepared(stored_inputs(inputs, data.spec), i), self.model(i)
            parts = [map_inputs(lambda v, k=k: v[k : k + AT_ONCE], x) for k in range(0, n_examples(x), AT_ONCE)]
            return data.objective.answer(torch.cat([model(part) for part in parts]))  # type: ignore[no-any-return]

    @property
    def federation(self) -> Any:
        """The clients' examples (`fedloom.data.Federation`)."""
        return self._experiment.data

    def __repr__(self) -> str:
        found = {k: v["final"] for k, v in self.summary.items() if isinstance(v, dict) and "final" in v}
        scores = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
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
        model: a name, an `nn.Module` (its weights are the initial ones), or a class or function that creates one; default fedavg_cnn.
        partition: a scheme's name, a table of settings (`{"name": "dirichlet", "alpha": 0.5}`), or the partition itself: a
            `fedloom.data.Partition`, the numbers of each client's examples, or the owner of each example.
        progress: whether to show a live progress line.
        settings: any key of `fedloom run` (`clients=10`, `rounds=20`, `seed=1`); tables as dictionaries (`partition={"name": "iid"}`)
            or as dotted names (`**{"partition.alpha": 0.5}`).

    Raises:
        UsageError: unknown or contradictory settings, or missing data.
    """
    _check_given(method, data, model, settings)
    values: Values = {}
    chosen = {**settings, "method": _method_table(method), "data": data.name if isinstance(data, Dataset) else data}
    chosen |= (
        {}
        if model is None
        else {"model": model if isinstance(model, str) else getattr(model, "__name__", type(model).__name__)}
    )
    for key, value in chosen.items():
        set_dotted(values, key, value)
    if partition is not None:
        named = isinstance(partition, str | Mapping)
        set_dotted(values, "partition", partition if named else "given")
        partition = None if named else partition
    parts = GivenObjects(
        partition=partition,
        method=method if isinstance(method, Method) else None,
        dataset=data if isinstance(data, Dataset) else None,
        model=None if model is None or isinstance(model, str) else model,
    )
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
) -> Run:
    """Resume an interrupted run from its folder. The result is bit for bit that of an uninterrupted run.

    Other settings, versions or code than at the start are refused, unless `accept_changes` is true; the run then records them.
    If the run was started with Python objects, pass the same objects again. Everything given by name is read from the folder's config.
    """
    parts = GivenObjects(method=method, dataset=data, model=model, partition=partition)
    return _run(Experiment.resume(folder, parts, accept_changes), progress)


def _check_given(method: Any, data: Any, model: Any, settings: Mapping[str, Any]) -> None:
    """Raise ConfigError for a method or data of the wrong type, and for settings of a method or data given as an object."""
    if not isinstance(method, Method | str):
        name = method.__name__ if isinstance(method, type) else type(method).__name__
        raise ConfigError(f"method: must be a method object, such as FedAvg(), or a name, not {name}")
    if not isinstance(data, Dataset | str | Mapping):  # a table of settings also names the data
        raise ConfigError(
            f"data: must be a name, or a data set from fedloom.from_arrays(x, y), not {type(data).__name__}"
        )
    if settings.get("models") and not (model is None or isinstance(model, str)):
        raise ConfigError("models: replaces `model`, which was given as an object; remove one of them")
    for key in settings:
        if isinstance(method, Method) and key.startswith("method."):
            raise ConfigError(
                f"{key}: the method was given as an object; set the value there, {type(method).__name__}(...)"
            )
        if isinstance(data, Dataset) and key in [f"data.{k}" for k in ("rows", "path", "image_size", "task", "owner")]:
            raise ConfigError(f"{key}: the data were given as an object; change the data there")


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


__all__ = ["OnRound", "Run", "resume", "run"]
