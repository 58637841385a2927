"""Time to accuracy on networks, checked by hand."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from fedloom.errors import ConfigError
from fedloom.report import Waiting, read, write_page
from fedloom.report.link_speeds import Network
from fedloom.report.waiting import common_target, elapsed, round_of_target, waiting_grid

WAY = Network("slow", up=8, down=80, latency=500)  # 1 MB up takes 1 s, 10 MB down takes 1 s


def folder(path, accuracies, seconds, method="fedavg"):
    """Write a run with two clients per round. The second client computes twice as long and sends nothing."""
    path.mkdir()
    (path / "config.toml").write_text(f'method = "{method}"\n')
    rows = [{"round": r, "personal_accuracy": a} for r, a in enumerate(accuracies, start=1)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    turns = [
        {
            "round": r,
            "client": i,
            "uplink_bytes": up,
            "downlink_bytes": 10_000_000,
            "seconds": seconds * (i + 1),
            "flops": 4e9 * (i + 1),
        }
        for r in range(1, len(accuracies) + 1)
        for i, up in enumerate((1_000_000, 0))
    ]
    pd.DataFrame([*turns, {"round": 1, "client": 2}]).to_parquet(path / "clients.parquet")
    return path


def test_a_round_waits_for_its_slowest_client(tmp_path):
    (record,) = read([folder(tmp_path / "a", [0.5, 0.9], seconds=0.25)])
    # the first: 2 messages, 1 s each way, and 0.25 s x 2; the second: one message, 1 s, and 0.5 s x 2
    assert elapsed(record, WAY, Waiting([WAY], slowdown=2)).tolist() == pytest.approx([3.5, 7.0])
    # computing ten times as slowly, the second is the last
    assert elapsed(record, WAY, Waiting([WAY], slowdown=20)).tolist() == pytest.approx([11.5, 23.0])
    # 4 and 8 GFLOP at 1 GFLOP/s
    assert elapsed(record, WAY, Waiting([WAY], gflops=1)).tolist() == pytest.approx([9.5, 19.0])


def test_the_target_is_reached_by_all_methods(tmp_path):
    records = read([folder(tmp_path / "a", [0.5, 0.93, 0.91], 1), folder(tmp_path / "b", [0.96], 1, "fedmr")])
    assert common_target(records) == 0.93
    assert [round_of_target(record, 0.93) for record in records] == [2, 1]
    assert round_of_target(records[0], 0.94) is None


def test_the_table_shows_the_time(tmp_path):
    records = read([folder(tmp_path / "a", [0.5, 0.9], 0.25), folder(tmp_path / "b", [0.6, 0.7], 0.25, "fedmr")])
    grid = waiting_grid(records, Waiting([WAY], slowdown=2, target=0.9))
    (name, *cells), (other, *dashes) = [[cell.text for cell in row] for row in grid.rows]
    assert (name, other) == ("fedavg", "fedmr")
    assert cells == ["2", "10.5 MB", "2.0s", "7.0s"]
    assert set(dashes) == {"–"}
    assert grid.title == "Time to 90.0 % personal accuracy"


def test_a_run_without_times_is_refused(tmp_path):
    path = folder(tmp_path / "a", [0.5], 1)
    turns = pd.read_parquet(path / "clients.parquet")
    turns.drop(columns="flops").to_parquet(path / "clients.parquet")
    with pytest.raises(ConfigError, match="a has no operation counts, which gflops needs"):
        waiting_grid(read([path]), Waiting([WAY], gflops=4))
    (path / "clients.parquet").unlink()
    with pytest.raises(ConfigError, match=r"a has no seconds and bytes in clients\.parquet"):
        waiting_grid(read([path]), Waiting([WAY], gflops=4))
    (path / "metrics.jsonl").unlink()
    with pytest.raises(ConfigError, match="a has no accuracy yet"):
        waiting_grid(read([path]), Waiting([WAY]))


def test_the_page_has_the_table_and_a_plot_for_each_network(tmp_path):
    records = read([folder(tmp_path / "a", [0.5, 0.9], 0.25)])
    write_page(records, tmp_path / "page.html", Waiting([WAY, Network("fast", 1000, 1000, 1)]))
    page = (tmp_path / "page.html").read_text()
    assert "Time to 90.0 % personal accuracy" in page
    assert "over time, slow" in page
    assert "over time, fast" in page


def test_a_target_that_was_met_before_anybody_worked_took_no_time(tmp_path):
    place = folder(tmp_path / "a", [0.5, 0.9], seconds=0.25)
    turns = pd.read_parquet(place / "clients.parquet")
    turns[turns["round"] == 2].to_parquet(place / "clients.parquet")
    (row,) = waiting_grid(read([place]), Waiting([WAY], target=0.4)).rows
    assert row[-1].value == 0.0
