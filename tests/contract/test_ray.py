"""The Ray engine.

A lost or hung worker loses its clients for one round only, errors of a method end the run, and workers receive user code.
"""

import os
import re
import sys
import time
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from contract import Perfed, assert_same, left_by
from fedloom import ConfigError, FedAvg, tree
from fedloom.engines.ray.packing import Packer, unpack
from fedloom.errors import MethodError, WorkerError
from small import losing

ray = pytest.importorskip("ray", reason="Ray is not installed (pip install ray)")

SETTINGS = {"clients": 6, "cohort": 5, "rounds": 3, "data.rows": 200, "model": "mlp", "checkpoint_every": 1}
ON_RAY = {**SETTINGS, "engine": "ray", "engine.workers": 2}


class OwnError(Exception):
    """An error that cannot be reconstructed from its message alone."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def fail() -> None:
    raise OwnError(1, 2)


EVENTS = {
    "kill": lambda: os.kill(os.getpid(), 9),
    "hang": lambda: time.sleep(3600),
    "raise": fail,
    "exit": lambda: sys.exit(3),
}


def happens_once(flag: str, event: str) -> None:
    """Return whether this is the first call, across processes, for `event`."""
    try:
        os.close(os.open(flag, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    EVENTS[event]()


@dataclass(frozen=True)
class Stumbling(Perfed):
    """FedPer in which clients keep a head and its momentum. An event happens to the first worker that trains (or scores)."""

    flag: str = ""
    event: str = "kill"
    at_scoring: bool = False

    def loss(self, nets: Any, batch: Any, down: Any, memory: Any) -> Any:
        if self.flag and not self.at_scoring:
            happens_once(self.flag, self.event)
        return super().loss(nets, batch, down, memory)

    def predictors(self) -> Any:
        return {"personal": self.predict}

    def predict(self, nets: Any, x: Any, down: Any, memory: Any) -> Any:
        if self.flag and self.at_scoring:
            happens_once(self.flag, self.event)
        return nets.model(x)


@dataclass(frozen=True)
class Dying(FedAvg):
    """Ends every worker."""

    def loss(self, nets: Any, batch: Any, down: Any, memory: Any) -> Any:
        os.kill(os.getpid(), 9)


def wait_for(actor):
    """Wait until the worker is ready, including after restarts."""
    ray.get(actor.forget.options(max_task_retries=-1).remote("nobody"), timeout=120)


def pid_of(actor):
    """Return the number of the worker's process."""
    return ray.get(actor.__ray_call__.remote(lambda _: os.getpid()), timeout=120)


def lost_by(caplog):
    """Return the clients that warnings report as lost, by round."""
    found = {}
    for record in caplog.records:
        said = re.match(r"engine=ray: round (\d+) continues without clients? ([\d, ]+): worker", record.getMessage())
        assert said, record.getMessage()
        found.setdefault(int(said[1]) - 1, set()).update(int(i) for i in said[2].split(","))
    return found


@pytest.mark.parametrize("event", ["kill", pytest.param("hang", marks=pytest.mark.slow)])
def test_a_lost_worker_costs_the_round_its_clients_and_nothing_else(experiment, tmp_path, caplog, event):
    flag = str(tmp_path / "flag")
    settings = {**ON_RAY, "engine.deadline_s": 5 if event == "hang" else 300}
    run = experiment(Stumbling(flag=flag, event=event), **settings)
    left, lost = left_by(run), lost_by(caplog)
    assert list(lost) == [0]
    assert len({i % 2 for i in lost[0]}) == 1, "those of one worker"
    assert ("engine.deadline_s" in caplog.text) == (event == "hang")
    assert left.rows[0]["cohort"] == 5 - len(lost[0])
    calm = experiment(Stumbling(), **SETTINGS, engine="sequential")
    expected = left_by(losing(calm, lost))
    assert_same(left._replace(summary={}), expected._replace(summary={}))


