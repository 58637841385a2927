"""The Flower engine and its nodes without a network: real workers with real stores, called directly."""

import json
import re
import shutil
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import safetensors.torch
import tomli_w
import torch
from PIL import Image

from clinics import simulated_clinics, write_clinics
from fedloom import tree
from fedloom.config.settings import make_settings
from fedloom.data import load
from fedloom.data.preprocess import Given
from fedloom.deploy import running
from fedloom.deploy.engine import AcceptedUpdates, LostNode
from fedloom.deploy.folder import Deployment, create_deployment
from fedloom.deploy.messages import (
    Assignment,
    Call,
    Hello,
    NodeFailure,
    Present,
    Scored,
    ScoreMessage,
    SentScore,
    Trained,
    TrainMessage,
    Turned,
    open_envelope,
    seal,
)
from fedloom.deploy.rows import read_own
from fedloom.deploy.worker import NodeWorker
from fedloom.errors import ConfigError, DataError, RunFolderError, UsageError, WireError
from fedloom.experiment.arrivals import slowdowns
from fedloom.experiment.build import make_preprocess
from fedloom.experiment.loop import Experiment
from fedloom.inputs import named_tensors
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.registry import METHODS
from fedloom.nets import write_weights
from small import BRIEF, SMALL, brief, changed, losing

DIGITS = {"preprocess": load("digits", rows=10).preprocess().text(indent=None)}

VALUES: dict[str, Any] = {**SMALL, "rounds": 3, "precision": "fp64", "checkpoint_every": 1}
Change = Callable[[str, int, bytes], bytes | LostNode]


class Wire:
    """A link that calls workers directly. `change` may alter an answer: (node, number of its earlier requests, answer).

    `slow` contains the nodes whose answers to training are late: the server looks for such an answer this many times before it arrives.
    """

    def __init__(
        self, deployment: Deployment, change: Change | None = None, slow: Mapping[str, int] | None = None
    ) -> None:
        self.slow, self.under_way = slow or {}, dict[str, tuple[int, bytes | LostNode]]()
        self.workers = {node: NodeWorker(deployment.path / node) for node in deployment.file.nodes}
        self.change = change or (lambda _node, _n, answer: answer)
        self.asked = dict.fromkeys(self.workers, 0)
        self.requests: list[bytes] = []

    def nodes(self) -> list[str]:
        return sorted(self.workers)

    def exchange(
        self, requests: Mapping[str, bytes], deadline_s: float, late_s: float = 0.0
    ) -> dict[str, bytes | LostNode]:
        answers: dict[str, bytes | LostNode] = {}
        for node in reversed(requests):  # in an order that differs from the requests'
            self.requests.append(requests[node])
            if node in self.workers:
                answers[node] = self.change(node, self.asked[node], self.workers[node].answer(requests[node]))
                self.asked[node] += 1
                if late_s and node in self.slow:
                    assert node not in self.under_way, "asked while it was at work"
                    self.under_way[node] = (self.slow[node], answers.pop(node))
        return answers

    def late(self) -> dict[str, bytes | LostNode]:
        there = {node: answer for node, (looks, answer) in self.under_way.items() if not looks}
        self.under_way = {n: (looks - 1, answer) for n, (looks, answer) in self.under_way.items() if n not in there}
        return there

    def close(self) -> None:
        pass


class Ran(NamedTuple):
    """A finished run on workers."""

    experiment: Experiment
    link: Wire
    said: list[str]
    deployment: Deployment


@pytest.fixture(autouse=True)
def types(float64):
    """Restore the default dtype, which workers set for their process."""


def values(**settings: Any) -> dict[str, Any]:
    return changed(VALUES, **settings)


@pytest.fixture
def federation(tmp_path) -> Callable[..., Deployment]:
    """Return a function that creates a federation's folder, with two nodes by default."""

    def make(name: str = "federation", nodes: int = 2, **settings: Any) -> Deployment:
        return create_deployment(tmp_path / name, values(**settings), nodes, demo=True)

    return make


@pytest.fixture
def deployed(tmp_path, federation) -> Callable[..., Ran]:
    """Return a function that runs an experiment on nodes."""

    def make(change: Change | None = None, slow: Mapping[str, int] | None = None, **settings: Any) -> Ran:
        place = federation(f"federation-{len(list(tmp_path.iterdir()))}", **settings)
        said: list[str] = []
        link = Wire(place, change, slow)
        chosen = values(**settings) | {"out": str(tmp_path / f"run-{len(list(tmp_path.iterdir()))}")}
        experiment = running.prepare(place, chosen, link, said.append)
        experiment.run()
        return Ran(experiment, link, said, place)

    return make


known: dict[str, Any] = {}


def once(name: str, make: Callable[[], Any]) -> Any:
    """Return the result of `make`, which is called only once per name."""
    if name not in known:
        known[name] = make()
    return known[name]


@pytest.fixture
def simulated(tmp_path) -> Callable[..., Experiment]:
    """Return a function that creates the same run on the sequential engine."""

    def make(**settings: Any) -> Experiment:
        chosen = values(**settings) | {"engine": {"name": "sequential"}, "out": str(tmp_path / "simulated")}
        experiment = Experiment(make_settings(chosen))
        experiment.run()
        return experiment

    return make


def scores(experiment: Experiment) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in experiment.rows]


CODED = {"uplink": "topk:0.1,int8", "downlink": "fp16"}
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, brief(name)) for name in METHODS if not METHODS[name].pooled),
    ("fedbn", {"model": "fedrir_cnn", "width": 16}),
    ("fedrir", {"model": "fedrir_cnn", "width": 16}),
    ("scaffold", {"schedule.name": "cosine", "schedule.warmup": 1, "eval.valid": 0.2, "stop.patience": 1}),
    ("fedrir", CODED),
    ("fedmr", CODED),
    ("fedper", {"eval": {"fitted": True, "valid": 0.2, "general_every": 2}}),
]


@pytest.mark.parametrize(("method", "settings"), CASES)
def test_devices_give_the_numbers_of_the_sequential_engine(deployed, simulated, method, settings):
    short = {"method": method, "rounds": 2, "data.rows": 100, **settings}
    there, here = deployed(**short), simulated(**short)
    assert tree.equal(there.experiment.server, here.server)
    assert scores(there.experiment) == scores(here)
    assert there.said == []


def test_devices_learn_numbers_as_well_as_classes(deployed, simulated):
    regression = {
        "method": "fedper",
        "data": {"name": "diabetes"},
        "model": "mlp",
        "rounds": 2,
        "eval.general_every": 1,
    }
    there, here = deployed(**regression), simulated(**regression)
    assert tree.equal(there.experiment.server, here.server)
    assert scores(there.experiment) == scores(here)
    assert "personal_rmse" in here.rows[-1]
    assert there.said == []


