"""The kill matrix: which program fails, how and when, and the consequences. docs/deployment.md records the results."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from federation import values

from fedloom import tree
from fedloom.config.settings import make_settings
from fedloom.deploy.grid import GridLink
from fedloom.deploy.local import local_federation
from fedloom.deploy.running import prepare, resume_deployed
from fedloom.deploy.services import end_group
from fedloom.experiment.loop import Experiment
from small import losing

pytestmark = pytest.mark.deploy
METHOD = str(Path(__file__).with_name("faulty.py"))
DEADLINE_S = 45.0


@pytest.fixture
def federation(tmp_path):
    """Create three nodes with two clients each. A round has a short deadline."""
    chosen = values(method=f"{METHOD}:Faulty")
    with local_federation(chosen, 3, tmp_path / "federation") as found:
        file = found.deployment.file.model_copy(update={"deadline_s": DEADLINE_S})
        found.deployment.file = file
        yield found


def run(federation, folder, rounds, on_round=None, path=None, **settings):
    """Run one experiment. Return it and its messages."""
    said = []
    link = GridLink(federation.deployment, said.append)
    try:
        experiment = (
            resume_deployed(federation.deployment, path, link, said.append)
            if path
            else prepare(
                federation.deployment,
                values(method=f"{METHOD}:Faulty", rounds=rounds, **settings) | {"out": str(folder)},
                link,
                said.append,
            )
        )
    except BaseException:
        link.close()
        raise
    experiment.run(on_round)
    return experiment, said


def sequential(folder, rounds):
    """Return the same run on the sequential engine, before it is run."""
    chosen = values(method=f"{METHOD}:Faulty", rounds=rounds) | {"out": str(folder), "engine": {"name": "sequential"}}
    return Experiment(make_settings(chosen))


def expected(folder, rounds, lost, rejected=None):
    """Run the sequential engine with some clients' local updates undone. Updates of rejected clients are kept but do not count."""
    experiment = losing(sequential(folder, rounds), lost, rejected)
    experiment.run()
    return experiment


def expected_late(folder, rounds, clients, sent, landed):
    """Run the sequential engine with some clients' replies of round `sent` delayed until round `landed`."""
    experiment = sequential(folder, rounds)
    engine, train, held = experiment.engine, experiment.engine.train, []

    def late(number, cohort, down):
        replies = train(number, cohort, down)
        if number == sent:
            held.extend(reply for reply in replies if reply.client in clients)
            return [reply for reply in replies if reply.client not in clients]
        if number == landed:
            replies += held
            held.clear()
        return replies

    engine.train, engine.busy = late, lambda: frozenset(reply.client for reply in held)
    experiment.run()
    return experiment


def has(said, pattern):
    return any(re.search(pattern, line) for line in said)


def test_clients_that_raise_die_hang_or_answer_wrongly_lose_their_round_alone(federation, tmp_path):
    code = federation.deployment.path / "node-2/code/faulty.py"
    faults = {1: "raises", 2: "dies", 3: "foreign", 4: "hangs"}
    code.write_text(code.read_text().replace("FAULTS: dict[int, str] = {}", f"FAULTS: dict[int, str] = {faults}"))
    experiment, said = run(federation, tmp_path / "run", 6)
    print("\n".join(said))
    assert has(said, r"node-2: round 2, client 4: ValueError: the disk is full")
    assert has(said, r"node-2: the worker ended during the request \(exit code 3\)")
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    rejected = [event for event in events if event["event"] == "rejected"]
    assert [(event["round"], event["clients"]) for event in rejected] == [(4, [4]), (4, [5])]
    assert all("the message lacks 'weights/params" in event["reason"] for event in rejected)
    assert has(said, r"node-2: (the worker did not answer within 45 s and was replaced|no answer within 45 s)")
    assert [row["cohort"] for row in experiment.rows] == [6, 4, 4, 4, 4, 6]
    same = expected(tmp_path / "expected", 6, dict.fromkeys((1, 2, 4), (4, 5)), {3: (4, 5)})
    assert tree.equal(experiment.server, same.server)


def test_a_late_node_is_aggregated_in_a_later_round(federation, tmp_path):
    """Node 2 takes a minute for its local updates in round 2.

    Rounds of 45 s go on without it and do not ask it again before it answers.
    """
    code = federation.deployment.path / "node-2/code/faulty.py"
    code.write_text(code.read_text().replace("FAULTS: dict[int, str] = {}", "FAULTS: dict[int, str] = {1: 'dawdles'}"))
    settings = {"devices.stragglers": "late", "eval_every": 16}
    experiment, said = run(federation, tmp_path / "run", 16, **settings)
    print("\n".join(said))
    assert [line for line in said if "waiting" not in line] == ["node-2: not finished after 45 s"]
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    late, *busy, landed = events
    assert (late["round"], late["event"], late["clients"]) == (2, "late", [4, 5])
    assert [event["event"] for event in busy] == ["busy"] * (landed["round"] - 2)
    assert (landed["event"], landed["clients"], landed["sent"]) == ("landed", [4, 5], [2, 2])
    assert 2 < landed["round"] < 16
    same = expected_late(tmp_path / "expected", 16, (4, 5), 1, landed["round"] - 1)
    assert tree.equal(experiment.server, same.server)


