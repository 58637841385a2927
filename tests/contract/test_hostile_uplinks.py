"""Screening in whole runs. Honest clients are never refused, and the effect of malicious uplinks of every kind is bounded."""

import math
from dataclasses import dataclass, replace

import pytest
import torch

from fedloom import FedAvg, tree
from fedloom.cli import main
from fedloom.engines.wrappers import Wrapper
from fedloom.errors import NoValidUplinkError
from fedloom.experiment.loop import Experiment
from fedloom.methods.registry import METHODS
from small import KINDS, brief, interrupted_after

ON = {"screen.norm": 10}
HOSTILE = 7  # of eight clients
SETTINGS = {"clients": 8, "data.rows": 240, "rounds": 4, "engine": "sequential", "method.lr": 0.2, "precision": "fp32"}
SKEWED = {"clients": 12, "data.rows": 400, "partition.alpha": 0.05, "rounds": 2, "precision": "fp32"}
SIZES = {
    "partition.name": "quantity",
    "partition.alpha": 0.5,
    "partition.min_examples": 4,
    "batch_size": 4,
    "data.rows": 1790,
}


def events(run, kind):
    return [event for event in run.folder.rows("events.jsonl") if event["event"] == kind]


@pytest.mark.parametrize(
    ("method", "more"),
    [*((method, {}) for method in METHODS if method in KINDS or METHODS[method].also_travels),
     ("fedavg", SIZES), ("scaffold", SIZES), ("fedbn", {"model": "resnet8"}),
     ("fedproto", {"models": "mlp,fedavg_cnn", "width": 16}), ("fedvtc", {"method.covariance": "full"}),
     ("fedvtc", {"uplink": "variance/int8", "method.covariance": "full"}), ("fedavg", {"uplink": "topk:0.05,int8"}),
     ("fedavg", {"devices.stragglers": "late", "devices.slow": 0.3, "devices.slowdown": 2})],
)  # fmt: skip
def test_honest_clients_are_never_refused(experiment, method, more):
    """The clients have high label skew and few examples, and their sizes differ by a factor of 90."""
    summary = experiment(method, **{**SKEWED, **brief(method), **more}, **ON).run()
    assert (summary["rejected"], summary["skipped"], summary["excluded"]) == (0, 0, [])


@pytest.mark.parametrize("method", ["fedavg", "scaffold", "fedproto"])
def test_screening_changes_no_number_of_honest_clients(experiment, method):
    screened, plain = experiment(method, **SKEWED, **ON), experiment(method, **SKEWED)
    for run in (screened, plain):
        run.run()
    assert tree.equal(screened.server, plain.server)
    assert [row["cohort"] for row in screened.rows] == [row["cohort"] for row in plain.rows]


class Hostile(Wrapper):
    """An engine that changes the replies of some clients in some rounds."""

    def __init__(self, inner, tamper, rounds=range(99), clients=(HOSTILE,)):
        super().__init__(inner)
        self.tamper, self.rounds, self.clients = tamper, rounds, clients

    def train(self, number, cohort, down):
        replies = self.inner.train(number, cohort, down)
        if number not in self.rounds:
            return replies
        return [replace(self.tamper(r), is_finite=False) if r.client in self.clients else r for r in replies]


def scaled(factor):
    return lambda r: replace(r, uplink=tree.map_tree(lambda x: x * factor if x.is_floating_point() else x, r.uplink))


def with_part(name, change):
    return lambda r: replace(r, uplink={**r.uplink, name: change(r.uplink[name])})


def negative_where_absent(counts):
    return torch.where(counts > 0, counts, -1e6)


ATTACKS = {
    "a million times": (("fedavg", "fedrir", "scaffold"), scaled(1e6)),
    "the largest numbers": (("fedavg", "fedmr", "fedvtc", "fedproto"), scaled(3e37)),
    "minus ten times": (("fedavg", "scaffold", "fedmr"), scaled(-10.0)),
    "a million times the counts": (("fedvtc", "fedproto"), with_part("counts", lambda c: c * 1e6)),
    "negative counts": (("fedvtc", "fedproto"), with_part("counts", negative_where_absent)),
    "fractions of counts": (("fedvtc", "fedproto"), with_part("counts", lambda c: c * 0.9)),
    "a negative variance": (("fedvtc",), with_part("variance", lambda v: -1e3 * torch.ones_like(v))),
    "a huge variance": (("fedvtc",), with_part("variance", lambda v: v * 1e9)),
    "a huge control": (("scaffold",), with_part("control", lambda c: tree.map_tree(lambda x: x * 100, c))),
}


servers = {}  # by method: the server's state after a run without the hostile client


@pytest.mark.parametrize(("attack", "method"), [(name, m) for name, (methods, _) in ATTACKS.items() for m in methods])
def test_a_hostile_uplink_counts_no_more_than_a_lost_one(experiment, attack, method):
    """The client is refused three times, then excluded. The server's state is the same as without the client."""
    tamper = ATTACKS[attack][1]
    settings = {**SETTINGS, **brief(method), "partition.alpha": 0.3, "method.local_epochs": 1, **ON}
    run = experiment(method, **settings)
    run.engine = Hostile(run.engine, tamper)
    summary = run.run()
    if method not in servers:
        without = experiment(method, **settings)
        inner = without.engine.train
        without.engine.train = lambda *asked: [reply for reply in inner(*asked) if reply.client != HOSTILE]
        without.run()
        servers[method] = without.server
    assert tree.equal(run.server, servers[method])
    assert [event["clients"] for event in events(run, "rejected")] == [[HOSTILE]] * 3
    assert events(run, "excluded") == [
        {"round": 3, "event": "excluded", "clients": [HOSTILE], "reason": "3 of their uplinks were rejected within 10 rounds"}
    ]  # fmt: skip
    assert summary["excluded"] == [HOSTILE]
    sent = {row["client"] for row in run.client_rows if row["round"] == 4 and row.get("downlink_bytes")}
    assert sent == set(range(7))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e308])