def test_impossible_sums_of_errors_count_no_examples(deployed):
    def negative(answer: bytes) -> bytes:
        return rescored(answer, lambda score: SentScore(sums=score.sums | {"se": [-1]}))

    ran = deployed(
        lambda node, n, answer: negative(answer) if (node, n) == ("node-1", 4) else answer,
        method="fedper",
        data={"name": "diabetes"},
        model="mlp",
    )
    assert any("impossible counts: a negative sum" in line for line in ran.said), ran.said


def test_architectures_may_differ_and_cohorts_may_be_small(deployed, simulated):
    several = {"method": "fedvtc", "models": ["mlp", "fedrir_cnn"], "width": 16, "cohort": 2, "rounds": 4, **BRIEF}
    there, here = deployed(**several), simulated(**several)
    assert tree.equal(there.experiment.server, here.server)
    assert scores(there.experiment) == scores(here)


def test_members_may_receive_messages_of_different_forms(deployed, simulated):
    """FedKD sends the change of the common model or the whole model, and ranks differ between clients."""
    settings = {"method": "fedkd", "models": "mlp,logistic", "common_model": {"name": "mlp", "hidden": 5}, "cohort": 2}
    there, here = deployed(**settings, rounds=4), simulated(**settings, rounds=4)
    assert tree.equal(there.experiment.server, here.server)
    assert scores(there.experiment) == scores(here)
    assert {"weights", "update"} <= here.ledger.kinds["downlink"].keys()
    assert there.said == []


def test_states_stay_on_their_node(deployed):
    ran = deployed(method="fedper")
    states = {file.parent.name for file in ran.deployment.path.glob("node-0/state/*/*/*.safetensors")}
    assert states == {"client-0", "client-1"}
    assert not list(ran.experiment.folder.path.glob("checkpoint/clients/*"))
    for request in ran.link.requests:
        letter = open_envelope(request)
        assert not any(".head." in path for paths in letter.paths.values() for path in paths)
    with pytest.raises(ConfigError, match="client 3 is on node-1"):
        ran.experiment.engine.client(3)
    with pytest.raises(ConfigError, match="never leaves"):
        ran.experiment.personal_model(0)


def retold(answer: bytes, **facts: Any) -> bytes:
    """Return a node's answer with other facts about every local update."""
    letter = open_envelope(answer)
    turns = [turn.model_copy(update=facts) for turn in letter.header.turns]
    return seal(letter.header.model_copy(update={"turns": turns}), {name: letter.tree(name) for name in letter.trees})


def deepened(answer: bytes) -> bytes:
    """Return a node's answer with a tensor below 40 branches."""
    header = open_envelope(answer).header
    flat = safetensors.torch.save({"/".join("a" * 41): torch.ones(1)}, {"fedloom": "1"})
    parts = [{"name": str(turn.slot), "n_bytes": len(flat), "paths": []} for turn in header.turns]
    text = json.dumps({"header": header.model_dump(), "parts": parts}).encode()
    return b"".join([b"fedloom2", len(text).to_bytes(8, "little"), text, flat * len(parts)])


