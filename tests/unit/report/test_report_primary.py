"""Metrics other than accuracy: one in its own units for which lower is better, and one in percent with values per label."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from synthetic_runs import Scene
from test_report_page import written
from test_report_plots import texts
from test_report_tables import cells

from fedloom.errors import RunFolderError, UsageError
from fedloom.report import Chapter, Waiting, plots, read, shared_primary, write_chapters, write_page
from fedloom.report.groups import group, headline, other_metrics
from fedloom.report.link_speeds import Network
from fedloom.report.pairs import difference
from fedloom.report.partition_plots import partition_figure
from fedloom.report.primary import ACCURACY, Primary
from fedloom.report.tables import Cell, f1_grid, paired_grid, recall_grid, summary_grid
from fedloom.report.units import significant
from fedloom.report.waiting import common_target, round_of_target, waiting_grid

RMSE = {"name": "rmse", "better": "lower", "percent": False, "unit": "mg/dl"}
F1 = {"name": "micro_f1", "better": "higher", "percent": True, "unit": ""}
LAN = Network("lan", up=1000, down=1000, latency=1)


@pytest.fixture(scope="module")
def sugar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a comparison measured by rmse. FedRIR is better than FedAvg by 10 to 10.2, and its second run is unfinished."""
    folder = tmp_path_factory.mktemp("sugar")
    for seed in range(3):
        Scene(seed=seed, final=60 + seed, primary=RMSE).write(folder / f"fedavg{seed}")
        Scene(method="fedrir", seed=seed, final=50 + 0.9 * seed, primary=RMSE).write(folder / f"fedrir{seed}")
    Scene(method="fedper", final=70, primary=RMSE, finished=False).write(folder / "fedper")
    return folder


def written_rounds(folder: Path, rows: list[dict[str, float | None]], **files: object) -> Path:
    """Write an unfinished run whose rounds have these values."""
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text("")
    lines = [json.dumps({"round": number} | row) + "\n" for number, row in enumerate(rows, start=1)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


# where the metric is named


def test_a_folder_that_names_no_metric_is_measured_by_accuracy(tmp_path: Path) -> None:
    (record,) = read([Scene().write(tmp_path / "old")])
    assert record.primary == ACCURACY == Primary("accuracy", "higher", True, "")


def test_an_unfinished_run_has_its_metric_from_the_partition(sugar: Path) -> None:
    (record,) = read([sugar / "fedper"])
    assert record.summary is None
    assert record.primary == Primary(**RMSE)


@pytest.mark.parametrize(
    "wrong", [3, {}, RMSE | {"better": "smaller"}, RMSE | {"name": "a b"}, RMSE | {"percent": 1}, RMSE | {"unit": "\x1b[31m"}]
)  # fmt: skip
def test_a_malformed_metric_is_refused(tmp_path: Path, wrong: object) -> None:
    folder = written_rounds(tmp_path / "run", [], partition={"primary": wrong})
    with pytest.raises(RunFolderError, match="'primary' must give a metric's name, better"):
        read([folder])


def test_runs_of_different_metrics_are_not_in_one_table(tmp_path: Path, sugar: Path) -> None:
    Scene(rounds=2).write(tmp_path / "digits")
    mixed = [*read([sugar / "fedavg0"]), *read([tmp_path / "digits"])]
    message = r"fedavg0 is measured by rmse \(mg/dl, lower is better\), but \S*digits is measured by accuracy \(%\)"
    figures = (plots.metric_over_rounds, plots.metric_over_bytes, plots.client_spread)
    for refuses in (shared_primary, summary_grid, paired_grid, common_target, *figures):
        with pytest.raises(UsageError, match=message):
            refuses(mixed)
    with pytest.raises(UsageError, match=message):
        write_page(mixed, tmp_path / "page.html")
    other_unit = [replace(mixed[0], primary=mixed[0].primary._replace(unit="mmol/l")), mixed[0]]
    with pytest.raises(UsageError, match="mmol/l"):
        summary_grid(other_unit)


def test_chapters_of_one_page_may_have_different_metrics(tmp_path: Path, sugar: Path) -> None:
    Scene(rounds=2).write(tmp_path / "digits")
    chapters = [Chapter(read([sugar / "fedavg0"]), "Sugar"), Chapter(read([tmp_path / "digits"]), "Digits")]
    write_chapters(chapters, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "Results, rmse (mg/dl, lower is better)" in page
    assert "Results, accuracy in percent" in page


# numbers and words


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0.000"), (54.3, "54.30"), (9.99996, "10.00"), (-0.0123456, "-0.01235"), (1234.6, "1235"), (123456.7, "123457"),
     (0.00001234, "1.234e-05"), (5e12, "5.000e+12")],
)  # fmt: skip
def test_numbers_have_four_significant_digits(value: float, text: str) -> None:
    assert significant(value) == text


