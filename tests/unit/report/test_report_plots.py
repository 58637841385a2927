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
from fedloom.report.partition_plots import partition_figure
from fedloom.report.style import MUTED, SERIES, strokes


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
    figure = partition_figure(np.arange(shape[0] * shape[1]).reshape(shape))
    assert ">Training examples<" in texts(figure)
    assert figure.get_size_inches()[0] <= 10.8


def test_up_to_twenty_clients_are_a_heat_map_with_numbers() -> None:
    figure = partition_figure([[100, 25], [0, 0]], ["cat", "dog"])
    (axes,) = figure.axes
    numbers = {(round(text.get_position()[0]), text.get_position()[1]): text.get_text() for text in axes.texts}
    assert numbers == {(0, 0): "100", (0, 1): "25", (0, 2.3): "125", (1, 2.3): "0"}, "nothing is written for zero"
    full, half = (patch.get_facecolor()[3] for patch in axes.patches)
    assert full == pytest.approx(0.6)
    assert half == pytest.approx(0.33), "the shade is the square root of the share"
    assert all(f">{word}<" in texts(figure) for word in ("cat", "dog", "all"))


def test_bubble_areas_are_counts_and_have_a_legend() -> None:
    counts = np.zeros((21, 2))
    counts[0] = 100, 25
    figure = partition_figure(counts, ["cat", "dog"])
    sizes = {tuple(line.get_xydata()[0]): line.get_markersize() for line in figure.axes[1].get_lines()}
    assert set(sizes) == {(0, 0), (0, 1)}, "nothing is drawn for zero"
    assert sizes[0, 0] / sizes[0, 1] == pytest.approx(2)
    (legend,) = figure.legends
    shown = {
        text.get_text(): mark.get_markersize()
        for text, mark in zip(legend.get_texts(), legend.get_lines(), strict=True)
    }
    assert shown["100"] == sizes[0, 0]
    assert shown["25"] == sizes[0, 1]
    assert ">cat<" in texts(figure)


def test_partitions_can_share_a_scale() -> None:
    figure = partition_figure([[25]], largest=100)
    assert figure.axes[0].patches[0].get_facecolor()[3] == pytest.approx(0.33)


def test_one_scored_round_is_a_bar(tmp_path: Path) -> None:
    for method, seed, final in (("fedavg", 0, 0.7), ("fedavg", 1, 0.8), ("fedrir", 0, 0.9)):
        Scene(method=method, seed=seed, final=final, rounds=1).write(tmp_path / f"{method}{seed}")
    figure = plots.metric_over_rounds(read([tmp_path]))
    (axes,) = figure.axes
    assert axes.get_title(loc="left") == "Personal accuracy, round 1"
    assert [patch.get_width() for patch in axes.patches] == pytest.approx([75, 90])
    assert axes.get_xlim()[0] == 0
    assert len(axes.get_lines()) == 0
    assert [text.get_text().strip() for text in axes.texts] == ["75.0", "90.0"]
    (low, high), _ = (strokes.get_segments()[0] for strokes in axes.collections)
    assert (low[0], high[0]) == pytest.approx((70, 80)), "the stroke is the range of the seeds"


def test_a_single_method_has_one_figure_of_all_models(tmp_path: Path) -> None:
    records = read([Scene(rounds=6).write(tmp_path / "run")])
    drawn = texts(plots.views_over_rounds(records))
    assert all(f">{view}<" in drawn for view in ("personal", "general", "server"))
    assert ">Accuracy over rounds<" in drawn


def test_lines_on_each_other_alternate_in_colour(tmp_path: Path) -> None:
    for method, final in (("fedavg", 0.7), ("fedprox", 0.7), ("fedrir", 0.9)):
        Scene(method=method, final=final).write(tmp_path / method)
    figure = plots.metric_over_rounds(read([tmp_path]))
    dashes = {line.get_color(): line._unscaled_dash_pattern for line in figure.axes[0].get_lines()}  # type: ignore[attr-defined]
    one, other, alone = dashes.values()
    assert one[1] == other[1] == (3, 3)
    assert (one[0] - other[0]) % 6 == 3, "one begins where the other has a gap"
    assert alone[1] is None
    assert "alternate" in str(figure.get_label())
    assert not plots.metric_over_rounds(read([tmp_path / "fedrir"])).get_label()


@pytest.mark.parametrize(("values", "least"), [((0.5, 0.503), 10), ((0.999, 1.0), 10), ((0.0, 0.0), 10)])
def test_the_axis_does_not_turn_noise_into_success(tmp_path: Path, values: tuple[float, float], least: float) -> None:
    (record,) = read([Scene(rounds=2).write(tmp_path / "run")])
    flat = dataclasses.replace(record, metrics=record.metrics.assign(personal_accuracy=list(values)))
    low, high = plots.metric_over_rounds([flat]).axes[0].get_ylim()
    assert high - low == pytest.approx(least)
    assert low >= -1
    assert high <= 101
    assert low < 100 * values[0] <= 100 * values[1] < high


def test_the_axis_of_a_log_shows_a_tenth_of_its_value_at_least(tmp_path: Path) -> None:
    (record,) = read([Scene(rounds=2).write(tmp_path / "run")])
    for values, span in (((2.0, 2.001), 0.2), ((0.0, 0.0), 1.0), ((-4.0, -4.0), 0.4)):
        flat = dataclasses.replace(record, metrics=record.metrics.assign(**{"train.loss": list(values)}))
        low, high = plots.log_over_rounds([flat], "train.loss").axes[0].get_ylim()
        assert high - low == pytest.approx(span, rel=1e-3)


def test_leaders_are_dotted_and_grey_and_names_have_a_sample_of_the_line(comparison: Path) -> None:
    records = read([comparison])
    figure = plots.metric_over_rounds(records)
    leaders = [line for line in figure.artists if line.get_color() == MUTED]
    samples = [line for line in figure.artists if line.get_color() != MUTED]
    assert len(leaders) == len(samples) == 4
    assert {tuple(line._unscaled_dash_pattern[1]) for line in leaders} == {(1, 2)}  # type: ignore[attr-defined]
    assert {line.get_color() for line in samples} == {mark.colour for mark in strokes(group(records)).values()}
    assert MUTED not in {line.get_color() for line in figure.axes[0].get_lines()}


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
        partition_figure(counts, classes)


def test_colours_are_distinct_and_pyplot_stays_out() -> None:
    assert len(set(SERIES)) == len(SERIES)
    code = "import sys, fedloom.report.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("most", [400.0, 3e6])
def test_numbers_on_a_logarithmic_axis_are_plain_text(tmp_path: Path, most: float) -> None:
    """Figures show text literally, so TeX would be printed unchanged."""
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
