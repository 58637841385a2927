"""Every mistake of a user ends in one clear line."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

OWN = """
from dataclasses import dataclass
from fedloom import Method


@dataclass(frozen=True)
class Mine(Method):
    def loss(self, nets, batch, down, memory):
        return nets.model(batch.x).sum() * (1 / len([]))


@dataclass(frozen=True)
class Broken(Method):
    def aggregate(self, server, uplinks, round):
        after = super().aggregate(server, uplinks, round)
        return {"weights": {**after["weights"], "params": {n: p / 0 for n, p in after["weights"]["params"].items()}}}


@dataclass(frozen=True)
class Vector(Method):
    def loss(self, nets, batch, down, memory):
        return nets.model(batch.x)
"""

MISTAKES = {
    "rn": "'rn' is not a command (did you mean 'run'?)",
    "run rouns=3": "unknown key 'rouns' (did you mean 'rounds'?)",
    "run rounds=abc": "rounds=abc: must be an integer",
    "run rounds=1.5": "rounds=1.5: must be an integer",
    "bench w1 rounds=1.5": "rounds=1.5: must be an integer",
    "bench w1 rounds=inf": "rounds=inf: must be an integer",
    "run data=../x": "data=../x: a name may contain only letters",
    "run batch_size=0": "batch_size=0: must be at least 1",
    "run devices.dropout=1": "devices.dropout=1: must be below 1",
    "run devices.slow=1.5": "devices.slow=1.5: must be at most 1",
    "run devices.slowdown=0.5": "devices.slowdown=0.5: must be at least 1",
    "run devices.stragglers=lat": "must be one of wait, drop, late, partial (did you mean 'late'?)",
    "run method=fedmr devices.stragglers=late": "devices.stragglers=late: fedmr cannot aggregate late uplinks",
    "run min_clients=11": "min_clients=11: must be at most 10, the largest cohort",
    "run eval.target=80": "eval.target=80: must be above 0 and at most 1, because accuracy is a fraction; for 80 %, set 0.8",
    "run seed=-1": "seed=-1: must be at least 0",
    "run partition.alpha=0": "partition.alpha=0: must be above 0",
    "run eval.valid=1": "eval.valid=1: must be below 1",
    "run eval=3": "eval=3: is a table; set its keys individually, such as eval.KEY=VALUE",
    "run partition.balance=maybe": "partition.balance=maybe: must be true or false",
    "run partition=dirichlt": "must be one of iid, dirichlet, pathological",
    "run precision=fp61": "precision=fp61: must be one of fp32, fp64, bf16, tf32 (did you mean 'fp64'?)",
    "run log=tensorbord": "log=tensorbord: must be one of tensorboard, wandb, mlflow (did you mean 'tensorboard'?)",
    "run participation=2": "participation=2: must be above 0 and at most 1",
    "run cohort=20": "cohort=20: there are only 10 clients",
    "run clients=5000": "clients=5000: 1797 examples",
    "run data=cifar10": "data=cifar10: not found; put train.parquet",
    "run data.path=/nowhere": "data.path=/nowhere: folder does not exist",
    "run method=fedrri": "(did you mean 'fedrir'?)",
    "run method.mu=1": "method.mu: fedavg has no such hyper-parameter; methods that have it: ditto, fedamp, fedprox",
    "run method.lrr=1": "method.lrr: fedavg has no such hyper-parameter (did you mean 'lr'?)",
    "run method.lr=fast": "method.lr=fast: must be a number",
    "run method.lr=-1": "method.lr=-1: must be above 0",
    "run method=scaffold method.momentum=0.9": "method: scaffold needs plain SGD",
    "run method=a,b": "method=a,b: a run takes one value; to use several, run fedloom compare",
    "run seed=0,1": "seed=0,1: a run takes one value",
    "run model=resnt8": "(did you mean 'resnet8'?)",
    "run engine=sequentail": "(did you mean 'sequential'?)",
    "run models=mlp,resnet8": "FedAvg shares model, which must be the same for all clients",
    "run engine.address=auto": "engine.address=auto: applies only to engine=ray, not engine=auto",
    "run engine=ray engine.address=nowhere": "engine.address=nowhere: must be auto, HOST:PORT or ray://HOST:PORT",
    "run engine=ray engine.deadline_s=0": "engine.deadline_s=0: must be above 0",
    "run method=own.py:Nine": "own.py defines no 'Nine' (did you mean 'Mine'?)",
    "run method=none.py:Mine": "there is no file none.py",
    "run fedavg": "did you mean method=fedavg?",
    "run none.toml": "config file none.toml does not exist",
    "run own.py": "did you mean method=own.py:Mine?",
    "run fedprox.mu=1": "[fedprox]: tables named after a method work only with `fedloom compare`",
    "run typo.toml": "unknown key 'partition.alhpa' (did you mean 'alpha'?)",
    "run typo.toml other.toml": "only one config file can be given",
    "run --jsn": "fedloom run has no option --jsn (did you mean '--json'?)",
    "run engine=sequential engine.lanes=4": "engine.lanes=4: applies only to engine=processes and vectorised, not sequential",
    "run engine=debug+ray engine.lanes=4": "engine.lanes=4: applies only to engine=processes and vectorised, not ray",
    "run partition.path=mine.json": "partition.path=mine.json: applies only to partition=file; set partition",
    "run partition.column=who": "partition.column=who: applies only to partition=natural and partition=own; set partition",
    "run out=": "out=: must not be empty",
    "run --resume=": "fedloom run: --resume must not be empty",
    "run method=ends.py:Mine": "method=ends.py:Mine: ends.py exits Python when it is imported",
    "run out=full": "out=full: already exists and is not an empty folder; choose another folder",
    "compare": "method: must name the methods to compare",
    "compare method=fedavg,fedavg": "'fedavg' is given twice",
    "compare method=fedavg,fedprox seed=a": "seed=a: must be distinct integers",
    "compare method=fedavg,fedprox method.nu=1": "method.nu: none of fedavg, fedprox has this hyper-parameter",
    "compare method=fedavg,fedprox fedprox.nu=1": "fedprox.nu: fedprox has no such hyper-parameter",
    "compare method=fedavg other.x=1": "unknown key 'other'",
    "compare variant.x.mu=1": "variant.x: has no method",
    "compare variant.x.method=fedavg variant.x.rounds=3": "it is a setting of the run, and the same for all rows",
    "compare method=fedavg,fedprox label=foo": "label=foo: cannot be set, because each row is named after its method",
    "compare number.toml": "out=7: must be a path",
    "compare --resume=": "fedloom compare: --resume must not be empty",
    "compare --resume full": "full is not the folder of a comparison",
    "compare method=fedavg,fedprox out=full": "out=full: already exists and is not an empty folder",
    "compare method=fedavg engine=sequentail": "(did you mean 'sequential'?)",
    "list": "choose one of methods, datasets, models, engines",
    "list metods": "(did you mean 'methods'?)",
    "list methods fedrri": "(did you mean 'fedrir'?)",
    "report": "give the folder of a run",
    "report full": "neither a run folder",
    "report full base=x": "unknown key 'base' (did you mean 'baseline'?)",
    "report full out=": "out=: must not be empty",
    "report full baseline=": "baseline=: must not be empty",
    "report full out=full/notes.txt": "out=full/notes.txt: cannot be written: the file exists; choose another name",
    "analyse full out=": "out=: must not be empty",
    "analyse full out=full/notes.txt": "out=full/notes.txt: cannot be written: the file exists; choose another name",
    "analyse full out=x.doc": "out=x.doc: must end in one of .",
    "analyse full --only features out=x.png": "out=x.png: sets the file for the sharpness curves, but --only features excludes them",
    "cost --network=": "fedloom cost: --network must not be empty",
    "export full --out=": "fedloom export: --out must not be empty",
    "bench engine=": "engine=: must not be empty",
    "partition out=full": "out=full: cannot be written: it is a folder",
    "partition out=full/notes.txt": "out=full/notes.txt: cannot be written: the file exists; choose another name",
    "partition plot=full/notes.txt": "plot=full/notes.txt: cannot be written: the file exists; choose another name",
    "partition out=none/x.json": "out=none/x.json: cannot be written: folder none does not exist",
    "partition plot=x.doc": "plot=x.doc: must end in one of .",
    "check": "give a method",
    "check own.py:Nine": "(did you mean 'Mine'?)",
    "check none.py": "check=none.py: there is no file none.py",
    "check ends.py": "check=ends.py: ends.py exits Python when it is imported",
    "check empty.py": "defines no class derived from fedloom.Method",
}  # fmt: skip


@pytest.fixture
def files(cli):
    Path("own.py").write_text(OWN)
    Path("empty.py").write_text("")
    Path("ends.py").write_text(OWN + "raise SystemExit(0)\n")
    Path("number.toml").write_text('method = ["fedavg", "fedprox"]\nout = 7\n')
    Path("typo.toml").write_text("[partition]\nalhpa = 1.0\n")
    Path("full").mkdir()
    Path("full/notes.txt").write_text("mine")
    return cli


@pytest.mark.parametrize(("line", "message"), MISTAKES.items(), ids=MISTAKES)
def test_one_line_and_exit_code_2(files, line, message):
    done = files(*line.split())
    assert done.err.startswith("fedloom: error: ")
    assert message in done.err
    assert done.err.count("\n") == 1
    assert done.code == 2
    assert not Path("runs").exists(), "a refused command leaves no folder behind"
    assert Path("full/notes.txt").read_text() == "mine"


@pytest.mark.parametrize("engine", ["sequential", "processes"])
def test_an_error_in_a_method_names_file_line_client_round_and_phase(files, engine):
    if engine == "processes" and sys.platform != "linux":
        pytest.skip("worker processes need Linux")
    words = ("model=mlp", f"engine={engine}", "out=mine", "--quiet")
    done = files("run", "method=own.py:Mine", *words)
    assert done.code == 1
    assert done.err.startswith(
        "fedloom: error: ZeroDivisionError: division by zero (own.py:9, in loss; in phase 'train'"
    )
    assert re.search(r"client \d, round 1\)", done.err)
    assert "--debug" in done.err
    assert done.err.count("\n") == 1


def test_a_server_that_is_not_finite_ends_the_run_in_one_line(files):
    done = files("run", "method=own.py:Broken", "model=mlp", "rounds=1", "engine=sequential", "out=mine", "--quiet")
    assert done.code == 2
    message = "error: round 1: the server's 'weights/params/model.body.linear.weight' is not finite after aggregation; no checkpoint"
    assert message in done.err
    assert done.err.count("\n") == 1
    assert not Path("mine/checkpoint").exists()


def test_debug_shows_the_traceback(files):
    done = files("run", "method=own.py:Mine", "model=mlp", "engine=sequential", "out=mine", "--debug")
    assert done.code == 1
    assert "Traceback (most recent call last)" in done.err


def test_a_broken_rule_is_one_line_too(files):
    done = files("run", "method=own.py:Vector", "model=mlp", "engine=sequential", "out=mine", "--quiet")
    assert done.code == 1
    assert "a loss must be a 0-d tensor" in done.err
    assert done.err.count("\n") == 1


def test_batch_norm_on_single_rows_says_what_to_change(files):
    done = files("run", "model=mobilenetv2", "batch_size=1", "engine=sequential", "out=mine", "--quiet")
    assert done.code == 2
    assert "BatchNorm" in done.err
    assert "client 0 trains on batches of one example (batch_size=1)" in done.err
    assert done.err.count("\n") == 1


def test_fedrir_takes_any_backbone(files):
    assert (
        files("run", "method=fedrir", "model=mlp", "data.rows=200", "rounds=1", "engine=sequential", "out=m").code == 0
    )