def test_a_spread_has_the_decimal_places_of_its_mean() -> None:
    assert Primary(**RMSE).spread(0.12345, 54.3) == "0.12"
    assert Primary(**F1).spread(0.12345, 0.543, 2) == "12.35"


def test_labels_state_unit_and_direction() -> None:
    assert ACCURACY.label == "accuracy (%)"
    assert Primary(**F1).label == "micro_f1 (%)"
    assert Primary(**RMSE).label == "rmse (mg/dl, lower is better)"
    assert Primary("rmse", "lower", False).label == "rmse (lower is better)"
    assert Primary("error", "lower", True).heading == "error (%, lower is better)"
    assert (ACCURACY.heading, Primary(**F1).heading) == ("accuracy in percent", "micro_f1 in percent")
    assert ACCURACY.difference_heading == "percentage points"
    assert Primary(**F1).difference_heading == "percentage points of micro_f1"
    assert Primary(**RMSE).difference_heading == "rmse (mg/dl)"


# directions


def test_the_table_of_a_metric_of_which_lower_is_better(sugar: Path) -> None:
    grid = summary_grid(read([sugar]))
    assert grid.title == "Results, rmse (mg/dl, lower is better)"
    good, bad = cells(grid, "fedrir"), cells(grid, "fedavg")
    assert good["personal final"].text == "50.90 ±0.90"
    assert bad["personal worst 10%"].text == "61.14 ±1.00"
    scores = ("personal final", "personal last 10", "personal worst 10%", "general final")
    assert [good[column].bold for column in scores] == [True] * 4
    assert [bad[column].bold for column in scores] == [False] * 4
    assert "%" not in "".join(cell.text for row in grid.rows for cell in row)


def test_the_best_and_the_chosen_round_are_those_with_the_lowest_values(tmp_path: Path) -> None:
    values = [(30.0, 9.0), (10.0, 5.0), (20.0, 4.0), (25.0, 4.0)]
    rows = [{"personal_rmse": test, "valid_rmse": valid} for test, valid in values]
    (record,) = read([written_rounds(tmp_path / "run", rows, partition={"primary": RMSE})])
    statistics = ("final", "last10", "best_on_test", "chosen_on_validation")
    assert [headline(record, "personal_rmse", key) for key in statistics] == [25.0, 21.25, 10.0, 20.0]


def test_multilabel_keeps_the_direction_of_accuracy(tmp_path: Path) -> None:
    for method, final in (("fedavg", 0.5), ("fedrir", 0.6)):
        Scene(method=method, final=final, primary=F1).write(tmp_path / method)
    grid = summary_grid(read([tmp_path]))
    assert grid.title == "Results, micro_f1 in percent"
    assert cells(grid, "fedrir")["personal final"] == Cell("60.0", 0.6, True)
    pairs = paired_grid(read([tmp_path]))
    assert pairs is not None
    assert pairs.title == "Difference to fedavg in percentage points of micro_f1"
    assert cells(pairs, "fedrir")["personal final"].text == "+10.0"
    rows = [
        {"personal_micro_f1": test, "valid_micro_f1": valid} for test, valid in [(0.2, 0.9), (0.8, 0.1), (0.4, 0.3)]
    ]
    (record,) = read([written_rounds(tmp_path / "run", rows, partition={"primary": F1})])
    statistics = ("best_on_test", "chosen_on_validation")
    assert [headline(record, "personal_micro_f1", key) for key in statistics] == [0.8, 0.2]
    assert common_target([record]) == 0.8


def test_a_positive_difference_is_better_in_the_units_of_the_metric(sugar: Path) -> None:
    records = read([sugar])
    avg, _, rir = group(records)
    found = difference(rir, avg, "personal_rmse")
    assert found is not None
    assert found.mean == pytest.approx(10.1)  # 10.0, 10.1 and 10.2, not times 100
    grid = paired_grid(records)
    assert grid is not None
    assert grid.title == "Difference to fedavg in rmse (mg/dl)"
    assert grid.caption.startswith("Positive is better: rmse is lower than that of the baseline. Pairs share")
    row = cells(grid, "fedrir")
    # sd 0.1, t(0.975, 2) = 4.303: 10.1 ± 0.1 * 4.303 / sqrt(3)
    assert row["personal final"].text == "+10.10 [+9.85, +10.35]"
    assert row["personal final"].bold
    worse = cells(paired_grid(records, "fedrir"), "fedavg")["personal final"]
    assert worse.text == "-10.10 [-10.35, -9.85]"


