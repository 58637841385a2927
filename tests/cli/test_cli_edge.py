"""`fedloom export`, `fedloom cost`, and reports of times on networks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Measure latencies only for a moment."""
    monkeypatch.setattr("fedloom.tools.export.MOST_S", 0.0)


def test_export_writes_once(tiny, cli):
    pytest.importorskip("onnxruntime")
    assert tiny("run", "out=r").code == 0
    done = cli("export", "r", "--client", "1,3")
    assert done.code == 0, done.err
    assert sorted(file.name for file in Path("r/export").iterdir()) == [
        f"client-{i}.{end}" for i in (1, 3) for end in ("onnx", "safetensors")
    ]
    assert "fedavg after 2 rounds" in done.out
    again = cli("export", "r", "--client", "3")
    assert (again.code, again.err.count("\n")) == (2, 1)
    assert "client-3.onnx already exists" in again.err


def test_export_of_a_client_that_joined_later(tiny, cli):
    pytest.importorskip("onnxruntime")
    assert tiny("run", "method=fedper", "join.clients=1", "join.turns=1", "out=r").code == 0
    done = cli("export", "r", "--client", "3", "--out", "elsewhere", "--json")
    assert done.code == 0, done.err
    (facts,) = json.loads(done.out)
    assert (facts["client"], facts["file"], facts["own_rows"]) == (3, "elsewhere/client-3.onnx", True)


def test_examples_that_are_not_the_clients_own_are_labelled(cli):
    pytest.importorskip("onnxruntime")
    dealt = {
        "train": [list(range(30)), list(range(30, 60))],
        "test": [list(range(60, 80)), []],
        "common": list(range(80, 120)),
    }
    Path("dealt.json").write_text(json.dumps(dealt))
    words = ("partition=file", "partition.path=dealt.json", "model=mlp", "rounds=1", "engine=sequential", "out=r")
    assert cli("run", *words, "--quiet").code == 0
    done = cli("export", "r", "--client", "1")
    assert "on the client's own test examples (client 1 has none, so on the common test set)." in done.out, done.err
    facts = json.loads(cli("export", "r", "--client", "1", "--out", "e", "--json").out)
    assert [one["own_rows"] for one in facts] == [False]


MISTAKES = {
    "export": "give the folder of a run",
    "export nowhere": "nowhere is not a run folder",
    "export r --client 4": "--client 4: '4' is not a client of this run; clients are 0 to 3",
    "export r --client x": "'x' is not a client",
    "export r --client -1": "is not a client",
    "export r --client 1 --all": "--client 1: conflicts with --all",
    "export r --clint 1": "did you mean '--client'?",
    "export unkept": "has no checkpoint",
    "cost --gflops fast": "--gflops fast: must be a number above 0",
    "cost --memory 0": "--memory 0: must be a number above 0",
    "cost --network 5g": "network=5g: must be a known network",
    "cost method=fedrri": "(did you mean 'fedrir'?)",
    "report r network=5g": "network=5g: must be a known network",
    "report r network=1/2": "UP/DOWN/LATENCY",
    "report r target=90": "target=90: needs a network, such as network=4g",
    "report r network=4g target=900": "target=900: must be a number above 0 and at most 100",
    "report r network=4g slowdown=-1": "slowdown=-1: must be a number above 0",
    "report r network=4g slowdown=2 gflops=2": "conflicts with slowdown=2; use one of them",
    "report r netwrk=4g": "(did you mean 'network'?)",
}


def test_mistakes_end_in_one_line(tiny, cli):
    pytest.importorskip("onnxruntime")
    tiny("run", "out=r", "--quiet")
    tiny("run", "out=unkept", "checkpoint_every=0", "--quiet")
    for words, message in MISTAKES.items():
        result = cli(*words.split())
        assert (result.code, result.err.count("\n")) == (2, 1), (words, result.err)
        assert message in result.err, words


def test_cost_of_a_turn(tiny):
    """Compare with two hidden layers computed by hand. Memory is measured in a process that has imported little besides torch.

    This process ignores files with the same names as modules, and the output of methods.
    """
    Path("random.py").write_text("raise ImportError('not yours')\n")
    Path("own.py").write_text(
        "from dataclasses import dataclass\nfrom fedloom import Method\nprint('hello')\n"
        "@dataclass(frozen=True)\nclass Mine(Method):\n    pass\n"
    )
    words = ("method=own.py:Mine", "partition=iid", "--network", "8/8/0", "--memory", "0.001", "--json")
    done = tiny("cost", *words)
    assert done.code == 0, done.err
    (facts,) = json.loads(done.out.removeprefix("hello\n"))
    assert (facts["method"], facts["model"]) == ("own.py:Mine", "mlp")
    rows = facts["rows"]
    (phase,) = facts["phases"]
    assert phase["flops"] == rows * (4 * 64 * 8 + 6 * 8 * 10)
    assert phase["seconds"] > 0
    assert facts["parameters"] == facts["parameters_sent"] == 64 * 8 + 8 + 8 * 10 + 10
    assert facts["uplink_bytes"] == facts["downlink_bytes"] > 4 * facts["parameters"]
    assert facts["network_seconds"]["8/8/0"] == pytest.approx(2 * facts["uplink_bytes"] / 1e6)
    assert 50e6 < facts["program_bytes"] < facts["process_bytes"] < 4e9
    assert facts["fits"] is False


def test_cost_shows_every_architecture(tiny):
    shown = tiny("cost", "method=fedvtc", "models=mlp,logistic", "model=mlp", "width=16")
    assert shown.code == 0, shown.err
    for words in ("fedvtc, mlp on digits", "fedvtc, logistic on digits", "generator", "finetune", "fits 1 GB"):
        assert words in shown.out


def test_report_shows_the_time_on_networks(tiny, cli):
    tiny("run", "out=r", "--quiet")
    shown = cli("report", "r", "network=4g,2/10/80", "slowdown=20", "target=1")
    assert shown.code == 0, shown.err
    assert "Time to 1.0 % personal accuracy" in shown.out
    assert "2/10/80 2 Mbit/s up, 10 down, 80 ms" in " ".join(shown.out.split())
    assert "over time, 4g" in Path("r/report.html").read_text()
