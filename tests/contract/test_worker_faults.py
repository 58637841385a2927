"""Worker processes that hang, die, or run out of memory, and workers whose experiment is killed."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from contract import assert_same, left_by
from fedloom.engines import process_worker
from fedloom.errors import ConfigError, MethodError, WorkerError
from fedloom.methods.scaffold import Scaffold
from small import losing

SETTINGS = {"clients": 5, "cohort": 4, "rounds": 3}
WORKERS = {"engine": "processes", "engine.workers": 2}


@dataclass(frozen=True)
class Faulty(Scaffold):
    """SCAFFOLD that fails in round 1 (the second round), when client 2 has trained."""

    how: str = ""

    def uplink(self, client, received, down, turn):
        found = super().uplink(client, received, down, turn)
        if self.how and turn.number == 1 and turn.examples == CLIENT_2:
            FAULTS[self.how]()
        return found


def sleep():
    time.sleep(300)


def out_of_memory():
    raise MemoryError("no room")


def hang_when_sent():
    """Hang after the client's state is stored and before its reply is sent."""
    process_worker.Slabs.put = lambda *_: sleep()  # in this worker process alone


FAULTS = {
    "hang": sleep,
    "hang when sent": hang_when_sent,
    "memory": out_of_memory,
    "allocation": lambda: torch.empty(10**13),
    "exit": lambda: os._exit(7),
    "sys.exit": lambda: sys.exit(3),
}
CLIENT_2 = 0  # its number of examples, which identifies it


@pytest.fixture(autouse=True)
def client_2(experiment, monkeypatch):
    data = experiment("fedavg", **SETTINGS).data
    sizes = [data.n_train(i) for i in range(5)]
    assert sizes.count(sizes[2]) == 1
    monkeypatch.setattr(sys.modules[__name__], "CLIENT_2", sizes[2])


@pytest.mark.parametrize(
    ("how", "lanes", "deadline_s"),  # for lanes, workers import more in their first round
    [("hang", None, 3), ("hang when sent", None, 3), pytest.param("hang", 2, 20, marks=pytest.mark.slow)],
)
def test_a_client_that_hangs_is_lost_and_the_others_are_not(experiment, caplog, how, lanes, deadline_s):
    """The client's worker is replaced, and the client keeps its state from before the round, as if its device had been lost."""
    settings = {**SETTINGS, **WORKERS, "engine.deadline_s": deadline_s, "engine.lanes": lanes}
    left = left_by(experiment(Faulty(how=how), **settings))
    (said,) = caplog.messages
    found = re.fullmatch(
        r"engine=processes: round 2 continues without clients? ([\d, ]+): no answer in \d+ s \(engine\.deadline_s\)",
        said,
    )
    lost = [int(i) for i in found[1].split(",")]
    assert 2 in lost
    assert len(lost) <= (lanes or 1)
    assert left.rows[1]["lost"] == len(lost)
    reference = experiment(Faulty(), **SETTINGS, **({**WORKERS, "engine.lanes": lanes} if lanes else {}))
    expected = left_by(losing(reference, {1: lost}))
    assert_same(left._replace(turns=[], summary={}), expected._replace(turns=[], summary={}))


def test_a_deadline_that_is_kept_changes_nothing(experiment, caplog):
    one = left_by(experiment(Faulty(), **SETTINGS, **WORKERS, **{"engine.deadline_s": 60}))
    assert_same(one, left_by(experiment(Faulty(), **SETTINGS)))
    assert caplog.messages == []


@dataclass(frozen=True)
class SlowToScore(Scaffold):
    def predictors(self):
        return {"personal": self.predict}

    def predict(self, nets, x, down, memory):
        time.sleep(300)


def test_a_worker_that_hangs_while_it_scores_ends_the_run(experiment):
    run = experiment(SlowToScore(), **SETTINGS, **WORKERS, **{"engine.deadline_s": 1})
    with pytest.raises(
        WorkerError, match=r"a worker scored clients after round 1: no answer in 1 s \(engine.deadline_s\)"
    ):
        run.run()


@pytest.mark.parametrize("engine", ["sequential", "processes"])
@pytest.mark.parametrize("how", ["memory", "allocation"])
def test_short_memory_names_the_client_and_what_helps(experiment, engine, how):
    run = experiment(Faulty(how=how), **{**SETTINGS, **WORKERS, "engine": engine})
    with pytest.raises((MemoryError, RuntimeError)) as caught:
        run.run()
    notes = [note for note in caught.value.__notes__ if "\n" not in note]
    assert notes[-1] == "client 2, round 2"
    assert "out of memory; use a smaller batch_size, fewer engine.workers or fewer engine.lanes" in notes


def test_a_worker_that_ends_names_its_clients(experiment):
    run = experiment(Faulty(how="exit"), **{**SETTINGS, "cohort": 5}, **WORKERS, **{"engine.deadline_s": 60})
    with pytest.raises(
        WorkerError, match=r"while it trained clients? [\d, ]*\b2\b.* in round 2 \(exit code 7; .*batch_size"
    ):
        run.run()


@pytest.mark.parametrize("engine", ["sequential", "processes"])
def test_a_method_cannot_end_python(experiment, engine):
    run = experiment(Faulty(how="sys.exit"), **{**SETTINGS, **WORKERS, "engine": engine})
    with pytest.raises(MethodError, match="client 2, round 2: the method exited Python"):
        run.run()


@pytest.mark.parametrize("engine", ["sequential", "vectorised"])
def test_a_deadline_needs_worker_processes(experiment, engine):
    with pytest.raises(
        ConfigError, match=rf"engine\.deadline_s=5.*: applies only to engine=processes and ray, not engine={engine}"
    ):
        experiment("fedavg", engine=engine, **{"engine.deadline_s": 5})


def test_a_deadline_needs_worker_processes_with_engine_auto_too(experiment):
    with pytest.raises(
        ConfigError, match=r"engine\.deadline_s=5: needs worker processes, but engine=auto is sequential"
    ):
        experiment("fedavg", engine="auto", **{"engine.deadline_s": 5, "engine.workers": 1})


def children(pid):
    found = subprocess.run(["ps", "--ppid", str(pid), "-o", "pid="], capture_output=True, text=True, check=False)
    return [int(each) for each in found.stdout.split()]


def runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize(("sign", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143)])
def test_workers_end_with_their_experiment(tmp_path, sign, code):
    """Workers end even in the middle of a long local update."""
    words = ["model=mlp", "clients=2", "rounds=3", "method.local_epochs=100000", "engine=processes", "engine.workers=2"]
    command = [sys.executable, "-m", "fedloom.cli", "run", *words, f"out={tmp_path / 'run'}", "--quiet"]
    parent = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 60
        while len(workers := children(parent.pid)) < 2 and time.monotonic() < until:
            time.sleep(0.1)
        time.sleep(2)
        workers = children(parent.pid)  # short-lived helpers have ended
        assert len(workers) == 2
        folders = [*Path("/dev/shm").glob(f"fedloom-{parent.pid}-*"), *Path("/tmp").glob(f"fedloom-{parent.pid}-*")]
        assert len(folders) == 1
        parent.send_signal(sign)
        _, err = parent.communicate(timeout=30)
    finally:
        parent.kill()  # a run that a failed test leaves behind takes gigabytes
    assert parent.returncode == code
    assert err.count("\n") == (1 if sign == signal.SIGTERM else 0)
    until = time.monotonic() + 5
    while any(map(runs, workers)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(map(runs, workers))
    assert not folders[0].exists()
