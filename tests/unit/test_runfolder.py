"""Run folders: nothing is overwritten, and nothing is left half written."""

import json
import shutil
import subprocess

import pandas as pd
import pytest
import torch

from fedloom import tree
from fedloom.errors import RunFolderError
from fedloom.experiment import environment, run_folder
from fedloom.experiment.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path):
    return RunFolder.create(tmp_path / "run", "x")


def test_nothing_is_overwritten(folder):
    assert RunFolder.create(folder.path, "x").path == folder.path  # empty: nothing to lose
    folder.write("config.toml", "a = 1")
    with pytest.raises(RunFolderError, match=r"out=.*run: already exists and is not an empty folder.*--resume"):
        RunFolder.create(folder.path, "x")
    assert (folder.path / "config.toml").read_text() == "a = 1"


def test_a_file_in_the_way_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="is a file"):
        RunFolder.create(tmp_path / "file", "x")
    with pytest.raises(RunFolderError, match="out="):
        RunFolder.create(tmp_path / "file" / "below", "x")


def test_unnamed_runs_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = [RunFolder.create(None, "fedavg-digits").path for _ in range(3)]
    assert len(set(made)) == 3
    assert all(path.parent.name == "runs" and "fedavg-digits" in path.name for path in made)


def test_only_a_runs_folder_can_be_opened(tmp_path):
    with pytest.raises(RunFolderError, match=r"no config\.toml"):
        RunFolder.open(tmp_path)


def test_files_are_replaced_whole(folder):
    for text in ("one", "two"):
        folder.write("notes.txt", text)
        folder.write_json("numbers.json", {"text": text})
    assert (folder.path / "notes.txt").read_text() == "two"
    assert json.loads((folder.path / "numbers.json").read_text()) == {"text": "two"}
    assert sorted(p.name for p in folder.path.iterdir()) == ["notes.txt", "numbers.json"]


def test_a_reader_with_the_old_file_open_keeps_it_whole(folder):
    folder.write("notes.txt", "old" * 1000)
    with (folder.path / "notes.txt").open() as reader:
        folder.write("notes.txt", "new")
        assert reader.read() == "old" * 1000


def test_metrics_are_read_back_and_nonfinite_numbers_are_null(folder):
    folder.append({"round": 1, "a": 0.1 + 0.2, "b": float("nan"), "c": float("inf"), "d": None})
    assert folder.rows() == [{"round": 1, "a": 0.1 + 0.2, "b": None, "c": None, "d": None}]


@pytest.mark.parametrize("cut", ['{"rou', '{"round": 3, "a": 0.5}'])
def test_a_line_that_was_cut_off_is_left_out(folder, cut):
    folder.append({"round": 1})
    folder.append({"round": 2})
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write(cut)
    assert [row["round"] for row in folder.rows()] == [1, 2]
    assert [row["round"] for row in folder.keep_rows(1)] == [1]
    folder.append({"round": 2, "again": True})
    assert folder.rows() == [{"round": 1}, {"round": 2, "again": True}]


def test_a_new_folder_has_no_rows(folder):
    assert folder.rows() == []
    assert folder.load_checkpoint() is None
    assert folder.read_clients(5).empty


def test_clients_are_kept_up_to_a_round(folder):
    folder.write_clients(pd.DataFrame({"round": [1, 2, 3], "client": [0, 1, 2], "x": [0.1, None, 0.3]}))
    assert folder.read_clients(2)["client"].tolist() == [0, 1]


SERVER = {"weights": {"params": {"w": torch.tensor([1.0, 2.0])}}}
CLIENTS = {0: {"memory": {"n": torch.tensor(3)}}, 12: {"opts": {"step": torch.tensor(1.0, dtype=torch.float64)}}}


def save(folder, number, server=SERVER):
    folder.save_checkpoint({"round": number}, server, CLIENTS)


def test_a_checkpoint_comes_back(folder):
    save(folder, 1)
    save(folder, 2)
    state, server, clients = folder.load_checkpoint()
    assert state == {"round": 2}
    assert tree.equal(server, SERVER)
    assert clients.keys() == {0, 12}
    assert all(tree.equal(clients[i], CLIENTS[i]) for i in CLIENTS)
    assert [p.name for p in folder.path.iterdir()] == ["checkpoint"]


