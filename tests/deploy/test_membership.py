"""The commands of docs/deployment.md, "Joining by request", as a new user runs them: join, admit, kill a node, revoke a node."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from fedloom.deploy.services import end_group, free_ports

pytestmark = pytest.mark.deploy


class Machine:
    """A folder in which commands are run, and the programs that were started in it."""

    def __init__(self, folder):
        self.folder, self.programs = folder, {}

    def run(self, *words, code=0):
        """Run `fedloom deploy` to its end, and return its output by name (the first word of each line)."""
        command = [sys.executable, "-P", "-m", "fedloom.cli", "deploy", *words]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=300, check=False)
        print("$ fedloom deploy", *words, "\n", done.stdout, done.stderr)
        assert done.returncode == code, done.stderr
        self.said = done.stderr
        return {line.split()[0]: line.split(maxsplit=1)[-1] for line in done.stdout.splitlines() if line.strip()}

    def start(self, *words):
        """Start `fedloom deploy` in the background, with its output in a file."""
        with (self.folder / f"{words[0]}-{words[1]}.log").open("ab") as log:
            command = [sys.executable, "-P", "-m", "fedloom.cli", "deploy", *words]
            process = subprocess.Popen(
                command, cwd=self.folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.programs["-".join(words[:2])] = process
        return process

    def log(self, *words):
        return (self.folder / f"{words[0]}-{words[1]}.log").read_text()

    def wait(self, condition, seconds=240.0):
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, {name: self.log(*name.split("-", 1)) for name in self.programs}
            time.sleep(0.3)


@pytest.fixture
def machine(tmp_path):
    made = Machine(tmp_path)
    yield made
    for process in reversed(made.programs.values()):
        process.terminate()
    for process in reversed(made.programs.values()):
        end_group(process)


def edit(file, **values):
    text = file.read_text()
    for key, value in values.items():
        text, n = re.subn(rf"^{key} = .*$", f"{key} = {json.dumps(value)}", text, flags=re.MULTILINE)
        assert n == 1, key
    file.write_text(text)


def join(machine, name, clients, port):
    """Join, admit and start one node."""
    asked = machine.run("join", name)
    admitted = machine.run(
        "admit", "ward", f"{name}/{name}.csr", "--clients", clients, "--fingerprint", asked["fingerprint"]
    )
    machine.run("join", name, "--finish", f"{name}/{name}.join", "--authority", admitted["authority"])
    edit(machine.folder / name / "node.toml", data="config", runtime_port=port)
    machine.start("node", name)


def rows(machine, run):
    file = machine.folder / run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def test_nodes_join_are_admitted_and_one_is_killed_and_one_revoked(machine):
    words = ["method=fedavg", "data.rows=300", "model=mlp", "clients=3", "rounds=14"]
    machine.run("init", "ward", *words, "--nodes", "0")
    proxy, superlink, *ports = free_ports(6)
    edit(machine.folder / "ward/federation.toml", port=proxy, superlink_port=superlink, join_s=90.0)
    machine.start("server", "ward")
    for k in range(3):
        join(machine, f"site-{k}", str(k), ports[k])
        machine.wait(lambda k=k: f"site-{k}: registered" in machine.log("server", "ward"))
    for folder in ("ward", "site-0"):
        open_ = [p for p in (machine.folder / folder).rglob("*") if p.stat().st_mode & 0o077 and "flwr" not in p.parts]
        assert open_ == []

    run = machine.start("run", "ward", "out=run")
    machine.wait(lambda: len(rows(machine, "run")) >= 2)
    os.killpg(machine.programs["node-site-1"].pid, signal.SIGKILL)
    machine.wait(lambda: rows(machine, "run")[-1]["cohort"] == 2)
    assert "site-2 is revoked" in str(machine.run("revoke", "ward", "site-2"))
    machine.wait(lambda: run.poll() is not None)
    print(machine.log("run", "ward"), machine.log("server", "ward"), machine.log("node", "site-2"))
    assert run.returncode == 0
    cohorts = [row["cohort"] for row in rows(machine, "run")]
    assert (cohorts[0], cohorts[-1], sorted(cohorts, reverse=True)) == (3, 1, cohorts)
    assert "site-2: its key is no longer valid" in machine.log("server", "ward")
    assert "site-2 is not online" in machine.log("run", "ward")
    machine.wait(lambda: "its key is not among this federation's keys" in machine.log("node", "site-2"))

    refused = ("admit", "ward", "site-2/again.csr", "--clients", "2")
    again = machine.run("join", "other", "--name", "site-2")
    (machine.folder / "other/site-2.csr").rename(machine.folder / "site-2/again.csr")
    machine.run(*refused, code=2)
    assert again["fingerprint"] in machine.said
    join(machine, "site-3", "2", ports[3])
    machine.wait(lambda: "site-3: registered" in machine.log("server", "ward"))
    machine.run("run", "ward", "out=second", "rounds=2")
    assert "continuing without site-1" in machine.said
    assert [row["cohort"] for row in rows(machine, "second")] == [2, 2]
    actions = [(line["action"], line["node"]) for line in _audit(machine)]
    sites = [("admit", f"site-{k}") for k in range(3)]
    assert actions == [("create", ""), *sites, ("revoke", "site-2"), ("admit", "site-3")]


def _audit(machine):
    assert len(machine.run("audit", "ward")["digest"]) == 32
    return [json.loads(line) for line in (machine.folder / "ward/server/audit.jsonl").read_text().splitlines()]
