"""`fedloom run`."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import fedloom


def test_run_prints_a_table_and_writes_a_folder(tiny):
    done = tiny("run", "out=mine")
    assert done.code == 0
    assert "fedavg" in done.out
    assert "personal" in done.out
    assert "folder  mine" in done.out
    assert {"config.toml", "summary.json", "metrics.jsonl", "report.html"} <= {
        file.name for file in Path("mine").iterdir()
    }
    facts = dict(line.split(maxsplit=1) for line in done.err.splitlines()[:-1])
    assert facts == {
        "method": "fedavg", "data": "digits, 149 training examples", "clients": "4, all in a round",
        "steps": "about 16 in a round", "rounds": "2", "engine": "sequential", "folder": "mine",
    }  # fmt: skip
    assert done.err.splitlines()[-1].startswith("fedavg: round 2/2")


def test_json_prints_the_summary_and_nothing_else(tiny):
    done = tiny("run", "--json", "out=mine")
    assert json.loads(done.out) == json.loads(Path("mine/summary.json").read_text())


def test_quiet_prints_the_folder_alone(tiny):
    done = tiny("run", "--quiet", "out=mine")
    assert (done.out, done.err) == ("mine\n", "")


def test_a_config_file_and_words_over_it(cli):
    Path("a.toml").write_text(
        'method = "fedprox"\nrounds = 3\nmodel = "mlp"\nclients = 4\nengine = "sequential"\n[data]\nrows = 200\n'
    )
    assert cli("run", "method.mu=0.5", "a.toml", "rounds=1", "--json", "out=mine").code == 0
    summary = json.loads(Path("mine/summary.json").read_text())
    assert (summary["method"], summary["rounds"]) == ("fedprox", 1)
    assert "mu = 0.5" in Path("mine/config.toml").read_text()


def test_options_may_stand_between_words(tiny):
    assert tiny("run", "--quiet", "seed=1", "--json", "out=mine").code == 0
    assert json.loads(Path("mine/summary.json").read_text())["seed"] == 1


def test_a_label_names_the_run(tiny):
    assert "first try" in tiny("run", 'label="first try"', "out=mine").out


def test_divergence_is_reported(tiny):
    done = tiny("run", "method.lr=1e30", "out=mine", "--quiet")
    assert done.code == 1
    assert (
        "warning: mine: an uplink was rejected ('weights/params/model.body.linear.weight' is not finite) in round 1"
        in done.err
    )
    assert "method.lr" in done.err


def test_natural_clients_need_no_number(cli, tmp_path):
    writers = pa.array(["ann", "bob", "cy"] * 20)
    pictures = [{"bytes": _png(shade), "path": None} for shade in range(60)]
    (tmp_path / "written").mkdir()
    table = pa.table({"image": pictures, "label": [n % 2 for n in range(60)], "writer": writers})
    pq.write_table(table, tmp_path / "written/train.parquet")
    words = ("partition=natural", "partition.column=writer", "model=mlp", "rounds=1", "engine=sequential", "--json")
    done = cli("run", "data=written", "data.path=written", *words)
    assert done.code == 0, done.err
    assert json.loads(done.out)["clients"] == 3


def _png(shade):
    file = io.BytesIO()
    Image.new("L", (8, 8), shade).save(file, "PNG")
    return file.getvalue()


def test_help_lists_every_key(cli):
    done = cli("run", "--help")
    assert done.code == 0
    for key in (
        "method=",
        "partition.alpha= [0.1]  number > 0",
        "eval.valid=",
        "precision= [fp32]  fp32|fp64|bf16",
        "out=",
    ):
        assert key in done.out


@pytest.mark.parametrize(
    ("sign", "code", "said"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "ended by SIGTERM")]
)
def test_an_interrupted_run_says_how_to_resume_and_does(tiny, cli, sign, code, said):
    words = (
        "rounds=600",
        "clients=4",
        "model=mlp",
        "model.hidden=8",
        "data.rows=200",
        "engine=sequential",
        "engine.threads=1",
    )
    command = [sys.executable, "-m", "fedloom.cli", "run", *words, "out=cut", "checkpoint_every=1"]
    stopped = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not Path("cut/checkpoint").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    stopped.send_signal(sign)
    _, err = stopped.communicate(timeout=60)
    assert stopped.returncode == code
    assert err.splitlines()[-1] == f"fedloom: {said}; continue with: fedloom run --resume cut"
    config = Path("cut/config.toml")
    done = json.loads(Path("cut/checkpoint/state.json").read_text())["round"]
    config.write_text(config.read_text().replace("rounds = 600", f"rounds = {done + 1}"))
    resumed = cli("run", "--resume", "cut", "--accept-changes", "--json")
    assert resumed.code == 0
    assert tiny("run", f"rounds={done + 1}", "out=whole", "--quiet").code == 0
    cut, whole = (
        [json.loads(line)["train.loss"] for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
        for folder in ("cut", "whole")
    )
    assert cut == whole


def test_an_interruption_while_a_string_is_executed_has_the_same_exit_code(tmp_path):
    code = (
        "import importlib, sys\n"
        "m = importlib.import_module('fedloom.cli.main')\n"
        "m.COMMANDS = {'run': m.Entry('command:run', '')}\n"
        "sys.exit(m.main(['run']))\n"
    )
    (tmp_path / "interrupting.py").write_text(code)
    (tmp_path / "command.py").write_text("def run(words): exec('import signal; signal.raise_signal(signal.SIGINT)')\n")
    done = subprocess.run([sys.executable, "-m", "interrupting"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (130, "fedloom: interrupted\n")


def test_unresumable_runs_are_refused(tiny, cli):
    tiny("run", "out=mine", "--quiet")
    Path("foreign").mkdir()
    assert "finished" in cli("run", "--resume", "mine").err
    assert "not a run folder" in cli("run", "--resume", "foreign").err
    assert (
        "takes all settings from the folder, except a higher rounds=N" in cli("run", "--resume", "mine", "seed=3").err
    )
    assert "rounds=x: must be one number of rounds" in cli("run", "--resume", "mine", "rounds=x").err


def test_the_entry_point():
    command = [Path(sys.executable).with_name("fedloom"), "--version"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.stdout == f"fedloom {fedloom.__version__}\n"


def test_a_run_whose_rounds_were_all_skipped_does_not_exit_with_0(tiny):
    done = tiny("run", "method.lr=1e30", "out=mine")
    assert done.code == 1
    assert (
        "error: mine: every round was skipped, so the model was never trained; see events.jsonl for the reasons"
        in done.err
    )
    assert json.loads(Path("mine/summary.json").read_text())["skipped"] == 2
    both = tiny("compare", "method=fedavg,local", "fedavg.lr=1e30", "out=both")
    assert both.code == 1
    assert both.err.count("every round was skipped") == 1