def test_differences_of_accuracy_have_no_word_on_the_sign(comparison: Path) -> None:
    grid = paired_grid(read([comparison]))
    assert grid is not None
    assert grid.title == "Difference to fedavg in percentage points"
    assert grid.caption.startswith("Pairs share")


@pytest.mark.parametrize(
    ("primary", "best", "target"),
    [
        (RMSE, (54.321, 12.0), 54.4),  # the worst of the best, rounded up
        (RMSE, (54.3, 12.0), 54.3),
        (RMSE, (0.0012341, 0.0001), 0.00124),
        (RMSE | {"better": "higher"}, (54.39, 60.0), 54.3),
        (RMSE | {"better": "higher"}, (-0.12345, 0.5), -0.124),
        (F1, (0.5499, 0.9), 0.54),
        (F1 | {"better": "lower"}, (0.5401, 0.1), 0.55),
        (F1 | {"better": "lower"}, (0.55, 0.1), 0.55),  # 100 times 0.55 is above 55
        (F1, (0.29, 0.9), 0.29),  # and 100 times 0.29 below 29
    ],
)
def test_every_run_reaches_the_common_target(
    tmp_path: Path, primary: dict[str, object], best: tuple[float, float], target: float
) -> None:
    name, sign = primary["name"], -1 if primary["better"] == "lower" else 1
    for place, value in enumerate(best):
        rows = [{f"personal_{name}": value - 100 * sign}, {f"personal_{name}": value}]
        written_rounds(tmp_path / str(place), rows, partition={"primary": primary})
    records = read([tmp_path])
    assert common_target(records) == target
    assert [round_of_target(record, target) for record in records] == [2, 2]


def test_the_time_to_a_target_that_is_reached_from_above(sugar: Path, tmp_path: Path) -> None:
    for name in ("fedavg0", "fedrir0"):
        (tmp_path / name).mkdir()
        for file in (sugar / name).iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
        turns = pd.read_parquet(tmp_path / name / "clients.parquet")
        turns.assign(seconds=1.0, downlink_bytes=0).to_parquet(tmp_path / name / "clients.parquet")
    records = read([tmp_path])
    grid = waiting_grid(records, Waiting([LAN]))
    assert grid.title == "Time to a personal rmse of 60 mg/dl"
    avg, rir = grid.rows
    assert avg[1].text == "30"
    assert float(rir[1].text) < 30, "fedrir starts lower, so it is there earlier"
    never = waiting_grid(records, Waiting([LAN], target=49.9)).rows
    assert all(cell.text == "–" for row in never for cell in row[1:])
    empty = replace(records[0], metrics=records[0].metrics.drop(columns="personal_rmse"))
    with pytest.raises(UsageError, match="fedavg0 has no rmse yet"):
        waiting_grid([empty], Waiting([LAN]))


def test_a_target_column_in_units_of_the_metric(tmp_path: Path) -> None:
    reached = {"target": 62.0, "rounds_to_target": 12, "bytes_to_target": 24_000_000}
    Scene(final=60, primary=RMSE, extra=reached).write(tmp_path / "a")
    never = {**reached, "rounds_to_target": None, "bytes_to_target": None}
    Scene(method="slow", final=70, primary=RMSE, extra=never).write(tmp_path / "b")
    grid = summary_grid(read([tmp_path]))
    assert [cells(grid, m)["rounds to target"].text for m in ("fedavg", "slow")] == ["12", "never"]


def test_newcomers_are_in_units_of_the_metric_and_lower_is_better(tmp_path: Path) -> None:
    for method, joined in (("fedavg", 40.0), ("fedper", 30.0)):
        newcomers = {"clients": 4, "received": 80.0, "joined": joined}
        Scene(method=method, final=60, primary=RMSE, extra={"new_clients": newcomers}).write(tmp_path / method)
    grid = summary_grid(read([tmp_path]))
    row = cells(grid, "fedper")
    assert (row["newcomers received"].text, row["newcomers joined"].text) == ("80.00", "30.00")
    assert row["newcomers joined"].bold
    assert not cells(grid, "fedavg")["newcomers joined"].bold