@pytest.mark.slow
def test_a_worker_that_dies_between_rounds_costs_one_round_at_most(experiment, workers, caplog):
    run = experiment("fedmr", **ON_RAY)

    def kill(done, rounds, row):
        if done == 1:
            os.kill(pid_of(workers.actors[0]), 9)

    run.run(kill)
    lost = lost_by(caplog)
    assert all(number == 1 and all(i % 2 == 0 for i in clients) for number, clients in lost.items())
    calm = losing(experiment("fedmr", **SETTINGS, engine="sequential"), lost)
    calm.run()
    assert tree.equal(run.server, calm.server)
    for i in range(6):
        assert tree.equal(run.engine.client(i)._asdict(), calm.engine.client(i)._asdict())


@pytest.mark.slow
def test_a_worker_that_starts_anew_unnoticed_is_sent_its_clients(experiment, workers, caplog):
    run = experiment(Stumbling(), **ON_RAY)

    def kill(done, rounds, row):
        if done == 2:
            os.kill(pid_of(workers.actors[1]), 9)
            time.sleep(1)
            wait_for(workers.actors[1])

    whole = experiment(Stumbling(), **SETTINGS, engine="sequential")
    whole.run()
    run.run(kill)
    assert not caplog.records
    for i in range(6):
        assert tree.equal(run.engine.client(i)._asdict(), whole.engine.client(i)._asdict())
    assert run.rows[-1]["personal_accuracy"] == whole.rows[-1]["personal_accuracy"]


def test_scoring_is_done_again_elsewhere(experiment, tmp_path, caplog):
    run = experiment(Stumbling(flag=str(tmp_path / "flag"), at_scoring=True), **ON_RAY)
    left = left_by(run)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "was lost while it scored" in line
    expected = left_by(experiment(Stumbling(), **SETTINGS, engine="sequential"))
    assert_same(left._replace(summary={}), expected._replace(summary={}))


def test_an_error_of_the_method_is_an_error_of_the_run(experiment, tmp_path, caplog):
    run = experiment(Stumbling(flag=str(tmp_path / "flag"), event="raise"), **ON_RAY)
    with pytest.raises(RuntimeError, match="OwnError: 1 and 2") as caught:
        run.run()
    notes = "\n".join(caught.value.__notes__)
    for words in ("round 1", "in phase 'train'", "in happens_once"):
        assert words in notes
    assert not caplog.records


@pytest.mark.slow
def test_a_method_that_exits_ends_the_run_and_no_worker(experiment, workers, tmp_path, caplog):
    run = experiment(Stumbling(flag=str(tmp_path / "flag"), event="exit"), **ON_RAY)
    pids = [pid_of(actor) for actor in workers.actors]
    with pytest.raises(MethodError, match="the method exited Python"):
        run.run()
    assert left_by(experiment(Stumbling(), **ON_RAY)).rows[-1]["cohort"] == 5
    assert [pid_of(actor) for actor in workers.actors] == pids
    assert not caplog.records


@pytest.mark.slow
def test_a_run_that_only_loses_ends(experiment, caplog, monkeypatch):
    monkeypatch.setattr("fedloom.engines.ray.engine.ATTEMPTS", 2)
    run = experiment(Dying(), **{**ON_RAY, "cohort": 1, "rounds": 10, "eval_every": 10})
    with pytest.raises(WorkerError, match="no local update arrived in 2 consecutive rounds"):
        run.run()
    assert len(lost_by(caplog)) == 2


def test_a_method_that_cannot_be_sent_is_a_one_line_error(experiment):
    import threading

    @dataclass(frozen=True)
    class Locked(FedAvg):
        @property
        def lock(self) -> Any:
            return LOCK

    LOCK = threading.Lock()
    with pytest.raises(
        ConfigError,
        match=r"^engine=ray: this method or model cannot be sent to workers: TypeError: cannot pickle .*lock.*$",
    ):
        experiment(Locked(), **ON_RAY)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool, torch.uint8])
def test_trees_of_every_type_come_through_packing(dtype):
    value = {"a": {"x": torch.arange(5).to(dtype), "empty": {}}, "scalar": torch.ones((), dtype=dtype), "none": {}}
    packed = Packer().pack(value)
    packed.data.flags.writeable = False
    again = unpack(ray.cloudpickle.loads(ray.cloudpickle.dumps(packed, protocol=5)))
    assert tree.equal(again, value)
    assert list(again["a"]) == ["x", "empty"]
    assert again["none"] == {}
    again["a"]["x"].zero_()  # our own memory is writable
    assert len(Packer().pack({}).data) == 0
