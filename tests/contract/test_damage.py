"""Damaged, edited or incomplete run folders. A run is refused with the name of the wrong file or key, or resumes to the same numbers."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys

import pandas as pd
import pytest

from contract import assert_same, left_by
from fedloom.config.settings import make_settings
from fedloom.errors import RunFolderError, UsageError
from fedloom.experiment.loop import Experiment
from fedloom.experiment.verifying import verify
from small import SMALL, changed, interrupted_after

SETTINGS = changed(
    SMALL,
    method="fedper",
    rounds=6,
    checkpoint_every=2,
    **{"clients": 4, "devices.dropout": 0.2, "engine": "sequential"},
)
NAN = struct.pack("<f", float("nan"))


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Return an interrupted run (5 of 6 rounds, with the checkpoint of round 4), and the results of the uninterrupted run."""
    folder = tmp_path_factory.mktemp("damage")
    whole = left_by(Experiment(make_settings(SETTINGS | {"out": folder / "whole"})))
    interrupted_after(Experiment(make_settings(SETTINGS | {"out": folder / "cut"})), 5)
    return folder, whole


@pytest.fixture
def cut(kept, tmp_path):
    """Return a copy of the interrupted run's folder."""
    return shutil.copytree(kept[0] / "cut", tmp_path / "run")


def edit(file, old, new):
    def do(run):
        text = (run / file).read_text()
        assert old in text
        (run / file).write_text(text.replace(old, new, 1))

    return do


def write(file, change):
    """Replace the bytes of a file by `change(bytes)`."""
    return lambda run: (run / file).write_bytes(change((run / file).read_bytes()))


def remove(name):
    return lambda run: shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()


def copy(name, to):
    return lambda run: shutil.copy(run / name, run / to)


def swap(one, other):
    def do(run):
        texts = (run / one).read_bytes(), (run / other).read_bytes()
        (run / one).write_bytes(texts[1])
        (run / other).write_bytes(texts[0])

    return do


def flip(data):
    return data[:-2] + bytes([data[-2] ^ 0x40]) + data[-1:]


def lines(change):
    return lambda data: b"".join(change(data.splitlines(keepends=True)))


def rewrite_clients(run):
    table = pd.read_parquet(run / "clients.parquet")
    table.loc[0, "personal_accuracy"] = 0.99
    table.to_parquet(run / "clients.parquet", index=False)


def empty(run):
    shutil.rmtree(run / "checkpoint")
    (run / "checkpoint").mkdir()


