"""An interrupted and resumed run has the same results as an uninterrupted run, bit for bit."""

import json
import multiprocessing
import random
import signal
import time
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import fedloom
from contract import TOYS, assert_same, left_by, untimed
from fedloom import tree
from fedloom.config.settings import make_settings
from fedloom.data import load, partition
from fedloom.errors import ConfigError, RunFolderError
from fedloom.experiment.loop import Experiment, GivenObjects
from fedloom.experiment.manifest import read_manifest
from fedloom.experiment.verifying import verify
from fedloom.methods import FedAvg
from fedloom.methods.registry import METHODS
from small import BRIEF, brief, interrupted_after

SETTINGS = {"clients": 4, "cohort": 2, "rounds": 3, "data.rows": 160, "checkpoint_every": 1, "engine": "sequential"}


@pytest.mark.parametrize("method", [*METHODS, *TOYS])
def test_a_run_resumes_where_it_stopped(experiment, method):
    """Methods are resumed after the first of two rounds; toys after both of the first two rounds of three."""
    rounds = 3 if method in TOYS else 2

    def make():
        return experiment(
            TOYS[method]() if method in TOYS else method, **{**SETTINGS, "rounds": rounds, **brief(method)}
        )

    whole = left_by(make())
    parts = GivenObjects(method=TOYS[method]()) if method in TOYS else GivenObjects()
    path = interrupted_after(make(), 1)
    if rounds == 3:
        interrupted_after(Experiment.resume(path, parts), 2)
    assert_same(left_by(Experiment.resume(path, parts)), whole)