SPOILT: dict[str, tuple[Callable[[bytes], bytes | LostNode], str]] = {
    "lost": (lambda _: LostNode("no answer within 5 s"), "no answer within 5 s"),
    "cut off": (lambda answer: answer[: len(answer) // 2], "cut off"),
    "foreign": (lambda _: b"\x80\x04K\x01." * 9, "not a fedloom message"),
    "empty": (lambda _: b"", "not a fedloom message"),
    "another kind": (lambda _: seal(Present(clients=[], own_rows=False, counts={}), {}), "unexpected kind"),
    "failed": (lambda _: seal(NodeFailure(reason="out of memory"), {}), "out of memory"),
    "no turns": (lambda _: seal(Trained(turns=[]), {}), "its update is missing"),
    "someone else's": (lambda _: seal(Trained(turns=[Turned(client=0, slot=0, examples=9)]), {}), "not requested"),
    "more rows": (lambda answer: retold(answer, examples=10**6), "it reports 1000000 training examples, but has"),
    "too many rows": (lambda answer: retold(answer, examples=10**7 + 1), "the header is not valid"),
    "no rows": (
        lambda answer: retold(answer, examples=0, logs={"train.own": 1.0}),
        "it reports 0 training examples, but has",
    ),
    "a phase of its own": (lambda answer: retold(answer, phase_seconds={"more": 1.0}), "'more', which is not a phase"),
    "steps of its own": (lambda answer: retold(answer, steps={"more": 1}), "'more', which is not a phase"),
    "a log of its own": (lambda answer: retold(answer, logs={"more.loss": 1.0}), "'more', which is not a phase"),
    "too many logs": (
        lambda answer: retold(answer, logs={f"train.{k}": 1.0 for k in range(101)}),
        "the header is not valid",
    ),
    "too many steps": (lambda answer: retold(answer, steps={"train": 10**30}), "the header is not valid"),
    "more steps than batches": (
        lambda answer: retold(answer, steps={"train": 1000}),
        r"it reports 1000 steps of phase 'train', but at most \d are possible",
    ),
    "more time than there was": (
        lambda answer: retold(answer, seconds=1e300),
        r"it reports 1e\+300 seconds, but the request was sent",
    ),
    "markup in a log's name": (lambda answer: retold(answer, logs={"train.<b>": 1.0}), "the header is not valid"),
    "endless time": (lambda answer: retold(answer, seconds=float("inf")), "the header is not valid"),
    "the run's own numbers": (
        lambda answer: retold(answer, logs={"personal_accuracy": 1.0, "round": 77}),
        "the header is not valid",
    ),
    "too deep": (lambda answer: deepened(answer), "a tensor has 40 branches above it"),
    "no weights": (lambda answer: seal(open_envelope(answer).header, {}), "has no part"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_spoilt_answer_costs_its_clients_part_in_the_round_and_nothing_else(deployed, simulated, tmp_path, how):
    spoil, reason = SPOILT[how]
    # a node's requests: hello, then train and score in turn; 3 is the training of round 2
    ran = deployed(lambda node, n, answer: spoil(answer) if (node, n) == ("node-1", 3) else answer, method="fedper")

    def without_them() -> tuple[Any, list[dict[str, Any]]]:
        chosen = values(method="fedper") | {"engine": {"name": "sequential"}, "out": str(tmp_path / "expected")}
        expected = losing(Experiment(make_settings(chosen)), {1: (2, 3)})
        expected.run()
        return expected.server, scores(expected)

    server, rows = once("without node 1 in round 2", without_them)
    assert tree.equal(ran.experiment.server, server)
    assert scores(ran.experiment) == rows
    assert ran.said
    assert any(re.search(reason, line) for line in ran.said), ran.said
    assert all("node-1" in line for line in ran.said)


def test_uplinks_of_another_form_are_rejected_as_on_every_engine(deployed, simulated):
    """The clients of these uplinks keep what they learnt. The run continues with the other clients."""
    strange = {
        "2": {"weights": {"params": {"model.body.1.weight": torch.ones(3)}}},
        "3": {"weights": {"params": {}}, "more": {"x": torch.ones(2)}},
    }

    def spoil(node, n, answer):
        return seal(open_envelope(answer).header, strange) if (node, n) == ("node-1", 3) else answer

    ran = deployed(spoil, method="fedper")
    assert [row["cohort"] for row in ran.experiment.rows] == [4, 2, 4]
    events = [json.loads(line) for line in (ran.experiment.folder.path / "events.jsonl").read_text().splitlines()]
    assert [(e["round"], e["event"], e["clients"]) for e in events] == [(2, "rejected", [2]), (2, "rejected", [3])]
    assert all("the message lacks 'weights/params/" in event["reason"] for event in events)


def test_hostile_uplinks_are_screened_as_in_a_simulation(deployed, tmp_path):
    """Screening is on by default. The three clients of node 1 are refused three times, and then excluded."""

    def enlarged(uplink):
        return tree.map_tree(lambda leaf: leaf * 1e6, uplink)

    def spoil(node, n, answer):
        letter = open_envelope(answer)
        if node != "node-1" or not isinstance(letter.header, Trained):
            return answer
        return seal(letter.header, {name: enlarged(letter.tree(name)) for name in letter.trees})

    there = deployed(spoil, clients=6, rounds=4)
    chosen = values(clients=6, rounds=4, **{"screen.norm": 10}) | {"engine": {"name": "sequential"}}
    here = Experiment(make_settings(chosen | {"out": str(tmp_path / "here")}))
    train = here.engine.train
    here.engine.train = lambda *asked: [
        replace(reply, uplink=enlarged(reply.uplink), is_finite=False) if reply.client > 2 else reply
        for reply in train(*asked)
    ]
    here.run()
    assert tree.equal(there.experiment.server, here.server)
    assert there.experiment.folder.rows("events.jsonl") == here.folder.rows("events.jsonl")
    assert [row["cohort"] for row in there.experiment.rows] == [3, 3, 3, 3]
    assert there.experiment.folder.summary()["excluded"] == [3, 4, 5]
    trained = [open_envelope(request).header for request in there.link.requests]
    assert {
        m.client for header in trained if header.kind == "train" and header.number == 3 for m in header.members
    } == {0, 1, 2}
    assert there.said == []


def test_a_client_that_diverges_goes_back_as_on_every_engine(deployed, simulated, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import dataclass\nfrom fedloom import FedPer\n\n@dataclass(frozen=True)\nclass Mine(FedPer):\n"
        "    def uplink(self, client, received, down, turn):\n"
        "        found, memory = super().uplink(client, received, down, turn)\n"
        "        sick = turn.number == 1 and turn.examples % 2\n"
        "        params = {n: p * float('nan') if sick else p for n, p in found['weights']['params'].items()}\n"
        "        return {'weights': {**found['weights'], 'params': params}}, memory\n"
    )
    there, here = deployed(method=f"{file}:Mine"), simulated(method=f"{file}:Mine")
    assert 0 < here.rows[-1]["rejected"] < 4
    assert scores(there.experiment) == scores(here)
    assert tree.equal(there.experiment.server, here.server)
    assert there.said == []


def test_a_device_may_leave_out_branches_without_tensors(deployed, simulated):
    """An MLP has no buffers, but the method's own uplink has a branch for them."""

    def cut(node, n, answer):
        letter = open_envelope(answer)
        if (node, n) != ("node-1", 1):
            return answer
        trees = {name: {"weights": {"params": letter.tree(name)["weights"]["params"]}} for name in letter.trees}
        return seal(letter.header, trees)

    assert tree.equal(deployed(cut).experiment.server, simulated().server)


def test_a_client_that_fails_is_reported_and_the_others_continue(deployed, federation, tmp_path, monkeypatch):
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import dataclass\nfrom fedloom import Method\n\n@dataclass(frozen=True)\nclass Mine(Method):\n"
        "    pass\n"
    )
    place = federation(method=f"{file}:Mine")
    broken = place.path / "node-1/code/mine.py"
    broken.write_text(
        file.read_text().replace("    pass\n", "    def loss(self, nets, batch, down, memory):\n        return 1 / 0\n")
    )
    said: list[str] = []
    chosen = values(method=f"{file}:Mine") | {"out": str(tmp_path / "run")}
    experiment = running.prepare(place, chosen, Wire(place), said.append)
    experiment.run()
    assert [row["cohort"] for row in experiment.rows] == [2, 2, 2]
    assert any("client 2" in line and "ZeroDivisionError" in line for line in said)
    monkeypatch.undo()


def test_code_comes_from_the_nodes_own_folder_and_from_nowhere_else(federation, tmp_path):
    place = federation()
    file = tmp_path / "evil.py"
    file.write_text("raise SystemExit('executed')")
    said: list[str] = []
    link = Wire(place)
    link_settings = make_settings(values(method="fedavg"))
    text = running.to_toml(link_settings).replace('name = "fedavg"', f'name = "{file}:Mine"')
    call = {"run": "0" * 16, "config": text, **DIGITS, "deadline_s": 5.0}
    answer = open_envelope(link.workers["node-0"].answer(seal(Hello(call=call), {}))).header
    assert isinstance(answer, NodeFailure)
    assert "code is never received from the server" in answer.reason
    assert said == []


def test_absent_clients_count_no_examples(deployed):
    ran = deployed(lambda node, n, answer: LostNode("gone") if node == "node-1" and n else answer)
    experiment = ran.experiment
    assert [row["cohort"] for row in experiment.rows] == [2, 2, 2]
    x, y = experiment.data.common()
    modules = experiment.problem.modules(0)
    write_weights(modules, experiment.server["weights"])
    right = modules["model"].eval()(x).argmax(1) == y
    n = sum(experiment.data.n_test(i) for i in (0, 1))
    assert n
    assert 0 < n < len(y)
    rows = np.concatenate([experiment.data.partition.test[i] for i in (0, 1)])
    ours = torch.from_numpy(np.isin(experiment.data.partition.common, rows))
    assert experiment.rows[-1]["personal_accuracy"] == pytest.approx(float(right[ours].double().mean()))


def rescored(answer: bytes, change: Callable[[SentScore], SentScore]) -> bytes:
    """Return a node's answer with other counts."""
    header = open_envelope(answer).header
    scores = {i: {name: change(count) for name, count in mine.items()} for i, mine in header.scores.items()}
    return seal(header.model_copy(update={"scores": scores}), {})


SPOILT_SCORES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut off": (lambda answer: answer[: len(answer) // 2], "cut off"),
    "another kind": (lambda _: seal(Trained(turns=[]), {}), "unexpected kind"),
    "failed": (
        lambda _: seal(NodeFailure(reason="out\nof\x1b[31m memory" + 5000 * "!"), {}),
        r"out of \[31m memory!{982}$",
    ),
    "nobody": (lambda _: seal(Scored(scores={}), {}), "its scores are missing"),
    "more right than rows": (
        lambda answer: rescored(answer, lambda s: SentScore(sums=s.sums | {"right": [n + 1 for n in s.sums["rows"]]})),
        "more correct predictions than examples",
    ),
    "too few classes": (
        lambda answer: rescored(answer, lambda s: SentScore(sums={name: v[1:] for name, v in s.sums.items()})),
        "do not have the sums of this learning task",
    ),
    "more rows than there are": (
        lambda answer: rescored(answer, lambda _: SentScore(sums={"right": [10**9] * 10, "rows": [10**9] * 10})),
        "more examples than the client has",
    ),
}


@pytest.mark.parametrize("how", SPOILT_SCORES)
def test_invalid_scores_count_no_examples(deployed, simulated, how):
    """Node 1's scores are invalid in round 2. The accuracy then includes only the examples of the other nodes."""
    spoil, reason = SPOILT_SCORES[how]
    ran = deployed(lambda node, n, answer: spoil(answer) if (node, n) == ("node-1", 4) else answer, method="fedper")

    def lose(node: str, n: int, answer: bytes) -> bytes | LostNode:
        return LostNode("gone") if (node, n) == ("node-1", 4) else answer

    gone = once("node 1 gone when it should score", lambda: scores(deployed(lose, method="fedper").experiment))
    here = once("simulated", lambda: scores(simulated(method="fedper")))
    assert scores(ran.experiment) == gone
    assert [row == other for row, other in zip(gone, here, strict=True)] == [True, False, True]
    assert any(re.search(reason, line) for line in ran.said), ran.said
    assert all("node-1" in line for line in ran.said)


def test_refused_requests_leave_nothing_on_a_node(federation):
    place = federation()
    worker = NodeWorker(place.path / "node-0")
    call = Call(
        run="0" * 16,
        config=running.to_toml(make_settings(values())),
        **DIGITS,
        deadline_s=5.0,
    )
    stranger = [Assignment(client=3, slot=0, base=0, keep=0)]
    refused = {
        r"the header is not valid: .*call\.run": Hello(call=call.model_copy(update={"run": "../../elsewhere"})),
        "client 3 is not on node-0": ScoreMessage(call=call, number=0, members=stranger, questions=[]),
        "'present' is not a request": Present(clients=[], own_rows=False, counts={}),
    }
    for reason, request in refused.items():
        answer = open_envelope(worker.answer(seal(request, {"common": {}}))).header
        assert isinstance(answer, NodeFailure)
        assert re.search(reason, answer.reason), answer.reason
    assert not list(place.path.rglob("*.safetensors"))


def test_too_few_clients_skip_a_round(federation, tmp_path):
    """First, half of the clients are online when more are required; then none until the deadline; then all again."""
    place = federation()
    place.file = place.file.model_copy(update={"deadline_s": 1.0})
    link, said = Wire(place), list[str]()
    chosen = values(rounds=4, min_clients=3) | {"out": str(tmp_path / "run")}
    experiment = running.prepare(place, chosen, link, said.append)
    every = link.workers
    there = {1: {"node-0": every["node-0"]}, 2: {}}

    def leave(done, rounds, row):
        link.workers = there.get(done, every)

    experiment.run(leave)
    assert [row["cohort"] for row in experiment.rows] == [4, 0, 0, 4]
    assert experiment.rows[-1]["skipped"] == 2
    gone = [line for line in said if line.endswith("is not online")]  # in training and in scoring
    assert sorted(gone) == sorted(
        [f"round {n}: {node} is not online" for n, node in ((2, "node-1"), (3, "node-0"), (3, "node-1"))] * 2
    )
    assert np.diff([0, *(row["downlink_bytes"] for row in experiment.rows)]).tolist() == (
        [experiment.rows[0]["downlink_bytes"] // 4 * n for n in (4, 2, 0, 4)]
    )


@pytest.mark.parametrize("rule", ["wait", "drop", "partial", "late"])
def test_simulated_stragglers_are_those_of_the_sequential_engine(deployed, simulated, rule):
    devices = {"devices.slow": 0.5, "devices.slowdown": 3.0, "devices.dropout": 0.2, "devices.stragglers": rule}
    there, here = deployed(rounds=5, **devices), simulated(rounds=5, **devices)
    assert tree.equal(there.experiment.server, here.server)
    assert scores(there.experiment) == scores(here)
    assert here.rows[-1]["late"] or rule in ("wait", "partial")


LATE = {"devices.stragglers": "late", "rounds": 8}


def events(experiment: Experiment, *kinds: str) -> list[dict[str, Any]]:
    return [event for event in experiment.folder.rows("events.jsonl") if event["event"] in kinds]


@pytest.mark.parametrize("method", ["fedavg", "fedper"])
def test_a_node_that_really_is_late_counts_as_the_simulated_one(deployed, simulated, method):
    """Node 1's answers arrive two rounds late, like those of clients 2 and 3 in the simulation."""
    slow = {"devices.slow": 0.5, "devices.slowdown": 3.0}
    seed = next(
        s for s in range(99) if slowdowns(make_settings(values(seed=s, **slow)), FedAvg(), 4) == (1.0, 1.0, 3.0, 3.0)
    )
    there = deployed(slow={"node-1": 2}, method=method, seed=seed, **LATE)
    here = simulated(method=method, seed=seed, **slow, **LATE)
    assert tree.equal(there.experiment.server, here.server)
    assert events(there.experiment, "busy", "landed") == events(here, "busy", "landed")
    assert [row["cohort"] for row in there.experiment.rows] == [2, 2, 4, 2, 2, 4, 2, 2]
    assert {event["reason"] for event in events(there.experiment, "late")} == {"still at work"}
    assert there.experiment.rows[-1]["late"] == here.rows[-1]["late"] == 6
    assert set(there.said) == {"node-1: not finished after 600 s"}


def test_a_round_without_free_clients_waits_for_late_ones(deployed):
    ran = deployed(slow={"node-0": 2, "node-1": 3}, **{**LATE, "rounds": 4})
    assert [row["cohort"] for row in ran.experiment.rows] == [0, 2, 2, 0]
    landed = [(event["round"], event["clients"], event["sent"]) for event in events(ran.experiment, "landed")]
    assert landed == [(2, [0, 1], [1, 1]), (3, [2, 3], [1, 1])]


def test_an_answer_at_the_last_moment_is_not_late(deployed, simulated):
    there, here = deployed(slow={"node-1": 0}, **LATE), simulated(**LATE)
    assert tree.equal(there.experiment.server, here.server)
    assert there.experiment.rows[-1]["late"] == 0


@pytest.mark.parametrize("how", ["lost", "cut off", "failed"])
def test_a_late_answer_that_never_arrives_is_undone(deployed, tmp_path, how):
    spoil, reason = SPOILT[how]
    ran = deployed(
        lambda node, n, answer: spoil(answer) if (node, n) == ("node-1", 1) else answer,
        slow={"node-1": 1},
        method="fedper",
        **{**LATE, "rounds": 2},
    )
    chosen = values(method="fedper", rounds=2) | {"engine": {"name": "sequential"}, "out": str(tmp_path / "expected")}
    expected = losing(Experiment(make_settings(chosen)), {0: (2, 3), 1: (2, 3)})
    expected.run()
    assert tree.equal(ran.experiment.server, expected.server)
    (event,) = events(ran.experiment, "lost")
    assert (event["round"], event["clients"]) == (2, [2, 3])
    assert any(re.search(reason, line) for line in ran.said)
    assert ran.experiment.engine.busy() == frozenset()


def test_local_updates_in_progress_are_undone_by_resuming(federation, tmp_path):
    place, said = federation(method="fedper"), list[str]()
    chosen = values(method="fedper", **{**LATE, "rounds": 4}) | {"out": str(tmp_path / "run")}

    def interrupt(done, rounds, row):
        if done == 2:
            raise StopError

    with pytest.raises(StopError):
        running.prepare(place, chosen, Wire(place, slow={"node-1": 5}), said.append).run(interrupt)
    again = running.resume_deployed(place, tmp_path / "run", Wire(place), said.append)
    again.run()
    plain = {**chosen, "engine": {"name": "sequential"}, "out": str(tmp_path / "expected")}
    expected = losing(Experiment(make_settings(plain)), {0: (2, 3), 1: (2, 3)})
    expected.run()
    assert tree.equal(again.server, expected.server)


class StopError(Exception):
    """Simulates an interruption."""


@pytest.mark.parametrize(
    ("method", "settings", "every"),
    [
        ("fedavg", {}, 2),
        ("fedper", {"uplink": "topk:0.1,int8"}, 1),
        ("fedrir", {"uplink": "topk:0.1,int8"}, 2),
        ("fedvtc", BRIEF, 1),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(federation, simulated, tmp_path, method, settings, every):
    settings = {**settings, "rounds": 5, "checkpoint_every": every, "data.rows": 120}
    place = federation(method=method, **settings)
    chosen = values(method=method, **settings) | {"out": str(tmp_path / "run")}
    said: list[str] = []

    def interrupt(done, rounds, row):
        if done == 3:
            raise StopError

    with pytest.raises(StopError):
        running.prepare(place, chosen, Wire(place), said.append).run(interrupt)

    def interrupt_again(done, rounds, row):
        if done == 4:
            raise StopError

    with pytest.raises(StopError):
        running.resume_deployed(place, tmp_path / "run", Wire(place), said.append).run(interrupt_again)
    again = running.resume_deployed(place, tmp_path / "run", Wire(place), said.append)
    again.run()
    here = simulated(method=method, **settings)
    assert tree.equal(again.server, here.server)
    assert scores(again) == scores(here)
    assert [row["round"] for row in again.folder.rows()] == [1, 2, 3, 4, 5]
    assert said == []


def test_a_node_that_lost_its_states_starts_afresh_and_reports_it(deployed, federation, tmp_path):
    place = federation(method="fedper")
    link, said = Wire(place), list[str]()
    experiment = running.prepare(place, values(method="fedper") | {"out": str(tmp_path / "run")}, link, said.append)

    def lose(done, rounds, row):
        if done == 2:
            shutil.rmtree(place.path / "node-0/state")

    experiment.run(lose)
    assert any(
        "client 0 starts from its initial state: its state after round 2 is not on this node (it has no states)" in line
        for line in said
    )


def test_only_states_that_a_checkpoint_needs_are_kept(deployed):
    ran = deployed(method="fedper", rounds=6, checkpoint_every=2)
    kept = sorted(int(file.stem) for file in ran.deployment.path.glob("node-0/state/*/client-0/*.safetensors"))
    assert kept == [4, 5, 6]  # the checkpoint of round 4 was the last complete one before round 6 began


def test_local_updates_are_recorded_and_undone(tmp_path):
    turns = AcceptedUpdates(tmp_path / "turns.json")
    for number in range(5):
        turns.accept(number, dict.fromkeys([0, 1] if number != 3 else [1], number), keep=0)
    assert (turns.base(0, 5), turns.base(0, 3), turns.base(1, 4), turns.base(2, 4)) == (5, 3, 4, 0)
    again = AcceptedUpdates(tmp_path / "turns.json")
    again.accept(2, {0: 2}, keep=2)
    assert (again.base(0, 9), again.base(1, 9)) == (3, 2)
    again.accept(5, {1: 3}, keep=2)  # the local update of round 3 came late
    assert (again.base(1, 5), again.base(1, 6)) == (2, 4)
    (tmp_path / "turns.json").write_text("[1]")
    with pytest.raises(RunFolderError, match=r"turns\.json"):
        AcceptedUpdates(tmp_path / "turns.json")


# examples on devices


@pytest.fixture
def rows(tmp_path, monkeypatch) -> Callable[..., Path]:
    """Return a function that writes digits as images into folders named by class."""
    monkeypatch.setenv("FEDLOOM_CACHE", str(tmp_path / "cache"))
    digits = load("digits")

    def write(folder: str, chosen: slice, *split: str) -> Path:
        place = tmp_path / folder
        for n, (picture, label) in enumerate(
            zip(digits.images[chosen, 0], digits.labels[chosen].tolist(), strict=True)
        ):
            target = place.joinpath(*split, str(label))
            target.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture.numpy()).save(target / f"{n}.png")
        return place

    return write


def name_data(node: Path, data: Path) -> None:
    file = node / "node.toml"
    file.write_text(file.read_text().replace('data = "config"', f'data = "{data}"'))


def call_for(place: Deployment, settings: Mapping[str, Any] = MappingProxyType({})) -> Call:
    """Return the common part of the requests for a run of the federation's config with other settings."""
    config = tomllib.loads((place.path / "config.toml").read_text()) | dict(settings)
    return Call.model_validate({"run": "0" * 16, "config": tomli_w.dumps(config), **DIGITS, "deadline_s": 60.0})


def limit(node: Path, line: str) -> None:
    file = node / "node.toml"
    key = line.split(" =")[0]
    file.write_text("".join(re.sub(rf"^{key} = .*", line, old) for old in file.read_text().splitlines(keepends=True)))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("rounds = 1", "budget.rounds=1: the run has 3 rounds; the owner of this node sets it in node.toml"),
        ("parameters = 100", "budget.parameters=100: the nets have 910 parameters; the owner of this node sets it in node.toml"),
        ("steps = 1", "budget.steps=1: client 2 would take 2 steps in a round; the owner of this node sets it in node.toml"),
    ],
)  # fmt: skip
def test_a_node_refuses_a_run_above_its_budget_in_one_line(federation, tmp_path, line, reason):
    place = federation(**{"data.rows": 160})
    limit(place.path / "node-1", line)
    said: list[str] = []
    settings = values(**{"data.rows": 160}) | {"out": str(tmp_path / "run")}
    experiment = running.prepare(place, settings, Wire(place), said.append)
    assert said == [f"node-1: {reason}"]
    experiment.run()
    assert {line.partition(": ")[2] for line in said[1:]} <= {reason, f"scores of client 2: {reason}"}
    assert [row["cohort"] for row in experiment.rows] == [2, 2, 2]


def test_a_config_can_name_only_folders_that_the_nodes_owner_listed(federation, rows, tmp_path):
    mine = rows("mine", slice(0, 200))
    (tmp_path / "link").symlink_to(mine)
    place = federation()
    worker = NodeWorker(place.path / "node-0")
    call = call_for(place, {"data": {"name": "mine", "path": str(mine)}})

    def answer() -> Any:
        return open_envelope(NodeWorker(place.path / "node-0").answer(seal(Hello(call=call), {}))).header

    for listed in ("[]", f'["{tmp_path}/min"]', f'["{mine}/0"]', '["mine"]'):
        limit(place.path / "node-0", f"folders = {listed}")
        assert answer().reason == (
            f"data.path={mine}: is not in a folder that this node may read for a run; "
            "its owner can add it to folders in node.toml"
        )
    for listed in (f'["{tmp_path}/link"]', f'["/nowhere", "{tmp_path}"]', '["../../mine"]'):
        limit(place.path / "node-0", f"folders = {listed}")
        assert "data.path" not in getattr(answer(), "reason", "")
    assert worker._node.folders == []


@pytest.mark.parametrize("same", ["client", "slot"])
def test_a_request_names_each_client_once(federation, same):
    place = federation()
    members = [Assignment(client=0, slot=0, base=0, keep=0), Assignment(client=1, slot=1, base=0, keep=0)]
    twice = [members[0], members[1].model_copy(update={same: 0})]
    request = seal(TrainMessage(call=call_for(place), number=0, members=twice), {"common": {}})
    reason = open_envelope(NodeWorker(place.path / "node-0").answer(request)).header.reason
    assert "the request names a client or a slot twice" in reason
    late = seal(TrainMessage(call=call_for(place), number=3, members=members), {"common": {}})
    reason = open_envelope(NodeWorker(place.path / "node-0").answer(late)).header.reason
    assert "round 4: the run has 3 rounds" in reason


def test_examples_on_devices_stay_there(federation, rows, tmp_path):
    place = federation(nodes=2, clients=2)
    name_data(place.path / "node-0", rows("a", slice(0, 200)))
    name_data(place.path / "node-1", rows("b", slice(200, 330), "train"))
    rows("b", slice(330, 390), "test")
    said: list[str] = []
    link = Wire(place)
    chosen = values(clients=2, rounds=8, **{"method.lr": 0.1, "eval.valid": 0.1}) | {"out": str(tmp_path / "run")}
    experiment = running.prepare(place, chosen, link, said.append)
    assert [experiment.data.n_test(i) for i in range(2)] == [50, 60]
    assert [experiment.data.n_train(i) for i in range(2)] == [135, 117]
    with pytest.raises(DataError, match="stay on their devices"):
        experiment.data.train(0)
    experiment.run()
    assert said == []
    last = experiment.rows[-1]
    assert last["personal_accuracy"] > 0.7
    assert last["server_accuracy"] > 0.6
    assert last["general_accuracy"] is None
    counts = json.loads((tmp_path / "run/partition.json").read_text())["class_counts"]
    assert [sum(row) for row in counts["test"]] == [50, 60]


def test_a_node_that_claims_many_examples_has_a_limited_share(federation, rows, tmp_path):
    """The server cannot check the number, so none of four clients has more than 3/4 of the weight."""
    place = federation(nodes=4)
    for k in range(4):
        name_data(place.path / f"node-{k}", rows(f"own-{k}", slice(60 * k, 60 * k + 60)))

    def claim(node, n, answer):
        header = open_envelope(answer).header
        if node != "node-3":
            return answer
        if isinstance(header, Present):
            counts = {"3": {**header.counts["3"], "train": [10**6] + [0] * 9}}
            return seal(header.model_copy(update={"counts": counts}), {})
        return retold(answer, examples=10**6) if isinstance(header, Trained) else answer

    experiment = running.prepare(place, values() | {"out": str(tmp_path / "run")}, Wire(place, claim), lambda _: None)
    taken, take = [], experiment.intake.take
    experiment.intake.take = lambda *asked: taken.append(take(*asked)) or taken[-1]
    experiment.run()
    assert [a.share for a in taken[-1].arrivals] == pytest.approx([1 / 12, 1 / 12, 1 / 12, 3 / 4])


def test_a_node_with_its_own_examples_may_join_later(federation, rows, tmp_path):
    place = federation(nodes=2, clients=2)
    for node, chosen in (("node-0", slice(0, 120)), ("node-1", slice(120, 240))):
        name_data(place.path / node, rows(node, chosen))
    link, said = Wire(place), list[str]()
    late = link.workers.pop("node-1")
    chosen = values(clients=2, rounds=3) | {"out": str(tmp_path / "run")}
    place.file = place.file.model_copy(update={"join_s": 0.0})
    experiment = running.prepare(place, chosen, link, said.append)
    experiment.run(lambda *_: link.workers.update({"node-1": late}))
    assert [row["cohort"] for row in experiment.rows] == [1, 2, 2]


def test_a_node_that_came_later_cannot_end_the_run(federation, rows, tmp_path):
    """The node's number of examples is unknown, but not zero. Logs of a rejected local update do not count."""
    place = federation(nodes=2, clients=2)
    for node, chosen in (("node-0", slice(0, 120)), ("node-1", slice(120, 240))):
        name_data(place.path / node, rows(node, chosen))

    def spoil(node, n, answer):
        is_training = isinstance(open_envelope(answer).header, Trained)
        return retold(answer, examples=0, logs={"train.own": 1.0}) if node == "node-1" and is_training else answer

    link, said = Wire(place, spoil), list[str]()
    late = link.workers.pop("node-1")
    place.file = place.file.model_copy(update={"join_s": 0.0})
    experiment = running.prepare(place, values(clients=2, rounds=3) | {"out": str(tmp_path / "run")}, link, said.append)
    experiment.run(lambda *_: link.workers.update({"node-1": late}))
    assert [row["cohort"] for row in experiment.rows] == [1, 1, 1]
    assert any("it reports 0 training examples, but has at least 1" in line for line in said)
    assert "train.own" not in experiment.rows[-1]


def test_invalid_examples_are_refused_by_their_node(federation, rows, tmp_path):
    place = federation(nodes=2, clients=2)
    name_data(place.path / "node-0", tmp_path / "nowhere")
    strange = rows("strange", slice(0, 50))
    (strange / "0").rename(strange / "zero")
    name_data(place.path / "node-1", strange)
    said: list[str] = []
    with pytest.raises(DataError, match="no node can take part"):
        running.prepare(place, values(clients=2) | {"out": str(tmp_path / "run")}, Wire(place), said.append)
    assert any("nowhere: this node's data do not exist" in line for line in said)
    assert any("the label 'zero' is not a class of the run" in line for line in said)


@pytest.fixture
def clinics(tmp_path) -> Callable[..., tuple[Deployment, dict[str, Path], dict[str, Any]]]:
    """Return a function that creates two nodes with one table each, and returns the federation, the tables and the settings."""

    def make(**settings: Any) -> tuple[Deployment, dict[str, Path], dict[str, Any]]:
        files = write_clinics(tmp_path)
        base = {"clients": 2, "rounds": 2, "batch_size": 16, "precision": "fp64", "checkpoint_every": 1}
        data = {"data.name": "clinics", "data.path": str(files["server"])}
        chosen = changed(base, method="fedper", **data, **settings)
        place = create_deployment(tmp_path / "federation", chosen, 2, demo=True)
        for i in range(2):
            name_data(place.path / f"node-{i}", files[f"clinic-{i}"])
        return place, files, chosen | {"out": str(tmp_path / "run")}

    return make


TABLE = {
    "data.label": "risk",
    "data.drop": "note,days",
    "data.missing": "fill",
    "model": {"name": "table_mlp", "hidden1": 8},
}


@pytest.mark.parametrize(
    "settings",
    [
        TABLE,
        TABLE | {"data.normalise": "own"},
        TABLE | {"data.label": "days", "data.drop": "note,risk", "data.task": "regression"},
        {"data.text": "note", "data.label": "risk", "data.min_count": 1, "model": "text_mean"},
    ],
    ids=["classes", "own scaling", "numbers", "texts"],
)
def test_nodes_read_tables_and_texts_as_a_simulation_does(clinics, settings):
    place, files, chosen = clinics(**settings)
    said: list[str] = []
    there = running.prepare(place, chosen, Wire(place), said.append)
    there.run()
    here = simulated_clinics(there, files, chosen)
    worker = NodeWorker(place.path / "node-1")
    given = Given(preprocess=there.data.preprocess, where="p", accepts_unknown=True)
    mine = read_own(files["clinic-1"], worker._node.clients, make_settings(chosen), given)
    for split in ("train", "test"):
        (x, y), (x_here, y_here) = getattr(mine, split)(1), getattr(here.data, split)(1)
        assert len(y) in (37, 13)
        assert all(torch.equal(a, named_tensors(x_here)[name]) for name, a in named_tensors(x).items())
        assert torch.equal(y, y_here)
    here.run()
    assert said == []
    assert tree.equal(there.server, here.server)
    for ours, theirs in zip(there.rows, here.rows, strict=True):
        same = [key for key in theirs if key.startswith(("personal", "train")) and not key.endswith("seconds")]
        assert len(same) > 1
        assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}


def test_a_preprocess_made_ahead_is_used_by_server_and_nodes(clinics, tmp_path):
    _, files, _ = clinics(**TABLE)
    options = {"name": "clinics", "path": str(files["both"]), "label": "risk", "drop": "note,days", "missing": "fill"}
    made = make_preprocess(make_settings({"data": options}))
    (tmp_path / "p.json").write_text(made.text())
    chosen = {"data.name": "clinics", "data.path": str(files["server"]), "data.preprocess": str(tmp_path / "p.json")}
    chosen = changed({"clients": 2, "rounds": 1}, **chosen, model="table_mlp", out=str(tmp_path / "ahead"))
    place = create_deployment(tmp_path / "other", chosen, 2, demo=True)
    (tmp_path / "two").mkdir()
    name_data(place.path / "node-0", files["clinic-0"])
    name_data(place.path / "node-1", files["clinic-1"])
    experiment = running.prepare(place, chosen, Wire(place), pytest.fail)
    experiment.run()
    assert (tmp_path / "ahead/preprocess.json").read_text() == made.text()
    assert len(experiment.rows) == 1
    every = create_deployment(
        tmp_path / "config", chosen, 1, demo=True
    )  # the node reads the run's examples, but not p.json
    (tmp_path / "p.json").rename(tmp_path / "moved.json")
    moved = changed(
        chosen, **{"data.preprocess": str(tmp_path / "moved.json"), "out": str(tmp_path / "last"), "partition": "iid"}
    )
    experiment = running.prepare(every, moved, Wire(every), pytest.fail)
    assert experiment.data.n_clients == 2


def test_several_clients_of_a_node_have_a_table_each(clinics, tmp_path):
    _, files, chosen = clinics(**TABLE)
    place = create_deployment(tmp_path / "one", chosen, 1, demo=True)
    (tmp_path / "tables/client-1").mkdir(parents=True)
    shutil.copy(files["clinic-0"], tmp_path / "tables/client-0.csv")
    name_data(place.path / "node-0", tmp_path / "tables")
    said: list[str] = []
    with pytest.raises(DataError, match="no node can take part"):
        running.prepare(place, chosen, Wire(place), said.append)
    assert "client-1" in said[0]
    shutil.copy(files["clinic-1"], tmp_path / "tables/client-1/train.csv")
    experiment = running.prepare(place, chosen, Wire(place), pytest.fail)
    assert [experiment.data.n_train(i) + experiment.data.n_test(i) for i in range(2)] == [40, 50]


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("age,job,smokes", "age,work,smokes", "clinic-1.csv lacks the column 'job' of the server's preprocess.json"),
        (
            "days\n",
            "days,weight\n",
            "clinic-1.csv has the column 'weight', which is not in the server's preprocess.json; remove it (data.drop=weight)",
        ),
        ("low", "middle", "column 'risk': the label 'middle' is not a class of the run"),
        ("clerk", "pilot", ""),
    ],
)  # fmt: skip
def test_a_node_whose_table_does_not_fit_says_so_in_one_line_and_does_not_join(clinics, old, new, reason):
    place, files, chosen = clinics(**TABLE)
    text = files["clinic-1"].read_text().replace(old, new)
    files["clinic-1"].write_text(text.replace("\n", ",1\n").replace("weight,1", "weight") if "weight" in new else text)
    said: list[str] = []
    experiment = running.prepare(place, chosen, Wire(place), said.append)
    assert [line for line in said if "node-1" in line] == said
    assert experiment.data.n_train(0) == 30
    if not reason:  # a level that the server's rows do not have is unknown, as in predictions
        assert said == []
        assert experiment.data.n_train(1) == 37
        return
    (line,) = said
    assert reason in line
    assert "\n" not in line
    assert experiment.data.n_train(1) == 0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{}", "the server's preprocess.json is not a preprocess.json of format 1"),
        ("[" * 10_000, "the server's preprocess.json is not a JSON file"),
        (
            "x" * (2**20 + 1),
            "the header is not valid: header.hello.call.preprocess: String should have at most 1048576",
        ),
    ],
)
def test_a_description_that_a_node_receives_is_checked(federation, text, reason):
    place = federation()
    call = call_for(place).model_copy(update={"preprocess": text})
    answer = open_envelope(NodeWorker(place.path / "node-0").answer(seal(Hello(call=call), {}))).header
    assert answer.reason.startswith(reason)


