"""The Ray engine from the command line: a method from a user's file, Ctrl-C, no remaining processes, and clear errors."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from fedloom import tree
from fedloom.config.parsing import from_words
from fedloom.config.settings import make_settings
from fedloom.experiment.loop import Experiment
from small import losing

OWN = """\
from dataclasses import dataclass

from fedloom import Method, losses


@dataclass(frozen=True)
class Mine(Method):
    def loss(self, nets, batch, down, memory):
        return soft(losses.cross_entropy(nets.model(batch.x), batch.y))


def soft(loss):
    return loss.exp().log1p()
"""
WORDS = ("clients=4", "model=mlp", "model.hidden=8", "data.rows=200", "engine.threads=1", "checkpoint_every=1")
needs_ray = pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="Ray is not installed (pip install ray)")


def carriers(mark: str) -> dict[int, str]:
    """Return the numbers and commands of the processes with `mark` in their environment, and of their children."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found[int(folder.name)] = (folder / "cmdline").read_text()[:80]
        except OSError:  # it has ended
            continue
    return found


@needs_ray
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_an_interrupted_run_leaves_nothing_running_and_resumes(cli):
    Path("own.py").write_text(OWN)
    mark = uuid.uuid4().hex
    words = ("method=own.py:Mine", *WORDS, "rounds=5000", "engine=ray", "engine.workers=2", "out=cut")
    stopped = subprocess.Popen(
        [sys.executable, "-m", "fedloom.cli", "run", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "FEDLOOM_TEST": mark},
        start_new_session=True,
    )
    patience = time.monotonic() + 120
    while not Path("cut/checkpoint").exists() and stopped.poll() is None and time.monotonic() < patience:
        time.sleep(0.05)
    os.killpg(stopped.pid, signal.SIGINT)  # as a terminal does
    out, err = stopped.communicate(timeout=60)
    assert stopped.returncode == 130, err
    assert err.splitlines()[-1] == "fedloom: interrupted; continue with: fedloom run --resume cut"
    assert out == ""
    patience = time.monotonic() + 20
    while carriers(mark) and time.monotonic() < patience:
        time.sleep(0.2)
    assert carriers(mark) == {}
    config, state = Path("cut/config.toml"), Path("cut/checkpoint/state.json")
    n = json.loads(state.read_text())["round"] + 1
    config.write_text(
        config.read_text().replace("rounds = 5000", f"rounds = {n}").replace('name = "ray"', 'name = "sequential"')
    )
    assert cli("run", "--resume", "cut", "--accept-changes", "--quiet").code == 0
    assert (
        cli("run", "method=own.py:Mine", *WORDS, f"rounds={n}", "engine=sequential", "out=whole", "--quiet").code == 0
    )
    last = [json.loads(Path(folder, "metrics.jsonl").read_text().splitlines()[-1]) for folder in ("cut", "whole")]
    for key in ("train.loss", "server_accuracy", "personal_accuracy", "uplink_bytes"):
        assert last[0][key] == last[1][key]


@needs_ray
def test_a_missing_cluster_is_a_one_line_error(cli):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    for where in (address, f"ray://{address}"):
        done = cli("run", "engine=ray", f"engine.address={where}", *WORDS)
        assert done.err.startswith(f"fedloom: error: engine.address={where}: no Ray cluster can be joined there: ")
        assert done.err.count("\n") == 1
        assert done.code == 2
    assert not Path("runs").exists()


def test_without_ray_one_line_says_what_to_install(cli, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("fedloom.engines.ray.engine")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)
    done = cli("run", "engine=ray", *WORDS)
    assert done.err == "fedloom: error: engine=ray: Ray is not installed; pip install 'fedloom[ray]'\n"
    assert done.code == 2


@contextmanager
def machine(mark: str, *words: str) -> Iterator[None]:
    """Run `ray start` with one core. All its processes carry the mark and are killed at the end."""
    environment = {**os.environ, "FEDLOOM_TEST": mark}
    command = [str(Path(sys.executable).with_name("ray")), "start", "--num-cpus=1", "--block", *words]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        lose(mark)
        process.wait()


def lose(mark: str) -> None:
    """Send SIGKILL to a machine's processes until there are none."""
    while found := carriers(mark):
        for number in found:
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        time.sleep(0.1)


@needs_ray
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_machine_that_is_lost_costs_its_clients_a_round(cli, monkeypatch):
    """Two Ray nodes have one worker each, and one node is killed. The other node then runs the updates of both."""
    access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex, "RAY_USAGE_STATS_ENABLED": "0"}
    for name, value in access.items():
        monkeypatch.setenv(name, value)
    marks = uuid.uuid4().hex, uuid.uuid4().hex
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    words = (*WORDS, "method=fedper", "rounds=200", "eval_every=200")  # losing a worker while scoring loses no clients
    on_ray = ("engine=ray", f"engine.address={address}", "engine.workers=2")
    head = ("--head", f"--port={address.partition(':')[2]}", "--node-ip-address=127.0.0.1", "--include-dashboard=false")
    with machine(marks[0], *head), machine(marks[1], f"--address={address}"):
        run = subprocess.Popen(
            [sys.executable, "-m", "fedloom.cli", "run", *words, *on_ray, "out=lost"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        state, patience = Path("lost/checkpoint/state.json"), time.monotonic() + 240
        while run.poll() is None and time.monotonic() < patience:
            with suppress(OSError, ValueError):  # not there yet, or being replaced
                if json.loads(state.read_text())["round"] >= 3:
                    break
            time.sleep(0.05)
        lose(marks[1])
        _, err = run.communicate(timeout=180)
    assert run.returncode == 0, err
    assert "its process or its machine is gone" in err
    lost = {event["round"] - 1: event["clients"] for event in events("lost")}
    assert len(lost) == 1, lost
    assert len({i % 2 for clients in lost.values() for i in clients}) == 1, "those of one worker"
    calm = losing(Experiment(make_settings(from_words([*words, "engine=sequential", "out=calm"]))), lost)
    calm.run()
    assert tree.equal(Experiment.reopen("lost").server, calm.server)


def events(kind: str) -> list[dict[str, Any]]:
    lines = Path("lost/events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]