def test_a_log_that_cannot_be_averaged_is_left_out_and_its_uplink_counts(experiment, value):
    run, honest = experiment("fedavg", **SETTINGS, **ON), experiment("fedavg", **SETTINGS, **ON)
    run.engine = Hostile(run.engine, lambda reply: replace(reply, logs={"train.loss": value}))
    run.run()
    honest.run()
    assert tree.equal(run.server, honest.server)
    assert all(math.isfinite(row["train.loss"]) and row["train.loss"] < 5 for row in run.rows)
    assert [event["clients"] for event in events(run, "unusable log")] == [[HOSTILE]] * 4


def test_a_client_that_claims_many_examples_has_a_limited_share(experiment):
    run = experiment("fedavg", **SETTINGS, **ON, **{"screen.max_share": 0.25})
    run.engine = Hostile(run.engine, lambda reply: replace(reply, examples=10**7))
    taken = []
    take = run.intake.take
    run.intake.take = lambda *asked: taken.append(take(*asked)) or taken[-1]
    run.run()
    assert [a.share for a in taken[0].arrivals if a.client == HOSTILE] == [pytest.approx(0.25)]
    assert sum(a.share for a in taken[0].arrivals) == pytest.approx(1)


ALL = range(8)


def test_a_round_without_a_valid_uplink_restores_the_state_before_and_excludes_nobody(experiment):
    run, states = experiment("fedavg", **SETTINGS, **ON), []
    run.engine = Hostile(run.engine, scaled(float("nan")), rounds=(2,), clients=ALL)
    run.run(lambda *_: states.append(tree.clone(run.server)))
    assert tree.equal(states[2], states[0])  # the aggregate of round 2 is undone
    assert not tree.equal(states[3], states[0])
    assert events(run, "rolled back") == [{"round": 3, "event": "rolled back", "reason": "every uplink was rejected"}]
    assert not events(run, "excluded")


def test_three_rounds_without_a_valid_uplink_end_the_run(experiment, tmp_path, capsys):
    run = experiment("fedavg", **{**SETTINGS, **ON, "checkpoint_every": 1, "rounds": 9})
    run.engine = Hostile(run.engine, scaled(float("nan")), rounds=(2, 3, 4), clients=ALL)
    with pytest.raises(NoValidUplinkError, match=r"rounds 3 to 5: no uplink .* clients 0, 1, 2, 3, 4, 5, 6, 7 were"):
        run.run()
    assert run.saved == 4
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import dataclass\nfrom fedloom import FedAvg, tree\n\n@dataclass(frozen=True)\nclass Mine(FedAvg):\n"
        "    def uplink(self, *asked):\n        sent, memory = super().uplink(*asked)\n"
        "        return tree.map_tree(lambda leaf: leaf * float('nan'), sent), memory\n"
    )
    words = [
        f"method={file}:Mine",
        "data.rows=100",
        "model=logistic",
        "clients=2",
        "screen.norm=10",
        f"out={tmp_path / 'o'}",
    ]
    assert main(["run", *words]) == 4
    assert "rounds 1 to 3: no uplink could be aggregated" in capsys.readouterr().err


@dataclass(frozen=True)
class Bursting(FedAvg):
    """Aggregates to infinity in the third round."""

    def aggregate(self, server, uplinks, round):
        after = super().aggregate(server, uplinks, round)
        return tree.map_tree(lambda leaf: leaf / 0 if round.number == 2 else leaf, after)


def test_a_server_that_is_not_finite_is_rolled_back(experiment):
    run, states = experiment(Bursting(lr=0.2), **{k: v for k, v in SETTINGS.items() if k != "method.lr"}, **ON), []
    run.run(lambda *_: states.append(tree.clone(run.server)))
    assert tree.equal(states[2], states[0])
    (event,) = events(run, "rolled back")
    assert event["reason"].endswith("was not finite after aggregation")


@pytest.mark.parametrize("last", [1, 2, 3])
def test_a_resumed_run_remembers_refusals_and_the_state_to_roll_back_to(experiment, monkeypatch, last):
    """Client 7 is refused in rounds 1, 2 and 4. In round 3, all uplinks are refused."""

    def attack(run):
        inner = Hostile(run.engine, scaled(float("nan")), rounds=(2,), clients=ALL)
        run.engine = Hostile(inner, scaled(1e6), rounds=(0, 1, 3))
        return run

    settings = {**SETTINGS, **ON, "checkpoint_every": 1, "rounds": 5}
    whole, cut = attack(experiment("fedavg", **settings)), attack(experiment("fedavg", **settings))
    summary = whole.run()
    resumed = attack(Experiment.resume(interrupted_after(cut, last)))
    again = resumed.run()
    assert tree.equal(resumed.server, whole.server)
    assert again["excluded"] == summary["excluded"] == [HOSTILE]
    assert resumed.folder.rows("events.jsonl") == whole.folder.rows("events.jsonl")