def test_a_description_that_is_too_large_for_a_message_is_refused(clinics, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("\n".join(f"word-number-{n:08}" for n in range(50_000)))
    settings = {"data.text": "note", "data.label": "risk", "data.vocabulary": str(words), "model": "text_mean"}
    place, _, chosen = clinics(**settings)
    with pytest.raises(ConfigError, match="at most 1 MiB can be sent to nodes; use a smaller"):
        running.prepare(place, chosen, Wire(place), pytest.fail)


def test_statistics_of_all_examples_are_refused_on_devices(federation, rows, tmp_path):
    place = federation(nodes=1, clients=1)
    name_data(place.path / "node-0", rows("a", slice(0, 50)))
    with pytest.raises(UsageError, match="normalise=standard"):
        running.prepare(place, values(clients=1, **{"data.normalise": "standard"}), Wire(place), list[str]().append)


# envelopes


def test_an_envelope_keeps_order_empty_branches_and_every_type():
    message = {
        "b": {"z": torch.ones(2), "a": torch.zeros(3, dtype=torch.int64)},
        "empty": {},
        "a": {"deep": {"none": {}}, "x": torch.tensor(float("nan"))},
    }
    letter = open_envelope(
        seal(Trained(turns=[Turned(client=1, slot=0, logs={"train.loss": float("inf")})]), {"0": message})
    )
    found = letter.tree("0")
    assert tree.equal(found, message)
    assert json.dumps(found, default=str) == json.dumps(message, default=str)  # in the same order
    assert letter.header.turns[0].logs == {"train.loss": float("inf")}


@pytest.mark.parametrize("keep", [0, 3, 8, 15, 16, 40, 200, -1])
def test_every_cut_is_noticed(keep):
    whole = seal(Trained(turns=[Turned(client=1, slot=0)]), {"0": {"w": torch.ones(50)}})
    with pytest.raises(WireError):
        open_envelope(whole[:keep])
    with pytest.raises(WireError):
        open_envelope(whole + b"x")


def test_impossible_example_counts_of_a_node_are_refused(federation, rows, tmp_path):
    place = federation(nodes=2, clients=2)
    for node in place.file.nodes:
        name_data(place.path / node, rows(node, slice(0, 100)))
    swollen = {split: [10**8] * 10 for split in ("train", "valid", "test")}

    def swell(node, n, answer):
        header = open_envelope(answer).header
        return seal(header.model_copy(update={"counts": dict.fromkeys(header.counts, swollen)}), {})

    with pytest.raises(DataError, match="at most 10000000 are allowed"):
        running.prepare(place, values(clients=2) | {"out": str(tmp_path / "r")}, Wire(place, swell), list[str]().append)


def test_headers_are_checked():
    good = seal(Trained(turns=[Turned(client=1, slot=0)]), {})
    for old, new in ((b'"client": 1', b'"client":-1'), (b'"slot": 0', b'"slit": 0'), (b'"trained"', b'"execute"')):
        with pytest.raises(WireError, match="the header is not valid"):
            open_envelope(good.replace(old, new))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            {"method": "fedmr", "method.secure": True},
            "method=fedmr: cannot be deployed, because its clients exchange .* devices connect only to the server",
        ),
        (
            {"method": "centralised"},
            "method=centralised: cannot be deployed, because it pools the examples of all clients",
        ),
        (
            {"method": "fedmr", "devices.stragglers": "late"},
            "devices.stragglers=late: fedmr cannot aggregate late uplinks",
        ),
        ({"join.clients": 1}, "join.clients: clients cannot join later on devices"),
    ],
)
def test_undeployable_settings_are_refused_at_every_step(federation, tmp_path, settings, reason):
    with pytest.raises(ConfigError, match=f"^{reason}"):
        federation("other", **settings)
    assert not (tmp_path / "other").exists()
    place = federation()
    chosen = values(**settings) | {"out": str(tmp_path / "r")}
    with pytest.raises(ConfigError, match=f"^{reason}"):
        running.prepare(place, chosen, Wire(place), list[str]().append)


