"""Trackers: the real ones if installed, and a clear error if not."""

import importlib.util

import pytest

from fedloom.errors import ConfigError
from fedloom.experiment.trackers import make_trackers

ROWS = [(1, {"round": 1, "personal_accuracy": 0.25, "note": None}), (2, {"round": 2, "personal_accuracy": 0.5})]
CONFIG = {"rounds": 2, "method": {"name": "fedavg", "lr": 0.05}}


def track(name, folder):
    (tracker,) = make_trackers([name], folder, CONFIG)
    for number, row in ROWS:
        tracker.log(number, row)
    tracker.close()


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_missing_trackers_are_named(name, tmp_path):
    if importlib.util.find_spec(name):
        pytest.skip(f"{name} is installed")
    with pytest.raises(ConfigError, match=rf"log={name}: not installed; pip install 'fedloom\[{name}\]'"):
        make_trackers([name], tmp_path, CONFIG)


def test_a_run_with_a_tracker_that_is_not_installed_starts_nothing(experiment, tmp_path):
    if importlib.util.find_spec("tensorboard"):
        pytest.skip("tensorboard is installed")
    with pytest.raises(ConfigError, match="log=tensorboard"):
        experiment(log="tensorboard", out=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_no_trackers(tmp_path):
    assert make_trackers([], tmp_path, CONFIG) == []


def test_tensorboard_holds_the_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    track("tensorboard", tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("personal_accuracy")] == [(1, 0.25), (2, 0.5)]


def test_wandb_works_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    track("wandb", tmp_path)
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def test_mlflow_holds_the_numbers(tmp_path, monkeypatch):
    tracking = pytest.importorskip("mlflow.tracking")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    track("mlflow", tmp_path)
    client = tracking.MlflowClient((tmp_path / "mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("fedloom").experiment_id])
    history = client.get_metric_history(run.info.run_id, "personal_accuracy")
    assert [(m.step, m.value) for m in history] == [(1, 0.25), (2, 0.5)]