VARIANTS = {
    "fedvtc, architectures": ("fedvtc", {"models": ["mlp", "fedrir_cnn"], "width": 16, **BRIEF}),
    "fedvtc, shared": ("fedvtc", {"method.share_generator": True, "method.learn_spread": True, **BRIEF}),
    "fedvtc, at the end": ("fedvtc", {"method.finetune": "end", **BRIEF}),
    "fedrir, sampled": ("fedrir", {"method.idm_mode": "vclub_sampled"}),
    "fedrir, decorrelated": ("fedrir", {"method.idm_mode": "decorrelated"}),
    "fedrir, fresh moments": ("fedrir", {"method.keep_optimizer": False, "method.csfe_mode": "training"}),
    "own starts": ("fedper", {"same_init": False}),
    "secure": ("fedmr", {"method.secure": True}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_resume_too(experiment, variant):
    method, settings = VARIANTS[variant]
    whole = left_by(experiment(method, **{**SETTINGS, **settings}))
    assert_same(left_by(Experiment.resume(interrupted_after(experiment(method, **{**SETTINGS, **settings}), 2))), whole)


@pytest.mark.parametrize(
    ("method", "model"),
    [("fedavg", "fedmr_cnn"), ("fedavg", "fedrir_cnn"), ("fedmr", "fedrir_cnn"), ("fedrir", "fedrir_cnn")],
)
def test_convolutions_and_running_statistics_are_taken_up_too(experiment, method, model):
    settings = {**SETTINGS, "rounds": 2, "clients": 3, "cohort": 2, "model": model, "width": 16, "data.rows": 100}
    whole = left_by(experiment(method, **settings))
    path = interrupted_after(experiment(method, **settings), 1)
    assert_same(left_by(Experiment.resume(path)), whole)


@pytest.mark.parametrize("stop", ["debug+bytes+sequential", "processes"])
def test_a_run_can_be_resumed_on_another_engine(experiment, stop):
    whole = left_by(experiment("fedrir", **SETTINGS))
    path = interrupted_after(experiment("fedrir", **{**SETTINGS, "engine": stop, "engine.workers": 2}), 2)
    config = path / "config.toml"
    config.write_text(config.read_text().replace(stop, "sequential"))
    assert_same(left_by(Experiment.resume(path)), whole)


@pytest.mark.parametrize("method", ["fedavg", "fedmr", "fedrir"])
def test_top_k_residuals_resume_too(experiment, method):
    settings = {**SETTINGS, "uplink": "topk:0.05,int8", "downlink": "fp16"}
    whole = left_by(experiment(method, **settings))
    assert any(leaf.abs().max() > 0 for client in whole.clients for leaf in tree.leaves(client["unsent"]))
    assert_same(left_by(Experiment.resume(interrupted_after(experiment(method, **settings), 2))), whole)


def test_rounds_after_the_last_checkpoint_are_done_again(experiment):
    settings = {**SETTINGS, "rounds": 5, "checkpoint_every": 2}
    whole = left_by(experiment("fedrir", **settings))
    path = interrupted_after(experiment("fedrir", **settings), 3)
    assert len((path / "metrics.jsonl").read_text().splitlines()) == 3
    assert_same(left_by(Experiment.resume(path)), whole)
    assert [json.loads(line)["round"] for line in (path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 5]


def test_a_run_without_a_checkpoint_starts_again(experiment):
    settings = {**SETTINGS, "checkpoint_every": 0}
    whole = left_by(experiment("fedavg", **settings))
    path = interrupted_after(experiment("fedavg", **settings), 2)
    (path / "partition.json").unlink()  # killed while writing its description
    assert_same(left_by(Experiment.resume(path)), whole)
    assert (path / "partition.json").is_file()


def test_scores_and_validation_resume_too(experiment):
    settings = {**SETTINGS, "eval": {"fitted": True, "valid": 0.2, "general_every": 2, "clients": 3}, "eval_every": 2}
    whole = left_by(experiment("fedavg_ft", **settings))
    assert_same(left_by(Experiment.resume(interrupted_after(experiment("fedavg_ft", **settings), 2))), whole)


def test_a_checkpoint_of_another_method_is_named(experiment):
    path = interrupted_after(experiment("fedavg", **SETTINGS), 1)
    config = path / "config.toml"
    config.write_text(config.read_text().replace('name = "fedavg"', 'name = "scaffold"'))
    with pytest.raises(RunFolderError, match="the checkpoint does not match this method and model"):
        Experiment.resume(path, accept_changes=True)


def test_a_failed_resume_leaves_no_workers(experiment):
    path = interrupted_after(experiment("fedavg", **{**SETTINGS, "engine": "processes", "engine.workers": 2}), 1)
    config = path / "config.toml"
    config.write_text(config.read_text().replace('name = "fedavg"', 'name = "scaffold"'))
    with pytest.raises(RunFolderError):
        Experiment.resume(path)
    assert not multiprocessing.active_children()


def test_a_broken_experiment_is_not_run_again(experiment):
    """Clients have run local updates whose results the server has not received."""
    run = experiment("scaffold", **SETTINGS)
    interrupted_after(run, 1)
    with pytest.raises(RunFolderError, match="this experiment has already run; to continue it, resume its folder"):
        run.run()


def test_a_changed_partition_is_refused(experiment, tmp_path):
    """Otherwise, the run could be tested on examples on which it was trained."""
    dealt, settings = tmp_path / "p.json", {**SETTINGS, "data.name": "digits", "data.rows": 160}
    partition(load("digits", rows=160), 4, seed=0).save(dealt)
    settings |= {"partition": {"name": "file", "path": str(dealt)}}
    path = interrupted_after(experiment("fedavg", **settings), 2)
    partition(load("digits", rows=160), 4, seed=1).save(dealt)
    for again in (Experiment.resume, Experiment.reopen):
        with pytest.raises(RunFolderError, match="its data or partition differ from those at its start"):
            again(path)


# killed processes

LONG: dict[str, Any] = {
    "method": "fedrir", "clients": 4, "cohort": 3, "rounds": 12, "batch_size": 16, "precision": "fp64", "checkpoint_every": 1,
    "progress": False, "model": "mlp", "model.hidden": 12, "data": {"name": "digits", "rows": 160},
    "partition": {"name": "dirichlet", "alpha": 0.5},
}  # fmt: skip


def run_or_resume(folder, engine):
    """Start a run, or resume it, in a process of its own."""
    torch.set_num_threads(1)
    if (folder / "config.toml").exists():
        fedloom.resume(folder, progress=False)
    else:
        fedloom.run(out=folder, engine={"name": engine, "threads": 1}, **LONG)


def n_lines(folder):
    file = folder / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def kill_after(folder, engine, rounds, more_s):
    """Start or resume a run, and kill it `more_s` seconds after the next `rounds` rounds."""
    child = multiprocessing.get_context("fork").Process(target=run_or_resume, args=(folder, engine))
    child.start()
    goal, patience = n_lines(folder) + rounds, time.monotonic() + 60
    while n_lines(folder) < goal and child.is_alive() and time.monotonic() < patience:
        time.sleep(0.001)
    time.sleep(more_s)
    child.kill()
    child.join()
    return child.exitcode


@pytest.mark.parametrize(("engine", "times"), [("sequential", 1), ("processes", 2)])
def test_a_run_that_is_killed_again_and_again_ends_the_same(tmp_path, engine, times):
    chance = random.Random(0)
    killed = tmp_path / "killed"
    codes = [kill_after(killed, engine, chance.randint(1, 3), chance.uniform(0, 0.04)) for _ in range(times)]
    assert codes == [-signal.SIGKILL] * times
    fedloom.resume(killed, progress=False)
    whole = fedloom.run(out=tmp_path / "whole", engine={"name": "sequential", "threads": 1}, **LONG).folder
    one, other = (json.loads((folder / "summary.json").read_text()) for folder in (killed, whole))
    assert untimed(one) == untimed(other)
    lines = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (killed, whole)]
    one, other = ([untimed(json.loads(line)) for line in each] for each in lines)
    assert one == other
    files = sorted(p.relative_to(whole) for p in (whole / "checkpoint").rglob("*.safetensors"))
    assert len(files) == 5
    assert files == sorted(p.relative_to(killed) for p in (killed / "checkpoint").rglob("*.safetensors"))
    for file in files:
        assert (killed / file).read_bytes() == (whole / file).read_bytes(), file
    tables = [pd.read_parquet(folder / "clients.parquet") for folder in (killed, whole)]
    timeless = [table[sorted(c for c in table if "seconds" not in c)] for table in tables]
    pd.testing.assert_frame_equal(*timeless)
    assert sorted(p.name for p in killed.iterdir()) == sorted(p.name for p in whole.iterdir())


def numbers(shift=0.0, **options):
    draws = np.random.default_rng(0)
    x, y = draws.normal(size=(40, 3)).astype("float32"), draws.normal(size=40)
    return fedloom.from_arrays(x + np.float32(shift), y, name="mine", task="regression", **options)


def test_a_run_with_objects_of_python_needs_the_same_objects_again(tmp_path):
    net, dealt = torch.nn.Linear(3, 1), [range(16), range(16, 40)]
    names = {"data": "mine", "model": "Linear", "partition": "given", "engine": "sequential"}
    values = {key: {"name": name} for key, name in names.items()} | {"rounds": 3, "checkpoint_every": 1}

    def make(out):
        chosen = make_settings({**values, "out": str(tmp_path / out)})
        return Experiment(chosen, GivenObjects(dataset=numbers(), model=net, partition=dealt))

    whole = make("whole").run()
    path = interrupted_after(make("cut"), 1)
    given = {"data": numbers(), "model": net, "partition": dealt}
    for left_out in given:
        objects = {key: value for key, value in given.items() if key != left_out}
        with pytest.raises(
            RunFolderError, match=rf"not in its folder: {left_out}; .*resume\(FOLDER, {left_out}=\.\.\.\)"
        ):
            fedloom.resume(path, progress=False, **objects)
    with pytest.raises(RunFolderError, match=r"not in its folder: data, model, partition; open it in Python with"):
        Experiment.reopen(path)
    for other in (numbers(shift=1), numbers(loss="huber"), numbers(classes=["height"])):
        with pytest.raises(RunFolderError, match="its data differ from those at its start"):
            fedloom.resume(path, progress=False, **{**given, "data": other})
    done = fedloom.resume(path, progress=False, **given)
    assert done.summary["personal_rmse"] == whole["personal_rmse"]


def test_a_given_partition_contradicts_another_number_of_clients():
    with pytest.raises(ConfigError, match="clients=3: the given partition has 2 clients; remove clients"):
        fedloom.run(data=numbers(), model="mlp", partition=[range(16), range(16, 40)], clients=3, progress=False)


class Ending(FedAvg):
    """A method that depends on the number of rounds."""

    uses_rounds = True


def test_a_finished_run_goes_on_longer_with_the_same_results(experiment):
    whole = experiment("fedper", **SETTINGS)
    whole.run()
    short = experiment("fedper", **{**SETTINGS, "rounds": 2})
    short.run()
    path = short.folder.path
    (path / "manifest.sig").write_text("{}")
    with pytest.raises(RunFolderError, match=r"this run is finished; .* set rounds=N"):
        Experiment.resume(path)
    with pytest.raises(ConfigError, match=r"rounds=2: .* has 2 rounds already; give a higher number"):
        Experiment.resume(path, rounds=2)
    assert (path / "summary.json").is_file()
    longer = Experiment.resume(path, rounds=3)
    summary = longer.run()
    assert tree.equal(longer.server, whole.server)
    assert all(tree.equal(longer.engine.client(i)._asdict(), whole.engine.client(i)._asdict()) for i in range(4))
    same = [key for key in whole.rows[-1] if "accuracy" in key or key == "round"]
    assert [longer.rows[-1][key] for key in same] == [whole.rows[-1][key] for key in same]
    assert (summary["rounds"], longer.settings.rounds, len(longer.rows)) == (3, 3, 3)
    record = read_manifest(path / "manifest.json")
    assert record["resumed"][-1]["noted"] == ["rounds=3 (was 2)"]
    assert not (path / "manifest.sig").exists()
    assert not verify(path).problems


def test_runs_that_depend_on_their_number_of_rounds_do_not_go_on(experiment):
    done = experiment(Ending(), **{**SETTINGS, "rounds": 1})
    done.run()
    before = sorted(file.name for file in done.folder.path.iterdir())
    with pytest.raises(ConfigError, match=r"rounds=2: Ending depends on the number of rounds \(1\); start a new run"):
        Experiment.resume(done.folder.path, GivenObjects(method=Ending()), rounds=2)
    joined = experiment("fedper", **{**SETTINGS, "rounds": 1, "join.clients": 1})
    joined.run()
    with pytest.raises(ConfigError, match=r"rounds=2: clients join after the last round"):
        Experiment.resume(joined.folder.path, rounds=2)
    assert sorted(file.name for file in done.folder.path.iterdir()) == before