def test_a_base_is_read_from_the_nodes_own_folder(federation, deployed, tmp_path):
    base = tmp_path / "base.safetensors"
    weights = {"linear.weight": torch.linspace(-1, 1, 64 * 12).reshape(12, 64), "linear.bias": torch.zeros(12)}
    safetensors.torch.save_file(weights, base)
    settings = {"method": "fedper", "model.lora": 2, "model.weights": str(base)}
    place = federation("with base", **settings)
    copies = [place.path / f"node-{k}/code/base.safetensors" for k in (0, 1)]
    assert all(copy.read_bytes() == base.read_bytes() for copy in copies)
    chosen = values(**settings) | {"out": str(tmp_path / "based")}
    experiment = running.prepare(place, chosen, Wire(place), print)
    experiment.run()
    assert [row["cohort"] for row in experiment.rows] == [4, 4, 4]
    simulated = Experiment(make_settings(chosen | {"out": str(tmp_path / "simulated")}))
    simulated.run()
    assert tree.equal(experiment.server, simulated.server)
    copies[1].unlink()
    said: list[str] = []
    running.prepare(place, chosen | {"out": str(tmp_path / "missing")}, Wire(place), said.append).run()
    assert any("base.safetensors: this node has no code/base.safetensors" in line for line in said), said