def kill_group(process):
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("what", ["node", "supernode"])
def test_a_killed_node_loses_its_rounds_and_comes_back_with_its_state(federation, tmp_path, what):
    """The node is killed in the middle of a round and restarted immediately.

    The SuperLink accepts the node when its old connection has expired.
    """

    def kill():
        if what == "node":
            kill_group(federation.processes["node-1"])
        else:  # the agent restarts it
            kill_program(b"supernode.py", federation.deployment.path / "node-1")

    def fault(done, rounds, row):
        if done == 1:
            threading.Timer(1.0, kill).start()
        if done == 2 and what == "node":
            federation.start_node("node-1")

    experiment, said = run(federation, tmp_path / "run", 14, fault)
    print("\n".join(said))
    cohorts = [row["cohort"] for row in experiment.rows]
    assert cohorts[0] == 6
    assert min(cohorts) == 4
    assert cohorts[-1] == 6, cohorts
    lost = {number: (2, 3) for number, cohort in enumerate(cohorts) if cohort == 4}
    assert tree.equal(experiment.server, expected(tmp_path / "expected", 14, lost).server)


def kill_program(program, folder):
    """Send SIGKILL to the one program whose command contains a word and a folder."""
    found = [
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and program in (command := _command(entry)) and str(folder).encode() in command
    ]
    assert found, program
    for number in found:
        os.kill(number, signal.SIGKILL)


def without_those_who_did_not_come(experiment, folder):
    """Run the sequential engine with the same clients lost in the same rounds."""
    came = {(row["round"] - 1, row["client"]) for row in experiment.client_rows if row.get("examples", 0) > 0}
    rounds = experiment.settings.rounds
    lost = {number: tuple(i for i in range(6) if (number, i) not in came) for number in range(rounds)}
    return expected(folder, rounds, lost)


def test_a_killed_superlink_is_waited_for_and_the_run_ends_as_if_nothing_had_been(federation, tmp_path):
    def fault(done, rounds, row):
        if done == 1:
            kill_program(b"flower-superlink", federation.deployment.server)

    experiment, said = run(federation, tmp_path / "run", 3, fault)
    print("\n".join(said))
    assert "flower-superlink ended (exit code -9" in federation.log("server")
    assert [row["cohort"] for row in experiment.rows] == [6, 6, 6], said
    assert tree.equal(experiment.server, expected(tmp_path / "expected", 3, {}).server)


def test_programs_that_are_killed_in_the_middle_of_a_round_come_back(federation, tmp_path):
    """Kill the proxy in round 2, the SuperLink in round 4 and a worker in round 6. Every node that lost its round returns."""
    own, node = federation.deployment.server, federation.deployment.path / "node-1"
    worker = f"deploy\0node\0{node}".encode()  # agent and worker have the same command: the worker is the agent's child

    def kill_worker():
        agent = federation.processes["node-1"].pid
        below = [int(p) for p in Path(f"/proc/{agent}/task/{agent}/children").read_text().split()]
        (number,) = [p for p in below if worker in _command(Path(f"/proc/{p}"))]
        os.kill(number, signal.SIGKILL)

    faults = {
        1: lambda: kill_program(b"fedloom.deploy.proxy", own),
        3: lambda: kill_program(b"flower-superlink", own),
        5: kill_worker,
    }

    def fault(done, rounds, row):
        if done in faults:
            threading.Timer(1.0, faults[done]).start()

    experiment, said = run(federation, tmp_path / "run", 8, fault)
    print("\n".join(said), federation.log("server"), [row["cohort"] for row in experiment.rows])
    for program in ("proxy", "flower-superlink"):
        assert f"{program} ended (exit code -9" in federation.log("server")
    assert experiment.rows[-1]["cohort"] == 6, said
    assert tree.equal(experiment.server, without_those_who_did_not_come(experiment, tmp_path / "expected").server)


@pytest.mark.parametrize("end", [kill_group, end_group], ids=["killed", "stopped"])
def test_a_server_that_is_away_for_long_is_waited_for(federation, tmp_path, end):
    """End the SuperLink and the proxy together, and restart them after half a minute. The Flower run is lost, but fedloom's run continues.

    A server that is stopped deletes its database, so all nodes have to register again.
    """
    away = []

    def fault(done, rounds, row):
        if done == 1:
            end(federation.processes["server"])
            time.sleep(1)  # until its leashed children have ended
            assert (federation.deployment.server / "superlink.db").is_file() == (end is kill_group)
            server = f"{sys.executable} -m fedloom.cli deploy server {federation.deployment.path}"
            away.append(subprocess.Popen(["sh", "-c", f"sleep 30; exec {server}"], start_new_session=True))

    try:
        experiment, said = run(federation, tmp_path / "run", 3, fault)
    finally:
        for process in away:
            end_group(process)
    print("\n".join(said))
    assert has(said, "the SuperLink is not reachable")
    assert experiment.rows[-1]["cohort"] == 6, said
    assert tree.equal(experiment.server, without_those_who_did_not_come(experiment, tmp_path / "expected").server)


def _command(entry):
    try:
        return (entry / "cmdline").read_bytes()
    except OSError:
        return b""


def test_a_killed_run_is_resumed_from_its_checkpoint(federation, tmp_path):
    words = [f"{k}={v}" for k, v in {"rounds": 4, "out": tmp_path / "run"}.items()]
    process = subprocess.Popen(
        [sys.executable, "-m", "fedloom.cli", "deploy", "run", str(federation.deployment.path), *words],
        start_new_session=True,
    )
    metrics, until = tmp_path / "run/metrics.jsonl", time.monotonic() + 240
    while time.monotonic() < until and not (metrics.is_file() and len(metrics.read_text().splitlines()) >= 2):
        time.sleep(0.2)
    kill_group(process)
    assert len(metrics.read_text().splitlines()) in (2, 3)
    experiment, said = run(federation, None, 4, path=tmp_path / "run")
    print("\n".join(said))
    assert experiment.done == 4
    assert tree.equal(experiment.server, expected(tmp_path / "expected", 4, {}).server)