# labels


def test_f1_by_label_is_a_shaded_table_with_the_names_of_the_labels(tmp_path: Path) -> None:
    objective = {"task": "multilabel", "names": ["cat", "dog"]}
    for seed, f1 in enumerate([[0.5, None], [0.7, 1.0]]):
        extra = {"general_f1": f1, "objective": objective}
        Scene(seed=seed, classes=3, primary=F1, extra=extra).write(
            tmp_path / f"a{seed}"
        )  # three groups: a third without label
    records = read([tmp_path])
    grid = f1_grid(records)
    assert grid is not None
    assert (grid.title, grid.heat) == ("F1 by label, in percent", True)
    assert grid.headers == ("Method", "cat", "dog")
    assert grid.rows == ((Cell("fedavg"), Cell("60", pytest.approx(0.6)), Cell("100", 1.0)),)
    assert recall_grid(records) is None
    assert "F1 by label, in percent" in written(tmp_path, tmp_path / "page.html").words


def test_classification_has_no_f1_and_regression_has_neither(tmp_path: Path, sugar: Path) -> None:
    Scene(classes=2, extra={"general_recall": [0.5, 0.5]}).write(tmp_path / "a")
    assert f1_grid(read([tmp_path])) is None
    assert recall_grid(read([sugar])) is f1_grid(read([sugar])) is None


# figures and the page


def test_curves_are_in_units_of_the_metric(sugar: Path) -> None:
    figure = plots.metric_over_rounds(read([sugar / "fedavg0"]))
    (axes,) = figure.axes
    assert np.asarray(axes.get_lines()[0].get_ydata())[-1] == pytest.approx(60)
    assert axes.get_title(loc="left") == "Personal rmse over rounds"
    assert axes.get_ylabel() == "rmse (mg/dl, lower is better)"
    assert (
        plots.metric_over_bytes(read([sugar / "fedavg0"]), "server").axes[0].get_title(loc="left")
        == "Server rmse over traffic"
    )


def test_the_spread_over_clients_marks_the_largest_tenth(sugar: Path) -> None:
    (axes,) = plots.client_spread(read([sugar / "fedavg0"])).axes
    assert axes.get_xlabel() == "personal rmse of a client (mg/dl, lower is better)"
    (diamond,) = [line for line in axes.get_lines() if line.get_marker() == "D"]
    assert np.asarray(diamond.get_xdata()).tolist() == pytest.approx([60.14])
    dots = np.asarray(axes.get_lines()[0].get_xdata())
    assert 59.8 < dots.min() < dots.max() < 60.2, "not in percent, and not cut at 1"


@pytest.mark.parametrize(("names", "label"), [(["below 25", "25 or more"], "group"), (["examples"], "")])
def test_groups_of_examples_are_not_called_classes(names: list[str], label: str) -> None:
    figure = partition_figure(np.ones((3, len(names))), names, "group")
    assert figure.axes[-1].get_ylabel() == label
    assert names[0] in texts(figure)


def test_other_metrics_are_details_and_not_logs(tmp_path: Path) -> None:
    folder = Scene(final=60, primary=RMSE, extra={"general_r2": 0.25}).write(tmp_path / "run")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    more = {"personal_mae": 41.5, "valid_mae": 7.0, "general_r2": 0.24}
    lines = [json.dumps(row | more) + "\n" for row in rows]
    (folder / "metrics.jsonl").write_text("".join(lines))
    (record,) = read([folder])
    assert other_metrics(record) == {"personal_mae": 41.5, "general_r2": 0.25}  # of the summary where it has them
    assert plots.log_names([record]) == ["train.loss"]
    words = written(folder, tmp_path / "page.html").words
    assert "Other metrics personal mae 41.50 general r2 0.2500" in words


def test_the_page_of_a_metric_of_which_lower_is_better(sugar: Path, tmp_path: Path) -> None:
    page = written(sugar, tmp_path / "page.html")
    for expected in (
        "Results, rmse (mg/dl, lower is better)",
        "50.90 ±0.90",
        "Difference to fedavg in rmse (mg/dl)",
        "Metric: rmse",
        "Personal rmse over rounds",
        "rmse (mg/dl, lower is better) final",
    ):
        assert expected in page.words
    assert "accuracy" not in page.words
    assert ">class<" not in page.source
