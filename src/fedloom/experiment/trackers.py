"""Optional destinations for metrics: TensorBoard, Weights & Biases (also offline) and MLflow. Each requires an optional extra."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from fedloom.errors import ConfigError

Row = Mapping[str, Any]


class Tracker(Protocol):
    """Receives one row of metrics per evaluated round."""

    def log(self, number: int, row: Row) -> None:
        """Record the numbers of round `number`."""

    def close(self) -> None:
        """Flush and close."""


def make_trackers(names: Sequence[str], folder: Path, config: Mapping[str, Any]) -> list[Tracker]:
    """Return the trackers that `log` names. They write their files to the run's folder.

    Raises:
        ConfigError: the extra that a tracker requires is not installed.
    """
    known: dict[str, Callable[[Path, Row], Tracker]] = {"tensorboard": _TensorBoard, "wandb": _WandB, "mlflow": _MLflow}
    return [known[name](folder, config) for name in names]


def check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError if a tracker's extra is not installed, before a run writes any file."""
    for name in names:
        _import(name, name)


def _import(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ConfigError(f"log={name}: not installed; pip install 'fedloom[{name}]'") from None


def _numbers(row: Row) -> dict[str, float]:
    return {key: float(value) for key, value in row.items() if isinstance(value, (int, float)) and key != "round"}


class _TensorBoard:
    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        _import("tensorboard", "tensorboard")
        self._writer = _import("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(folder / "tensorboard"))

    def log(self, number: int, row: Row) -> None:
        for key, value in _numbers(row).items():
            self._writer.add_scalar(key, value, number)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    """Writes to the destination set by WANDB_MODE. With `WANDB_MODE=offline`, no network and no account are needed."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self._run = _import("wandb", "wandb").init(
            project="fedloom", name=folder.name, dir=str(folder), config=dict(config)
        )

    def log(self, number: int, row: Row) -> None:
        self._run.log(_numbers(row), step=number)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    """Writes to MLFLOW_TRACKING_URI or, if it is not set, to the folder `mlruns` in the run's folder."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        where = os.environ.get("MLFLOW_TRACKING_URI")
        if not where:  # MLflow 3 must be set to allow file stores; mlflow-skinny has no database
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            where = (folder / "mlruns").resolve().as_uri()
        self._client = _import("mlflow.tracking", "mlflow").MlflowClient(where)
        found = self._client.get_experiment_by_name("fedloom")
        number = found.experiment_id if found else self._client.create_experiment("fedloom")
        self._run = self._client.create_run(number, run_name=folder.name).info.run_id
        for key, value in config.items():
            self._client.log_param(self._run, key, value)

    def log(self, number: int, row: Row) -> None:
        for key, value in _numbers(row).items():
            self._client.log_metric(self._run, key, value, step=number)

    def close(self) -> None:
        self._client.set_terminated(self._run)