SERVER, CLIENT, STATE = "checkpoint/server.safetensors", "checkpoint/clients/3.safetensors", "checkpoint/state.json"
REFUSED = {
    "a hyper-parameter added": (edit("config.toml", "[method]", "[method]\nlr = 0.5"), "method.lr=0.5 (was None)"),
    "another batch size": (edit("config.toml", "batch_size = 16", "batch_size = 8"), "batch_size=8 (was 16)"),
    "another seed": (edit("config.toml", "seed = 0", "seed = 1"), "seed=1 (was 0)"),
    "no settings": (write("config.toml", lambda _: b"rounds = "), "config.toml"),
    "another method": (edit("config.toml", "fedper", "fedrep"), "method.name=fedrep (was fedper)"),
    "fewer rounds": (edit("config.toml", "rounds = 6", "rounds = 3"), "rounds=3 (was 6)"),
    "another environment": (edit("environment.json", '"torch": "', '"torch": "1'), "environment.json"),
    "no environment": (remove("environment.json"), "environment.json is missing"),
    "no partition": (remove("partition.json"), "partition.json is missing"),
    "a bit of the server": (write(SERVER, flip), "server.safetensors was changed"),
    "a bit of a client": (write(CLIENT, flip), "clients/3.safetensors was changed"),
    "NaN in the server": (write(SERVER, lambda data: data[:-4] + NAN), "server.safetensors was changed"),
    "NaN in a client": (write(CLIENT, lambda data: data[:-4] + NAN), "clients/3.safetensors was changed"),
    "a client removed": (remove(CLIENT), "clients/3.safetensors is missing"),
    "all clients removed": (remove("checkpoint/clients"), "clients/0.safetensors is missing"),
    "clients swapped": (swap("checkpoint/clients/2.safetensors", CLIENT), "clients/2.safetensors was changed"),
    "half a server": (write(SERVER, lambda data: data[: len(data) // 2]), "server.safetensors has"),
    "an empty server": (write(SERVER, lambda _: b""), "server.safetensors has 0 bytes"),
    "an empty client": (write(CLIENT, lambda _: b""), "clients/3.safetensors has 0 bytes"),
    "a foreign file": (copy(CLIENT, "checkpoint/clients/x.safetensors"), "clients/x.safetensors does not belong"),
    "one client too many": (copy(CLIENT, "checkpoint/clients/99.safetensors"), "clients/99.safetensors does not belong"),
    "half a state": (write(STATE, lambda data: data[: len(data) // 2]), "state.json has"),
    "a later round": (edit(STATE, '"round": 4', '"round": 6'), "state.json was changed"),
    "a round below 0": (edit(STATE, '"round": 4', '"round": -3'), "state.json has"),
    "only the round": (write(STATE, lambda _: b'{"round": 4}'), "state.json has 12 bytes"),
    "half the clients' table": (write("clients.parquet", lambda data: data[: len(data) // 2]), "clients.parquet cannot be read"),
    "no clients' table": (remove("clients.parquet"), "clients.parquet has 0 rows"),
    "another number in it": (rewrite_clients, "clients.parquet: rows up to round 4 were changed"),
    "half the metrics": (write("metrics.jsonl", lines(lambda rows: rows[:2])), "metrics.jsonl has 2 rows up to round 4"),
    "no metrics": (remove("metrics.jsonl"), "metrics.jsonl has 0 rows"),
    "garbage in the metrics": (write("metrics.jsonl", lambda data: b"\0\0\n" + data), "line 1 of .*metrics.jsonl"),
    "a line twice": (write("metrics.jsonl", lines(lambda rows: rows[:1] + rows)), "metrics.jsonl has 5 rows"),
    "a better metric": (write("metrics.jsonl", lambda d: re.sub(rb'(y": 0\.)\d', rb"\g<1>9", d, count=1)), "metrics.jsonl: rows"),
    "no events": (remove("events.jsonl"), "events.jsonl has 0 rows"),
    "an empty checkpoint": (empty, "checkpoint has neither manifest.json nor state.json"),
    "another manifest": (edit("checkpoint/manifest.json", '"round": 4', '"round": 2'), "manifest.json was changed"),
    "half a manifest": (write("checkpoint/manifest.json", lambda d: d[: len(d) // 2]), "manifest.json cannot be read"),
    "no manifest": (remove("checkpoint/manifest.json"), "checkpoint has no manifest.json"),
}  # fmt: skip
EQUAL = {
    "nothing": lambda _: None,
    "the last line cut": write("metrics.jsonl", lambda data: data[:-9]),
    "killed between renames": lambda run: (run / "checkpoint").rename(run / ".checkpoint.old"),
    "killed while it wrote": lambda run: shutil.copytree(run / "checkpoint", run / ".checkpoint.new"),
    "no checkpoint": remove("checkpoint"),
    "another engine": edit("config.toml", 'name = "sequential"', 'name = "debug+sequential"'),
    "a stale lock": lambda run: (run / ".lock").write_text("{}"),
}  # fmt: skip


@pytest.mark.parametrize("damage", REFUSED)
def test_a_damaged_folder_is_refused(cut, damage):
    do, said = REFUSED[damage]
    do(cut)
    pattern = said if ".*" in said else re.escape(said)
    for _ in range(2):  # the first time, nothing was changed and the lock was released
        with pytest.raises(UsageError, match=pattern) as refused:
            Experiment.resume(cut)
        assert "\n" not in str(refused.value)
    assert re.search("has no manifest" if damage == "no manifest" else pattern, " ".join(verify(cut).problems))


@pytest.mark.parametrize("damage", EQUAL)
def test_what_a_crash_leaves_behind_resumes_to_the_same_numbers(kept, cut, damage):
    EQUAL[damage](cut)
    assert_same(left_by(Experiment.resume(cut)), kept[1])
    assert verify(cut).problems == []


def test_changes_can_be_accepted_and_are_recorded(cut):
    edit("config.toml", "batch_size = 16", "batch_size = 8")(cut)
    summary = Experiment.resume(cut, accept_changes=True).run()
    said = "its config.toml was edited: batch_size=8 (was 16)"
    assert summary["accepted_changes"] == [said]
    verdict = verify(cut)
    assert verdict.problems == []
    assert verdict.notes == [f"resumed in round 4: {said}"]


def test_damage_cannot_be_accepted(cut):
    write(SERVER, flip)(cut)
    with pytest.raises(RunFolderError, match="restore the file from a copy"):
        Experiment.resume(cut, accept_changes=True)


def test_more_rounds_need_no_flag_and_are_recorded(cut):
    edit("config.toml", "rounds = 6", "rounds = 7")(cut)
    assert Experiment.resume(cut).run()["rounds"] == 7
    (resumed,) = json.loads((cut / "manifest.json").read_text())["resumed"]
    assert (resumed["round"], resumed["accepted"], resumed["noted"]) == (4, [], ["rounds=7 (was 6)"])


def test_a_folder_of_an_earlier_version_resumes_once_it_is_accepted(kept, cut):
    remove("checkpoint/manifest.json")(cut)
    with pytest.raises(RunFolderError, match=r"earlier versions wrote none.* resume with --accept-changes"):
        Experiment.resume(cut)
    left = left_by(Experiment.resume(cut, accept_changes=True))
    assert len(left.summary.pop("accepted_changes")) == 1
    assert_same(left, kept[1])
    assert verify(cut).problems == []


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        (STATE, b'{"round": 9}', r"the checkpoint is of round 9, but rounds=6"),
        ("checkpoint/clients/99.safetensors", None, r"the checkpoint has client 99, but there are 4 clients"),
        (SERVER, None, r"the checkpoint holds numbers that are not finite \(at the server"),
    ],
)
def test_a_checkpoint_without_a_manifest_is_checked_too(cut, name, data, said):
    remove("checkpoint/manifest.json")(cut)
    if name == SERVER:
        write(SERVER, lambda data: data[:-4] + NAN)(cut)
    elif data is None:
        shutil.copy(cut / CLIENT, cut / name)
    else:
        (cut / name).write_bytes(data)
    with pytest.raises(RunFolderError, match=said):
        Experiment.resume(cut, accept_changes=True)


@pytest.mark.parametrize(
    ("package", "version", "refused"),
    [("fedloom", "99.0.0", True), ("torch", "1.13.1", True), ("numpy", "1.0.0", False)],
)
def test_other_versions_are_refused_or_recorded(kept, cut, monkeypatch, package, version, refused):
    from fedloom.experiment import resuming

    there = resuming.software_versions()
    monkeypatch.setattr(resuming, "software_versions", lambda: {**there, package: version})
    said = f"{package} {version} (was {there[package]})"
    if refused:
        with pytest.raises(RunFolderError, match=f"versions differ: {re.escape(said)}"):
            Experiment.resume(cut)
    left = left_by(Experiment.resume(cut, accept_changes=refused))
    left.summary.pop("accepted_changes", None)
    assert_same(left, kept[1])
    (resumed,) = json.loads((cut / "manifest.json").read_text())["resumed"]
    assert resumed["versions"][package] == version
    assert resumed["accepted" if refused else "noted"] == [f"versions differ: {said}" if refused else said]


METHOD = """
from fedloom.methods.fedavg import FedAvg
class Mine(FedAvg):
    pass
"""


def test_edited_code_of_a_method_is_refused(tmp_path):
    own = tmp_path / "own.py"
    own.write_text(METHOD)
    values = changed(SMALL, method=f"{own}:Mine", checkpoint_every=1, out=tmp_path / "run")
    path = interrupted_after(Experiment(make_settings(values)), 1)
    own.write_text(METHOD + "# edited\n")
    with pytest.raises(RunFolderError, match=r"the code of its method or model: own\.py was changed"):
        Experiment.resume(path)
    own.write_text(METHOD)
    Experiment.resume(path).run()


SCRIPT = """
import sys
import fedloom
class Mine(fedloom.FedAvg):
    "{}"
if {}:
    fedloom.resume("run", method=Mine(), progress=False)
else:
    def stop(*_):
        raise KeyboardInterrupt
    from fedloom.experiment.loop import Experiment, GivenObjects
    from fedloom.config.settings import make_settings
    named = dict(method=dict(name="fedavg"), model=dict(name="mlp"), engine=dict(name="sequential"))
    values = dict(clients=2, rounds=2, checkpoint_every=1, out="run", **named)
    Experiment(make_settings(values), GivenObjects(method=Mine())).run(stop)
"""


@pytest.mark.slow
def test_a_main_script_may_change_but_not_its_classes(tmp_path):
    def run(doc, again):
        (tmp_path / "train.py").write_text(SCRIPT.format(doc, again))
        done = subprocess.run([sys.executable, "train.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
        return done.stderr.splitlines()[-1] if done.stderr else ""

    assert run("one", False) == "KeyboardInterrupt"
    assert "train.py:Mine was changed" in run("two", True)
    assert run("one", True) == ""


def test_other_data_are_refused(experiment, monkeypatch):
    """The partition has the same numbers of examples per class, but the examples differ."""
    path = interrupted_after(experiment("fedavg", rounds=3, checkpoint_every=1, **{"partition.name": "iid"}), 1)
    from fedloom.experiment import resuming

    facts = resuming.data_facts
    monkeypatch.setattr(resuming, "data_facts", lambda run: facts(run) | {"labels": "0" * 64})
    with pytest.raises(RunFolderError, match="its data differ from those at its start"):
        Experiment.resume(path, accept_changes=True)


def test_a_reopened_run_is_checked_too(cut):
    write(SERVER, flip)(cut)
    with pytest.raises(RunFolderError, match=r"server\.safetensors was changed"):
        Experiment.reopen(cut)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (edit("summary.json", '"rounds": 6', '"rounds": 9'), "summary.json was changed"),
        (remove("summary.json"), "summary.json is missing"),
        (edit("config.toml", "batch_size = 16", "batch_size = 8"), "config.toml was edited: batch_size=8"),
        (write(SERVER, flip), "server.safetensors was changed"),
        (remove("checkpoint"), "checkpoint is missing"),
        (rewrite_clients, "clients.parquet: rows up to round 6 were changed"),
        (write("metrics.jsonl", lambda data: data + b'{"round": 7}\n'), "metrics.jsonl has 7 rows"),
        (edit("manifest.json", '"round": 6', '"round": 5'), "manifest.json was changed"),
    ],
)
def test_a_finished_run_is_verified(kept, tmp_path, damage, said):
    run = shutil.copytree(kept[0] / "whole", tmp_path / "run")
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*")}
    verdict = verify(run)
    assert (verdict.problems, verdict.notes, verdict.state) == ([], [], "finished, round 6")
    assert verdict.digest == json.loads((run / "manifest.json").read_text())["digest"]
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*")} == before
    damage(run)
    assert said in " ".join(verify(run).problems)


def test_a_checkpoint_names_the_one_before(kept):
    """The manifests of a run therefore form a chain."""
    last = json.loads((kept[0] / "whole" / "manifest.json").read_text())
    saved = json.loads((kept[0] / "whole" / "checkpoint" / "manifest.json").read_text())
    assert last["previous"] == saved["digest"]
    assert last["run"] == saved["run"]
    assert saved["previous"]
    assert (saved["round"], saved["changed"]) == (6, [0, 1, 2, 3])


def test_two_cannot_write_to_one_folder(cut):
    first = Experiment.resume(cut)
    with pytest.raises(RunFolderError, match=rf"is already being written by this process \(pid {os.getpid()}\)"):
        Experiment.resume(cut)
    first.run()
    assert not (cut / ".lock").exists()
