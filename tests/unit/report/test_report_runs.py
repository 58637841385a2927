"""Real runs whose primary metric is not accuracy: the files that they write, and what is read from these."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_report_page import written
from test_report_tables import cells

from fedloom import from_arrays
from fedloom.cli.executing import Finished, conclude
from fedloom.cli.main import main
from fedloom.cli.partitioning import _table
from fedloom.config.settings import make_settings
from fedloom.data import Dataset
from fedloom.errors import ConfigError, UsageError
from fedloom.experiment.build import make_federation
from fedloom.experiment.loop import Experiment, GivenObjects
from fedloom.experiment.progress import numbers
from fedloom.report import read
from fedloom.report.groups import headline
from fedloom.report.primary import Primary
from fedloom.report.tables import f1_grid, summary_grid

SETTINGS: dict[str, Any] = {
    "model": {"name": "mlp", "hidden": 4},
    "partition": {"name": "natural"},
    "rounds": 3,
    "checkpoint_every": 1,
    "engine": {"name": "sequential"},
}


def rows_of(task: str) -> Dataset:
    """Return 80 examples of four clients. Targets are around 150, so outputs are far off at first."""
    x = np.random.default_rng(0).normal(size=(80, 3)).astype(np.float32)
    targets = {
        "regression": 150 + 30 * x[:, 0],
        "multilabel": (x[:, :2] > 0).astype(np.uint8),
        "classification": (x[:, 0] > 0).astype(np.int64),
    }
    classes = ["cat", "dog"] if task == "multilabel" else None
    owners = {"owner": [f"h{i % 4}" for i in range(80)]}
    return from_arrays(x, targets[task], task=task, classes=classes, columns=owners)  # type: ignore[arg-type]


def experiment(task: str, out: Path, **settings: Any) -> Experiment:
    return Experiment(make_settings(SETTINGS | {"out": out} | settings), GivenObjects(dataset=rows_of(task)))


def cut(task: str, out: Path) -> Experiment:
    """Return a run that was interrupted after two rounds."""
    run = experiment(task, out)

    def stop(done: int, rounds: int, row: object) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.run(stop)
    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that returns the folder of a finished run of a task. Each run is done once."""
    folder, ran = tmp_path_factory.mktemp("runs"), set[str]()

    def call(task: str) -> Path:
        if task not in ran:
            experiment(task, folder / task, eval={"valid": 0.1, "fitted": True}).run()
            ran.add(task)
        return folder / task

    return call


@pytest.mark.parametrize(
    ("task", "primary"),
    [
        ("regression", Primary("rmse", "lower", False)),
        ("multilabel", Primary("micro_f1")),
        ("classification", Primary("accuracy")),
    ],
)
def test_a_run_names_its_metric_from_the_start_and_its_numbers_are_found(
    finished: Callable[[str], Path], task: str, primary: Primary
) -> None:
    folder = finished(task)
    named = {
        json.dumps(json.loads((folder / f"{file}.json").read_text())["primary"]) for file in ("partition", "summary")
    }
    assert named == {json.dumps(primary._asdict())}
    (record,) = read([folder])
    assert record.primary == primary
    summary = json.loads((folder / "summary.json").read_text())
    last = record.metrics.iloc[-1]
    for facet in ("", "fitted"):
        for statistic in ("final", "last10", "best_on_test", "chosen_on_validation", "uniform", "std", "worst10"):
            measure = primary.measure("personal", facet)
            assert headline(record, measure, statistic) == summary[measure][statistic]
    assert headline(record, primary.measure("personal"), "worst10") == last[primary.measure("personal", "worst10")]


def test_the_worst_tenth_of_the_clients_of_a_regression_has_the_largest_errors(finished: Callable[[str], Path]) -> None:
    (record,) = read([finished("regression")])
    assert record.clients is not None
    last = record.clients[record.clients["round"] == 3]
    assert headline(record, "personal_rmse", "worst10") == last["personal_rmse"].max()  # of four clients, one
    assert cells(summary_grid([record]), "fedavg")["personal worst 10%"].value == last["personal_rmse"].max()


def test_an_interrupted_run_is_reported_in_its_metric_and_resumes(tmp_path: Path) -> None:
    cut("regression", tmp_path / "run")
    (record,) = read([tmp_path / "run"])
    assert (record.finished, record.primary.name) == (False, "rmse")
    assert "rmse (lower is better)" in written(tmp_path / "run", tmp_path / "page.html").words
    summary = Experiment.resume(tmp_path / "run", GivenObjects(dataset=rows_of("regression"))).run()
    assert summary["finished"]


def test_labels_have_a_table_of_f1(finished: Callable[[str], Path]) -> None:
    grid = f1_grid(read([finished("multilabel")]))
    assert grid is not None
    assert grid.headers == ("Method", "cat", "dog")


