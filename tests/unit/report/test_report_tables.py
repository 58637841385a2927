"""Tables: values, units, spread over seeds, and paired differences."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table
from synthetic_runs import Scene

from fedloom.errors import UsageError
from fedloom.report import paired_table, read, summary_table
from fedloom.report.groups import group, headline
from fedloom.report.tables import EMPTY, Cell, Grid, paired_grid, recall_grid, summary_grid
from fedloom.report.units import duration, size


def cells(grid: Grid | None, row: str) -> dict[str, Cell]:
    assert grid is not None
    headers = [header.replace("\n", " ").strip() for header in grid.headers]
    return dict(next(zip(headers, found, strict=True) for found in grid.rows if found[0].text == row))


def printed(table: Table | None, width: int = 80) -> str:
    assert table is not None
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_seeds_of_a_method_are_one_row_with_mean_and_spread(comparison: Path) -> None:
    grid = summary_grid(read([comparison]))
    assert [row[0].text for row in grid.rows] == ["fedavg", "fedper", "fedprox", "fedrir"]
    row = cells(grid, "fedrir")
    assert row["personal final"].text == "87.0 ±1.4"  # 0.86 and 0.88
    assert row["personal worst 10%"].text == "73.0 ±1.4"
    assert row["general final"].text == "52.2 ±0.8"
    assert (row["uplink"].text, row["downlink"].text, row["time"].text) == ("57 MB", "72 MB", "1m00s")
    assert row["server final"].text == "–"


def test_the_best_of_each_column_is_bold_and_a_tie_of_all_is_not(comparison: Path) -> None:
    grid = summary_grid(read([comparison]))
    bold = {row[0].text: [cell.text for cell in row if cell.bold] for row in grid.rows}
    assert bold["fedavg"] == []
    assert bold["fedper"] == ["57 MB"]  # lower is better
    assert bold["fedprox"] == ["51.8 ±1.0"]
    assert bold["fedrir"] == ["87.0 ±1.4", "86.5 ±1.4", "73.0 ±1.4", "52.2 ±0.8", "57 MB"]


def test_columns_that_nothing_fills_are_dropped(tmp_path: Path) -> None:
    Scene(server=False).write(tmp_path / "run")
    headers = summary_grid(read([tmp_path])).headers
    assert "server\nfinal" not in headers
    assert "personal\nchosen" not in headers
    assert "personal\ntrained" not in headers, "all clients have trained: the column would repeat the first"
    assert "personal\nfinal" in headers


def test_an_unfinished_run_is_named_and_counts_only_alone(comparison: Path) -> None:
    grid = summary_grid(read([comparison]))
    assert cells(grid, "fedper")["personal final"].text == "82.0"
    assert "fedper-seed1 (round 15 of 30)" in grid.caption
    alone = summary_grid(read([comparison / "fedper-seed1", comparison / "fedavg-seed0"]))
    row = cells(alone, "fedper (unfinished)")
    assert row["personal final"].text == "76.7"
    assert not any(cell.bold for cell in row.values())


def test_settings_that_differ_keep_runs_apart(tmp_path: Path) -> None:
    for lr in (0.1, 0.01):
        Scene(settings={"lr": lr}).write(tmp_path / f"lr{lr}")
    assert sorted(member.label for member in group(read([tmp_path]))) == ["fedavg lr=0.01", "fedavg lr=0.1"]


def test_headlines_come_from_the_rounds_when_there_is_no_summary(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.toml").write_text("")
    values = [(0.1, 0.9), (0.7, 0.2), (0.4, 0.3)]
    lines = [
        f'{{"round": {n}, "personal_accuracy": {a}, "valid_accuracy": {v}}}\n' for n, (a, v) in enumerate(values, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(lines))
    (record,) = read([folder])
    statistics = ("final", "last10", "best_on_test", "chosen_on_validation", "worst10")
    assert [headline(record, "personal_accuracy", key) for key in statistics] == [
        0.4,
        pytest.approx(0.4),
        0.7,
        0.1,
        None,
    ]
    assert headline(record, "server_accuracy") is None


def three_seeds(folder: Path) -> Path:
    for seed, difference in enumerate((0.01, 0.02, 0.03)):
        Scene(method="fedavg", seed=seed, final=0.5 + 0.1 * seed).write(folder / f"fedavg{seed}")
        Scene(method="aaa", seed=seed, final=0.5 + 0.1 * seed + difference).write(folder / f"aaa{seed}")
    return folder


def test_paired_differences_cancel_what_the_seeds_share(tmp_path: Path) -> None:
    grid = paired_grid(read([three_seeds(tmp_path)]), digits=2)
    row = cells(grid, "aaa")
    # mean 2, sd 1, t(0.975, 2) = 4.303: 2 ± 4.303 / sqrt(3)
    assert row["personal final"].text == "+2.00 [-0.48, +4.48]"
    assert row["seeds"].text == "3"
    assert not row["personal final"].bold
    assert row["general final"].text == "+1.20 [-0.29, +2.69]"


def test_an_interval_without_zero_is_bold_and_needs_three_seeds(tmp_path: Path, comparison: Path) -> None:
    for seed in range(3):
        Scene(method="fedavg", seed=seed, final=0.5).write(tmp_path / f"fedavg{seed}")
        Scene(method="fedrir", seed=seed, final=0.6 + 0.001 * seed).write(tmp_path / f"fedrir{seed}")
    folders = [tmp_path / f"{method}{seed}" for method in ("fedavg", "fedrir") for seed in range(3)]
    assert cells(paired_grid(read(folders)), "fedrir")["personal final"].bold
    two = paired_grid(read([comparison]))
    assert cells(two, "fedrir")["personal final"].text == "+16.0"
    assert cells(two, "fedper")["seeds"].text == "1", "the unfinished run has no part in it"


def test_the_baseline_can_be_chosen(tmp_path: Path) -> None:
    records = read([three_seeds(tmp_path)])
    assert cells(paired_grid(records, "aaa"), "fedavg")["personal final"].text == "-2.0 [-4.5, +0.5]"
    with pytest.raises(UsageError, match=r"baseline=fedavgg: not among the runs \(did you mean 'fedavg'\?\)"):
        paired_table(records, "fedavgg")


def test_runs_of_other_partitions_or_seeds_are_not_paired(tmp_path: Path) -> None:
    Scene(method="fedavg", seed=0).write(tmp_path / "a")
    Scene(method="fedrir", seed=1).write(tmp_path / "b")
    Scene(method="fedper", seed=0, clients=19).write(tmp_path / "c")
    Scene(method="local", seed=0, data="other").write(tmp_path / "d")  # of the same size
    assert paired_table(read([tmp_path])) is None
    assert paired_table(read([tmp_path / "a"])) is None


@pytest.mark.parametrize("width", [80, 100, 120])
def test_tables_fit_the_terminal_whole(comparison: Path, width: int) -> None:
    records = read([comparison])
    text = printed(summary_table(records), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert "87.0 ±1.4" in text
    assert "+16.0" in printed(paired_table(records), width)


def test_names_are_not_markup_or_terminal_codes(tmp_path: Path) -> None:
    Scene(method="[red]a\x1b[31mb").write(tmp_path / "run")
    text = printed(summary_table(read([tmp_path])))
    assert "[red]a\N{REPLACEMENT CHARACTER}[31mb" in text
    assert "\x1b" not in text


def test_units() -> None:
    assert [size(n) for n in (0, 999, 1000, 999_600, 12_345_678, 5e15)] == [
        "0 B",
        "999 B",
        "1 kB",
        "1 MB",
        "12.3 MB",
        "5000 TB",
    ]
    assert [duration(s) for s in (0.04, 42.4, 59.7, 190, 3599.9, 7500)] == [
        "0.0s",
        "42s",
        "1m00s",
        "3m10s",
        "1h00m",
        "2h05m",
    ]


def test_recall_is_a_shaded_table_of_means_over_seeds(tmp_path: Path) -> None:
    for seed, recall in enumerate([[0.5, None, 1.0], [0.7, None, 0.0]]):
        Scene(seed=seed, classes=3, extra={"general_recall": recall}).write(tmp_path / f"a{seed}")
    Scene(method="fedrir", classes=3).write(tmp_path / "b")
    grid = recall_grid(read([tmp_path]))
    assert grid is not None
    assert grid.heat
    assert grid.headers == ("Method", "0", "1", "2")
    assert grid.rows == ((Cell("fedavg"), Cell("60", pytest.approx(0.6)), EMPTY, Cell("50", 0.5)),)


def test_no_table_of_recall_without_recall_or_with_too_many_classes(tmp_path: Path) -> None:
    Scene(method="none").write(tmp_path / "none")
    assert recall_grid(read([tmp_path])) is None
    Scene(classes=21, extra={"general_recall": [0.5] * 21}).write(tmp_path / "many")
    assert recall_grid(read([tmp_path])) is None


def test_no_table_of_recall_where_classes_differ(tmp_path: Path) -> None:
    for name, classes in (("a", ["cat", "dog"]), ("b", ["0", "1"])):
        folder = Scene(method=name, classes=2, extra={"general_recall": [0.5, 0.5]}).write(tmp_path / name)
        partition = json.loads((folder / "partition.json").read_text())
        (folder / "partition.json").write_text(json.dumps({**partition, "classes": classes}))
        grid = recall_grid(read([folder]))
        assert grid is not None
        assert grid.headers[1:] == tuple(classes)
    assert recall_grid(read([tmp_path])) is None


def test_local_updates_that_did_not_count_are_reported(tmp_path: Path) -> None:
    Scene(extra={"rejected": 1200, "lost": 0, "late": 0, "skipped": 3}).write(tmp_path / "a")
    Scene(method="fedper", extra={"rejected": 0, "lost": 0, "late": 0, "skipped": 0}).write(tmp_path / "b")
    assert (
        "Local updates that did not count: fedavg 1,200 rejected, 3 rounds skipped."
        in summary_grid(read([tmp_path])).caption
    )
    assert "did not count" not in summary_grid(read([tmp_path / "b"])).caption


def test_a_target_that_was_never_reached_is_worse_than_any_that_was(tmp_path: Path) -> None:
    reached = {"target": 0.8, "rounds_to_target": 12, "bytes_to_target": 24_000_000}
    Scene(extra=reached).write(tmp_path / "a")
    Scene(method="slow", extra={**reached, "rounds_to_target": None, "bytes_to_target": None}).write(tmp_path / "b")
    Scene(method="none").write(tmp_path / "c")
    grid = summary_grid(read([tmp_path]))
    assert [cells(grid, m)["rounds to target"].text for m in ("fedavg", "slow", "none")] == ["12", "never", "–"]
    assert [cells(grid, m)["bytes to target"].text for m in ("fedavg", "slow", "none")] == ["24 MB", "never", "–"]
    assert cells(grid, "fedavg")["rounds to target"].bold
    assert not cells(grid, "slow")["rounds to target"].bold


def test_newcomers_have_columns_of_their_own(tmp_path: Path) -> None:
    folder = Scene(method="fedper").write(tmp_path / "one")
    assert not any("newcomers" in header for header in summary_grid(read([folder])).headers)
    summary = json.loads((folder / "summary.json").read_text())
    summary["new_clients"] = {"clients": 4, "received": 0.125, "joined": 0.9}
    (folder / "summary.json").write_text(json.dumps(summary))
    row = cells(summary_grid(read([folder])), "fedper")
    assert (row["newcomers received"].text, row["newcomers joined"].text) == ("12.5", "90.0")