def test_a_checkpoint_that_was_being_written_does_not_count(folder):
    save(folder, 1)
    half = folder.path / ".checkpoint.new"
    half.mkdir()
    (half / "state.json").write_text('{"round": 99')
    assert folder.load_checkpoint()[0] == {"round": 1}
    save(folder, 2)
    assert folder.load_checkpoint()[0] == {"round": 2}


def test_the_checkpoint_that_was_being_replaced_counts(folder):
    save(folder, 1)
    (folder.path / "checkpoint").rename(folder.path / ".checkpoint.old")
    assert folder.load_checkpoint()[0] == {"round": 1}


def test_the_checkpoint_outlives_a_failure_to_write_the_next(folder):
    save(folder, 1)
    for _ in range(2):
        with pytest.raises(TypeError):
            folder.save_checkpoint({"round": object()}, SERVER, CLIENTS)
        assert folder.load_checkpoint()[0] == {"round": 1}
        if (folder.path / "checkpoint").exists():
            (folder.path / "checkpoint").rename(folder.path / ".checkpoint.old")
    save(folder, 2)
    assert folder.load_checkpoint()[0] == {"round": 2}


@pytest.mark.parametrize("name", ["state.json", "server.safetensors"])
def test_a_damaged_checkpoint_is_named(folder, name):
    save(folder, 1)
    file = folder.path / "checkpoint" / name
    file.write_bytes(file.read_bytes()[:5])
    with pytest.raises(RunFolderError, match=r"the checkpoint in .* cannot be read"):
        folder.load_checkpoint()


@pytest.mark.parametrize("text", ['{"round": "2"}', "[2]", "{}"])
def test_a_state_of_another_type_is_named(folder, text):
    save(folder, 1)
    (folder.path / "checkpoint" / "state.json").write_text(text)
    with pytest.raises(RunFolderError, match=r"checkpoint cannot be read: state\.json cannot be read: .*'round'"):
        folder.load_checkpoint()


def test_damaged_lines_and_tables_are_named(folder):
    folder.append({"round": 1})
    for line in ('{"rou', "3", '{"a": 1}'):
        (folder.path / "metrics.jsonl").write_text(f'{{"round": 1}}\n{line}\n')
        with pytest.raises(RunFolderError, match=r"line 2 of .*metrics\.jsonl cannot be read"):
            folder.rows()
    for damage in (b"", b"PAR1 no table"):
        (folder.path / "clients.parquet").write_bytes(damage)
        with pytest.raises(RunFolderError, match=r"clients\.parquet cannot be read"):
            folder.read_clients(1)
    folder.write_clients(pd.DataFrame({"client": [1]}))
    with pytest.raises(RunFolderError, match=r"clients\.parquet cannot be read.*round"):
        folder.read_clients(1)


def test_a_checkpoint_is_on_the_disk_before_the_one_before_goes(folder, monkeypatch):
    save(folder, 1)
    folder.append({"round": 1})
    done, remove = [], shutil.rmtree
    monkeypatch.setattr(run_folder.os, "sync", lambda: done.append(sorted(p.name for p in folder.path.iterdir())))
    monkeypatch.setattr(
        run_folder.shutil, "rmtree", lambda path, **how: (done.append(f"no {path.name}"), remove(path, **how))
    )
    save(folder, 2)
    assert done == [
        "no .checkpoint.new",
        [".checkpoint.new", "checkpoint", "metrics.jsonl"],
        "no .checkpoint.old",
        [".checkpoint.old", "checkpoint", "metrics.jsonl"],
        "no .checkpoint.old",
    ]


def test_the_commit_is_that_of_this_package_alone(tmp_path, monkeypatch):
    def git(*words):
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(["git", "-C", tmp_path, *who, *words], check=True, capture_output=True, text=True).stdout

    if shutil.which("git") is None:
        pytest.skip("needs git")
    (tmp_path / "environment.py").touch()
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "environment.py"))
    git("init")
    git("commit", "--allow-empty", "-m", "theirs")
    assert environment.environment()["commit"] is None
    git("add", "environment.py")
    assert environment.environment()["commit"] == git("rev-parse", "HEAD").strip()


def test_the_command_can_be_typed_again(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/bin/fedloom", "run", "label=first try"])
    assert environment.environment()["command"] == "fedloom run 'label=first try'"
