"""Figures: their contents and edge cases."""

from __future__ import annotations

import dataclasses
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from synthetic_runs import Scene

from fedloom.errors import DataError
from fedloom.report import RunRecord, plots, read
from fedloom.report.groups import group
from fedloom.report.style import SERIES, strokes


def texts(figure: Figure) -> str:
    """Draw the figure and return its text elements."""
    buffer = io.StringIO()
    with plots.drawing():
        figure.savefig(buffer, format="svg")
    return buffer.getvalue()


def all_figures(records: list[RunRecord]) -> list[Figure]:
    return [
        plots.metric_over_rounds(records),
        plots.metric_over_rounds(records, "general"),
        plots.metric_over_bytes(records),
        plots.client_spread(records),
        plots.bytes_by_kind(records),
        plots.log_over_rounds(records, "train.loss"),
    ]


def test_lines_are_means_over_seeds_in_percent(comparison: Path) -> None:
    records = read([comparison])
    (axes,) = plots.metric_over_rounds(records).axes
    lines = {line.get_color(): line for line in axes.get_lines()}
    fedrir = lines[strokes(group(records))["fedrir"].colour]
    assert np.asarray(fedrir.get_ydata())[-1] == pytest.approx(87)
    assert np.asarray(fedrir.get_xdata())[-1] == 30
    band = axes.collections[-1].get_paths()[0].vertices
    assert {86.0, 88.0} <= set(np.round(np.asarray(band)[:, 1], 6))


def test_a_method_keeps_its_colour(comparison: Path) -> None:
    records = read([comparison])
    colour = strokes(group(records))["fedrir"].colour
    lines = plots.metric_over_rounds(records).axes[0].get_lines()
    assert colour in {line.get_color() for line in lines}
    (axes, _) = plots.bytes_by_kind(records).axes
    assert to_hex(axes.patches[-1].get_facecolor()) == colour
    logged = plots.log_over_rounds(records, "train.mi").axes[0].get_lines()
    assert [line.get_color() for line in logged] == [colour]


def test_twelve_methods_are_distinguishable_and_named(tmp_path: Path) -> None:
    for number in range(12):
        Scene(method=f"method{number}", rounds=4, clients=4).write(tmp_path / f"m{number}")
    records = read([tmp_path])
    assert len(set(strokes(group(records)).values())) == 12
    drawn = texts(plots.metric_over_rounds(records))
    assert all(f">method{number}<" in drawn for number in range(12))


def test_traffic_is_up_and_down_together(comparison: Path) -> None:
    (axes,) = plots.metric_over_bytes(read([comparison / "fedavg-seed0"])).axes
    assert np.asarray(axes.get_lines()[0].get_xdata())[-1] == 30 * (2_400_000 + 2_400_000)
    assert "MB" in texts(axes.get_figure(root=True))


def test_logs_are_what_the_method_reports_itself(comparison: Path) -> None:
    assert plots.log_names(read([comparison])) == ["train.loss", "train.mi", "train.kl"]


@pytest.mark.parametrize("scene", [Scene(clients=1), Scene(rounds=1), Scene(classes=1), Scene(clients=300, rounds=6)])
def test_small_and_large_runs_have_figures(tmp_path: Path, scene: Scene) -> None:
    records = read([scene.write(tmp_path / "run")])
    for figure in all_figures(records):
        assert ">not measured<" not in texts(figure)


def test_missing_measurements_are_stated(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("")
    lines = ['{"round": 1, "personal_accuracy": null, "train.loss": NaN}', '{"round": 2, "train.loss": Infinity}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    records = read([tmp_path])
    for figure in all_figures(records):
        assert ">not measured<" in texts(figure)
    assert plots.log_names(records) == []


def test_null_client_accuracies_are_left_out(tmp_path: Path) -> None:
    (record,) = read([Scene(rounds=6).write(tmp_path / "run")])
    assert record.clients is not None
    empty = dataclasses.replace(record, clients=record.clients.assign(personal_accuracy=None))
    assert ">not measured<" in texts(plots.client_spread([empty]))


def test_a_dollar_is_a_dollar(tmp_path: Path) -> None:
    records = read([Scene(method="$a_1$", rounds=2).write(tmp_path / "run")])
    assert ">$a_1$<" in texts(plots.metric_over_rounds(records))


@pytest.mark.parametrize("shape", [(1, 1), (10, 3), (120, 10), (500, 10), (5, 100)])
def test_partitions_of_all_sizes(shape: tuple[int, int]) -> None:
    figure = plots.partition_figure(np.arange(shape[0] * shape[1]).reshape(shape))
    assert figure.axes[0].get_title(loc="left") == "Training examples"
    assert figure.get_size_inches()[0] <= 10.8


def test_bubble_areas_are_counts() -> None:
    figure = plots.partition_figure([[100, 25], [0, 0]], ["cat", "dog"])
    sizes = {tuple(line.get_xydata()[0]): line.get_markersize() for line in figure.axes[1].get_lines()}
    assert set(sizes) == {(0, 0), (0, 1)}, "nothing is drawn for zero"
    assert sizes[0, 0] / sizes[0, 1] == pytest.approx(2)
    assert ">cat<" in texts(figure)


@pytest.mark.parametrize(
    ("counts", "classes", "message"),
    [
        ([], None, "must have shape"),
        ([[1, 2], [3]], None, "must be numbers of shape"),
        ([[1, -2]], None, "not negative"),
        ([[1, 2]], ["a"], "classes has 1 names, but class_counts has 2 classes"),
    ],
)
def test_counts_are_checked(counts: list[list[int]], classes: list[str] | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        plots.partition_figure(counts, classes)


def test_colours_are_distinct_and_pyplot_stays_out() -> None:
    assert len(set(SERIES)) == len(SERIES)
    code = "import sys, fedloom.report.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("most", [400.0, 3e6])
def test_numbers_on_a_logarithmic_axis_are_plain_text(tmp_path: Path, most: float) -> None:
    """Figures show text literally, so TeX would be printed as it is."""
    (record,) = read([Scene(rounds=6).write(tmp_path / "run")])
    assert record.metrics is not None
    rising = np.geomspace(1, most, len(record.metrics))
    steep = dataclasses.replace(record, metrics=record.metrics.assign(**{"train.loss": rising}))
    figure = plots.log_over_rounds([steep], "train.loss")
    assert figure.axes[0].get_yscale() == "log"
    assert "mathdefault" not in texts(figure)


def test_traffic_of_another_size_is_drawn_logarithmically_in_plain_text(tmp_path: Path) -> None:
    scenes = [Scene(), Scene(method="local", uplink_per_round=200_000_000)]
    figure = plots.metric_over_bytes(read([scene.write(tmp_path / scene.method) for scene in scenes]))
    assert figure.axes[0].get_xscale() == "log"
    assert "mathdefault" not in texts(figure)
