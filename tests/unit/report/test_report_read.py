"""Reading of complete, unfinished and damaged run folders."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from synthetic_runs import Scene

from fedloom.errors import RunFolderError
from fedloom.report import read


def test_a_comparison_folder_is_all_its_runs(comparison: Path) -> None:
    (comparison / "notes").mkdir()
    records = read([comparison])
    assert [record.name for record in records] == [
        f"{method}-seed{seed}" for method in ("fedavg", "fedper", "fedprox", "fedrir") for seed in (0, 1)
    ]
    assert [record.name for record in records if not record.finished] == ["fedper-seed1"]


def test_a_record_holds_what_the_folder_holds(tmp_path: Path) -> None:
    scene = Scene(method="fedrir", seed=3, rounds=10)
    (record,) = read([scene.write(tmp_path / "run")])
    assert (record.method, record.seed, record.finished, record.progress) == ("fedrir", 3, True, "round 10 of 10")
    assert record.metrics["round"].tolist() == list(range(1, 11))
    assert math.isnan(record.metrics["general_accuracy"].iloc[0])
    assert record.clients is not None
    assert record.clients["client"].nunique() == 20
    assert record.summary is not None
    assert record.summary["uplink_bytes"] == 24_000_000
    assert record.fact("data") == "digits"


def test_runs_are_in_natural_order_and_read_once(tmp_path: Path) -> None:
    for seed in (10, 2):
        Scene(seed=seed).write(tmp_path / f"seed{seed}")
    assert [record.name for record in read([tmp_path, tmp_path / "seed10"])] == ["seed2", "seed10"]


def test_a_run_that_just_started_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("rounds = 5\n")
    (record,) = read([tmp_path])
    assert (record.finished, record.progress, record.clients) == (False, "round 0 of 5", None)
    assert len(record.metrics) == 0


def test_a_last_line_cut_short_is_left_out(tmp_path: Path) -> None:
    folder = Scene(rounds=10, finished=False).write(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"round": 6, "personal_acc')
    assert read([folder])[0].rounds_done == 5


def test_a_round_evaluated_again_counts_once(tmp_path: Path) -> None:
    folder = Scene(rounds=4).write(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"round": 3, "personal_accuracy": 0.5}) + "\n")
    metrics = read([folder])[0].metrics.set_index("round")
    assert metrics["personal_accuracy"].loc[3] == 0.5
    assert metrics.index.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.toml", "rounds = ", "config.toml' is not valid TOML"),
        ("summary.json", "{", "summary.json' is not valid JSON"),
        ("partition.json", "[1]", "partition.json' must be a JSON object, not list"),
        ("metrics.jsonl", '{"round": 1}\n{"round"\n', "line 2 of .*metrics.jsonl' is not valid JSON"),
        ("metrics.jsonl", '{"personal_accuracy": 1}\n', "line 1 of .* has no integer 'round'"),
        ("metrics.jsonl", '{"round": 1, "x": "high"}\n', "'x' must be a number or null, not 'high'"),
        ("clients.parquet", "no parquet", "is not a readable Parquet file"),
        ("environment.json", "\udcff", "cannot read .*environment.json"),
    ],
)
def test_a_broken_file_is_one_clear_line(tmp_path: Path, file: str, text: str, message: str) -> None:
    folder = Scene(rounds=4).write(tmp_path / "run")
    (folder / file).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(RunFolderError, match=message) as caught:
        read([folder])
    assert "\n" not in str(caught.value)


def test_client_rows_need_a_client(tmp_path: Path) -> None:
    import pandas as pd

    folder = Scene(rounds=4).write(tmp_path / "run")
    pd.DataFrame({"round": [0]}).to_parquet(folder / "clients.parquet")
    with pytest.raises(RunFolderError, match="has no column 'client'"):
        read([folder])


def test_folders_that_are_not_runs_are_a_one_line_error(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no run folder was given"):
        read([])
    with pytest.raises(RunFolderError, match=f"'{re.escape(str(tmp_path / 'gone'))}' does not exist"):
        read([tmp_path / "gone"])
    with pytest.raises(RunFolderError, match="neither a run folder"):
        read([tmp_path])
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match="is a file"):
        read([tmp_path / "file"])
