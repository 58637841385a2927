"""`fedloom.tools.check`: its findings for methods that break a rule, and for methods that break none."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedloom.errors import ConfigError
from fedloom.tools.check import check_method, methods_in

HEADER = """
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fedloom import Method

SEEN = []


@dataclass(frozen=True)
class Own(Method):
"""
LOSS = "    def loss(self, nets, batch, down, memory):\n"
CLASS, CONTRACT, NORMALISED, BYTES, RESUMED, ORDER, MAPPED = range(7)


@pytest.fixture
def check(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(body: str):
        Path("own.py").write_text(HEADER + body)
        return check_method("own.py:Own")

    return run


@pytest.mark.parametrize("name", ["fedavg", "fedrir", "scaffold"])
def test_registered_methods_keep_every_rule(name):
    assert [finding.kept for finding in check_method(name)] == [True] * 7


def test_one_client_with_all_examples_cannot_be_vectorised():
    assert check_method("centralised")[MAPPED].kept is None


def test_memory_outside_of_the_method_is_found(check):
    found = check(
        LOSS + "        SEEN.append(1)\n        return F.cross_entropy(nets.model(batch.x), batch.y) / len(SEEN)\n"
    )
    assert [found[rule].kept for rule in (BYTES, RESUMED, ORDER)] == [False] * 3
    assert "may keep state outside of memory and server" in found[RESUMED].note


def test_a_downlink_that_is_changed_in_place_is_found(check):
    found = check(
        "    def uplink(self, client, received, down, turn):\n"
        "        next(iter(down['weights']['params'].values())).add_(1)\n"
        "        return super().uplink(client, received, down, turn)\n"
    )
    assert found[-1].kept is False
    assert "in place; its inputs are read-only" in found[CONTRACT].note


def test_a_private_net_in_the_uplink_is_found(check):
    found = check(
        "    shared = ('model:body',)\n"
        "    def uplink(self, client, received, down, turn):\n"
        "        return {'weights': client.weights}, client.memory\n"
    )
    assert "model.head" in found[CONTRACT].note


def test_a_crash_names_the_line(check):
    found = check(LOSS + "        return 1 / 0\n")
    assert len(found) == 2
    assert "ZeroDivisionError: division by zero (own.py:15, in loss; in phase 'train'" in found[CONTRACT].note


def test_a_forgotten_decorator_is_found(check, tmp_path):
    check("    pass\n")
    Path("bare.py").write_text("from fedloom import Method\nclass Own(Method):\n    mu: float = 0.1\n")
    (found,) = check_method("bare.py:Own")
    assert found.note == "'mu' is not a hyper-parameter: put @dataclass(frozen=True) above Own"


def test_a_hyper_parameter_without_default_is_found(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(
        "from dataclasses import dataclass, field\nfrom fedloom import Method\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Own(Method):\n    mu: float\n"
    )
    (found,) = check_method(f"{file}:Own")
    assert found.kept is False
    assert "mu" in found.note


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("-(F.one_hot(batch.y, 10) * nets.model(batch.x).log_softmax(1)).mean()", "torch.arange"),
        ("nets.model(batch.x).mean() * batch.x.mean().item()", ".item()"),
        ("nets.model(batch.x)[batch.y >= 0].mean()", "boolean indexing"),
        ("(nets.model(batch.x) * torch.randn(10)).mean()", "`draw`"),
    ],
)
def test_why_a_loss_cannot_be_mapped(check, line, reason):
    found = check(f"{LOSS}        return {line}\n")
    assert [finding.kept for finding in found] == [True] * 6 + [None]
    assert found[MAPPED].note.startswith("runs, but is never vectorised: phase 'train'")
    assert reason in found[MAPPED].note
    assert "own.py:15" in found[MAPPED].note


def test_the_methods_of_a_file(tmp_path):
    file = tmp_path / "own.py"
    file.write_text("from fedloom import FedAvg, Method\nclass A(Method): pass\nclass B(FedAvg): pass\n")
    assert methods_in(str(file)) == [f"{file}:A", f"{file}:B"]
    assert methods_in("fedavg") == ["fedavg"]
    file.write_text("from fedloom import FedAvg\n")
    with pytest.raises(ConfigError, match="defines no class"):
        methods_in(str(file))
    with pytest.raises(ConfigError, match=r"^check=none\.py: there is no file none\.py$"):
        methods_in("none.py")


MISTAKES = {
    "a list in memory": (
        "    def init_memory(self, weights, task, data):\n        return {'seen': []}\n",
        "Own.init_memory: 'seen' is a list; use a tensor of fixed shape",
    ),
    "a number in the uplink": (
        "    def uplink(self, client, received, down, turn):\n"
        "        up, memory = super().uplink(client, received, down, turn)\n"
        "        return {**up, 'n': turn.examples}, memory\n",
        "Own.uplink: in the uplink, 'n' is an int; use a tensor",
    ),
    "a number on the server": (
        "    def init_server(self, weights, task, round):\n"
        "        return {**super().init_server(weights, task, round), 'count': 0}\n",
        "Own.init_server: 'count' is an int; use a tensor",
    ),
    "a key that the server loses": (
        "    def init_server(self, weights, task, round):\n"
        "        return {**super().init_server(weights, task, round), 'h': torch.zeros(2)}\n",
        "changes the server's structure: 'h' is missing, but was (2,) float64; return every tensor of init_server",
    ),
    "weights of another shape": (
        "    def aggregate(self, server, uplinks, round):\n"
        "        new = super().aggregate(server, uplinks, round)\n"
        "        params = {name: value[:3] for name, value in new['weights']['params'].items()}\n"
        "        return {'weights': {**new['weights'], 'params': params}}\n",
        "changes the server's structure: 'weights/params/model.body.linear.weight' is (3, 64) float64, but was (16, 64)",
    ),
    "no predictor": (
        "    shared = ('body', 'head')\n\n"
        "    def nets(self, arch, task):\n        return {'body': arch.body(), 'head': arch.head()}\n\n"
        "    def phases(self):\n        return ()\n",
        "the method has nets body, head and no 'model'; override `predictors`",
    ),
    "a missing memory": (
        LOSS + "        return F.cross_entropy(nets.model(batch.x), batch.y) + memory['previous']\n",
        "KeyError: 'previous' is missing; a hook must return every key that other hooks read",
    ),
    "a wrong signature": (
        "    def loss(self, nets, batch):\n        return F.cross_entropy(nets.model(batch.x), batch.y)\n",
        "docs/contract.md describes all hooks",
    ),
    "state on the method": (
        "    def aggregate(self, server, uplinks, round):\n        self.last = server\n        return server\n",
        "a method holds hyper-parameters only, so keep state in memory (client) or in the server's tree",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_with_its_remedy(check, mistake):
    body, words = MISTAKES[mistake]
    finding = check(body)[CONTRACT]
    assert finding.kept is False
    assert words in finding.note


def test_a_shared_pattern_without_its_comma_is_named(check):
    finding = check("    shared = ('model:body')\n")[CLASS]
    assert "Own.shared is a string; write a tuple, with a comma: ('model:body',)" in finding.note