@pytest.mark.parametrize(("task", "words"), [("regression", "personal rmse "), ("multilabel", "personal micro_f1 ")])
def test_progress_shows_the_primary_metric(finished: Callable[[str], Path], task: str, words: str) -> None:
    rows = [json.loads(line) for line in (finished(task) / "metrics.jsonl").read_text().splitlines()]
    assert numbers(rows[-1]).startswith(words)
    assert " server " in numbers(rows[-1])


@pytest.mark.parametrize(
    ("value", "text"), [(54.321, "54.32"), (0.5, "0.500"), (1234.5, "1234"), (0.00012, "0.00012"), (0, "0.000")]
)
def test_progress_shows_numbers_of_any_size(value: float, text: str) -> None:
    row = {
        "round": 1,
        "personal_rmse": value,
        "personal_mae": 7.0,
        "general_rmse": None,
        "server_rmse": None,
        "server.x": 1.0,
    }
    assert numbers(row) == f"personal rmse {text}"


@pytest.mark.parametrize(
    ("task", "target", "message"),
    [
        ("multilabel", 80, r"eval\.target=80: must be above 0 and at most 1, because micro_f1 is a fraction; for 80 %, set 0\.8"),
        ("classification", 0, r"eval\.target=0: must be above 0 .* because accuracy is a fraction; set a fraction, such as 0\.8"),
        ("classification", -3, r"eval\.target=-3: must be above 0"),
        ("regression", float("inf"), r"eval\.target=inf: must be a finite number"),
    ],
)  # fmt: skip
def test_a_target_is_checked_against_the_metric_before_anything_is_written(
    tmp_path: Path, task: str, target: float, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        experiment(task, tmp_path / "run", eval={"target": target})
    assert not (tmp_path / "run").exists()


def test_the_target_of_a_regression_is_in_its_own_units(tmp_path: Path) -> None:
    summary = experiment("regression", tmp_path / "run", eval={"target": 1000.0}).run()
    assert (summary["target"], summary["rounds_to_target"]) == (1000.0, 1)
    assert cells(summary_grid(read([tmp_path / "run"])), "fedavg")["rounds to target"].text == "1"


def test_newcomers_keep_their_names_whatever_the_metric(tmp_path: Path) -> None:
    found = experiment("regression", tmp_path / "run", join={"clients": 1, "turns": 1}).run()["new_clients"]
    assert {"received", "received_uniform", "joined", "joined_worst10", "joined_mae"} <= found.keys()
    row = cells(summary_grid(read([tmp_path / "run"])), "fedavg")
    assert row["newcomers joined"].value == found["joined"]


def test_the_command_reads_targets_in_units_of_the_metric(
    finished: Callable[[str], Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def report(*words: str) -> tuple[int, str, str]:
        code = main(["report", *words, f"out={tmp_path / str(len(list(tmp_path.iterdir())))}.html"])
        return code, *capsys.readouterr()

    regression, multilabel = str(finished("regression")), str(finished("multilabel"))
    assert "Time to a personal rmse of 120.5" in report(regression, "network=lan", "target=120.5")[1]
    assert "Time to 90.0 % personal micro_f1" in report(multilabel, "network=lan", "target=90")[1]
    for words, message in (
        ((regression, "network=lan", "target=fast"), "target=fast: must be a number (a value of rmse)"),
        ((regression, "network=lan", "target=nan"), "target=nan: must be a number (a value of rmse)"),
        ((multilabel, "network=lan", "target=900"), "target=900: must be a number above 0 and at most 100"),
        ((regression, multilabel), "is measured by rmse (lower is better), but"),
        ((regression, multilabel, "--quiet"), "report runs with different metrics separately"),
    ):
        code, _, error = report(*words)
        assert (code, error.count("\n")) == (2, 1), error
        assert message in error


def test_a_comparison_with_two_metrics_is_refused_and_not_a_hint(
    finished: Callable[[str], Path], tmp_path: Path
) -> None:
    mixed = Finished([finished("regression"), finished("multilabel")])
    with pytest.raises(UsageError, match="report runs with different metrics separately"):
        conclude([mixed], tmp_path, as_json=False, quiet=True)


@pytest.mark.parametrize(
    ("task", "headers"), [("regression", ["groups", "largest group"]), ("classification", ["classes", "largest class"])]
)
def test_the_partition_is_shown_by_groups_of_targets(task: str, headers: list[str]) -> None:
    table = _table(make_federation(make_settings(SETTINGS), rows_of(task)))
    assert [column.header for column in table.columns][-2:] == headers
    assert " %  " in next(iter(table.columns[-1].cells))  # the largest group of client 0, with its name
