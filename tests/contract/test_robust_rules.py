"""Robust rules in whole runs: on every engine, after a resume, against malicious clients, and the settings that they exclude."""

import dataclasses
import json

import pytest
import torch

from contract import ClassMeans, assert_close, assert_same, left_by
from fedloom import FedAvg, Scaffold, tree
from fedloom.combining.rules import parse_rule
from fedloom.config.settings import make_settings
from fedloom.engines.wrappers import Wrapper
from fedloom.errors import ConfigError, MethodError
from fedloom.experiment.combination import RobustCombination
from fedloom.experiment.exclusions import EXCLUSIONS, refuse_exclusions, says_how_it_combines
from fedloom.experiment.loop import Experiment
from fedloom.method import Downlink, Round
from fedloom.methods.registry import METHODS, method_class
from fedloom.rng import Stream
from small import SMALL, brief, changed, interrupted_after

MEANS = [
    "fedavg",
    *(name for name in METHODS if "aggregate" in vars(method_class(name)) and method_class(name).combines == "mean"),
]
ROUNDS = {"clients": 6, "aggregate": "geometric"}


@pytest.mark.parametrize("method", MEANS)
def test_equal_uplinks_combine_to_what_the_method_aggregates(experiment, method):
    """If all clients send the same uplink, every rule gives the same server as the mean."""
    run = experiment(method, **brief(method), rounds=1, aggregate="geometric", **{"data.rows": 80})
    aggregated, aggregate = [], run.hooks.aggregate

    def twice(server, uplinks, round):
        assert all(uplink is uplinks[0] for uplink in uplinks)
        assert round.shares == [0.25] * 4
        aggregated.append((server, uplinks[0], round))
        return aggregate(server, uplinks, round)

    run.hooks.aggregate = twice
    run.run()
    ((server, one, round),) = aggregated
    again, _ = run.combination.combined([one] * 4, round, run.method.downlink(server, range(4), round))
    tree.map_tree(lambda a, b: torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12) or a, again[0], one)
    assert tree.structure(run.server) == tree.structure(server)


@pytest.mark.parametrize("method", ["fedavg", "scaffold"])
@pytest.mark.parametrize("engine", ["vectorised", "processes", "bytes+sequential"])
def test_engines_give_the_same_numbers(experiment, method, engine):
    more = {"engine.workers": 2} if engine == "processes" else {}
    one = left_by(experiment(method, **ROUNDS))
    other = left_by(experiment(method, engine=engine, **ROUNDS, **more))
    (assert_same if engine != "vectorised" else assert_close)(one, other)


def test_a_resumed_run_gives_the_same_numbers(experiment):
    settings = {
        **ROUNDS,
        "aggregate": "clip:1",
        "checkpoint_every": 1,
        "rounds": 3,
        "model": "resnet8",
        "data.rows": 90,
    }
    whole = experiment("scaffold", **settings)
    cut = interrupted_after(experiment("scaffold", **settings), 1)
    assert_same(left_by(whole), left_by(Experiment.resume(cut)))


class Hostile(Wrapper):
    """An engine with two malicious clients that send the negative of their weights."""

    def train(self, number, cohort, down):
        replies = self.inner.train(number, cohort, down)
        return [
            dataclasses.replace(r, uplink=tree.map_tree(lambda x: x * -3, r.uplink), is_finite=False) if r.client > 5 else r
            for r in replies
        ]  # fmt: skip


@pytest.mark.parametrize("method", ["fedavg", "scaffold"])
def test_two_of_eight_hostile_clients_do_not_ruin_a_run(experiment, method):
    def accuracy(**more):
        settings = {
            "clients": 8,
            "rounds": 6,
            "precision": "fp32",
            "method.lr": 0.3,
            "data.rows": 480,
            "partition.alpha": 5.0,
        }
        run = experiment(method, **settings, **more)
        run.engine = Hostile(run.engine)
        return run.run()["server_accuracy"]["final"]

    assert accuracy() < 0.4
    assert accuracy(aggregate="multikrum:2") > 0.6


def test_a_round_with_too_few_uplinks_for_the_rule_is_skipped(experiment):
    run = experiment("fedavg", clients=5, aggregate="krum:1", **{"devices.dropout": 0.3, "rounds": 3})
    before = []
    run.run(lambda *_: before.append(tree.clone(run.server)))
    skipped = [event for event in run.folder.rows("events.jsonl") if event["event"] == "skipped"]
    assert skipped
    assert skipped[0]["reason"].endswith("arrived, aggregate=krum:1 needs 5")
    assert run.rows[-1]["skipped"] == len(skipped)


def test_hooks_for_logs_see_the_uplinks_of_all_clients(experiment):
    seen = []
    run = experiment("fedavg", aggregate="median", rounds=1)
    run.hooks.logs = lambda *asked: seen.append(len({id(uplink) for uplink in asked[1]})) or {}
    run.run()
    assert seen == [4]


def test_clients_that_received_different_weights_cannot_be_combined():
    combination = RobustCombination(FedAvg(), parse_rule("median"))
    with pytest.raises(MethodError, match=r'FedAvg: a rule cannot combine .* set combines to "individual"'):
        combination.combined([{}], Round(0, 1, (), Stream(0)), Downlink(each=[{}]))


REFUSED = {
    ("fedmr", "aggregate=median"): "aggregate=median: fedmr uses each uplink individually; set screen.norm",
    ("fedproto", "aggregate=clip:1"): "aggregate=clip:1: fedproto adds up statistics of classes",
    ("fedvtc", "aggregate=clip:1"): "aggregate=clip:1: fedvtc adds up statistics of classes",
    ("local", "aggregate=median"): "aggregate=median: local has no uplinks to combine",
    ("centralised", "aggregate=median"): "aggregate=median: centralised has no uplinks to combine",
    ("fedavg", "aggregate=krum:1"): "aggregate=krum:1: needs 5 uplinks in a round, but the largest cohort is 4",
    ("fedavg", "aggregate=median uplink=topk:0.1,int8"): "aggregate=median: topk sends few differences",
    ("scaffold", "devices.stragglers=late"): "devices.stragglers=late: scaffold cannot aggregate late uplinks",
}  # fmt: skip


@pytest.mark.parametrize(("method", "words"), REFUSED)
def test_settings_that_exclude_each_other_are_refused_in_one_line(experiment, method, words):
    with pytest.raises(ConfigError) as caught:
        experiment(method, **dict(word.split("=") for word in words.split()))
    assert str(caught.value).startswith(REFUSED[method, words])
    assert "\n" not in str(caught.value)


def test_all_methods_state_what_they_need_of_the_uplinks():
    assert [name for name in METHODS if not says_how_it_combines(method_class(name))] == []


def test_a_method_that_overrides_aggregate_must_state_what_it_needs():
    settings = make_settings(changed(SMALL, aggregate="median"))
    with pytest.raises(ConfigError, match=r'overrides aggregate.*set combines to "mean", "sums" or "individual"'):
        refuse_exclusions(settings, ClassMeans())
    refuse_exclusions(settings, Scaffold())


def test_the_page_on_security_shows_all_exclusions(request):
    page = (request.config.rootpath / "docs" / "security.md").read_text()
    for one in EXCLUSIONS:
        assert f"| `{one.setting}` | {one.other} |" in page, json.dumps(one.setting)
