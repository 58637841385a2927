"""Rounds in which clients are lost, slow, late or invalid, with real methods and engines."""

import json
import math
from dataclasses import dataclass, replace

import pytest
import torch

from contract import assert_close, assert_same, left_by
from fedloom import FedAvg, FedPer, tree
from fedloom.engines.wrappers import Wrapper
from fedloom.errors import ConfigError, DivergedError
from fedloom.experiment.arrivals import slowdowns
from fedloom.experiment.loop import Experiment, GivenObjects
from small import BRIEF, interrupted_after, spied

SETTINGS = {"clients": 4, "rounds": 1, "data.rows": 160, "engine": "sequential", "engine.workers": 2}
SLOW = {"devices.slow": 0.5, "devices.slowdown": 3}
WEIGHT = "model.head.weight"


def factors_of(run):
    """Return the slowdown of each client."""
    return slowdowns(run.settings, run.method, run.problem.task.n_clients)


class Faulty(Wrapper):
    """An engine that changes the replies of client 1, or loses them if `tamper` returns None."""

    def __init__(self, inner, tamper, rounds=(0,)):
        super().__init__(inner)
        self.tamper, self.rounds = tamper, rounds

    def train(self, number, cohort, down):
        replies = self.inner.train(number, cohort, down)
        if number in self.rounds:
            replies = [self.tamper(reply) if reply.client == 1 else reply for reply in replies]
        return [replace(reply, is_finite=False) for reply in replies if reply]  # tampered uplinks are unchecked


def with_tensor(change, weight=WEIGHT):
    """Return a function that replaces one tensor by `change(tensor)`, or removes it if that is None."""

    def tamper(reply):
        params = dict(reply.uplink["weights"]["params"])
        new = change(params.pop(weight))
        params |= {} if new is None else {weight: new}
        return replace(reply, uplink={"weights": {**reply.uplink["weights"], "params": params}})

    return tamper


def foreign(reply):
    return replace(reply, uplink={**reply.uplink, "secret": {"rows": torch.zeros(3)}})


def filled(value):
    def change(tensor):
        changed = tensor.clone()
        changed[0, 0] = value
        return changed

    return with_tensor(change)


FAULTS = {
    "nan": (filled(float("nan")), f"'weights/params/{WEIGHT}' is not finite"),
    "infinite": (filled(float("-inf")), f"'weights/params/{WEIGHT}' is not finite"),
    "shape": (with_tensor(lambda w: w[:-1]), f"'weights/params/{WEIGHT}' is ((9, 12)"),
    "type": (with_tensor(torch.Tensor.half), f"'weights/params/{WEIGHT}' is ((10, 12), torch.float16)"),
    "missing": (with_tensor(lambda _: None), f"the message lacks 'weights/params/{WEIGHT}'"),
    "foreign": (foreign, "the message has an unexpected tensor 'secret/rows'"),
    "no rows": (lambda reply: replace(reply, examples=0), "examples=0: must be at least 1"),
}


def events(run):
    return run.folder.rows("events.jsonl")


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("engine", ["sequential", "processes"])
def test_a_bad_uplink_is_rejected_and_the_others_are_averaged(experiment, fault, engine):
    tamper, reason = FAULTS[fault]
    run = experiment("fedavg", **{**SETTINGS, "engine": engine})
    rounds = spied(run)
    run.engine = Faulty(run.engine, tamper)
    summary = run.run()
    good = [reply for reply in rounds[0].replies if reply.client != 1]
    examples = sum(reply.examples for reply in good)
    expected = tree.mean([r.uplink["weights"] for r in good], [r.examples / examples for r in good])
    assert tree.equal(run.server["weights"], expected)
    (event,) = events(run)
    assert (event["round"], event["event"], event["clients"]) == (1, "rejected", [1])
    assert event["reason"].startswith(reason)
    assert (summary["rejected"], summary["lost"], summary["skipped"]) == (1, 0, 0)
    assert run.rows[-1]["rejected"] == 1
    assert run.rows[-1]["cohort"] == 3


@pytest.mark.parametrize("fate", ["rejected", "thrown away"])
def test_a_client_with_a_rejected_or_skipped_uplink_keeps_its_training(experiment, fate):
    settings = {**SETTINGS, "min_clients": 4 if fate == "thrown away" else 1}
    whole, run = (experiment("fedper", **settings) for _ in range(2))
    whole.run()
    faults = with_tensor(lambda w: w[:-1], "model.body.linear.weight") if fate == "rejected" else lambda _: None
    run.engine = Faulty(run.engine, faults)
    summary = run.run()
    assert (summary["rejected"], summary["skipped"]) == ((1, 0) if fate == "rejected" else (0, 1))
    for i in range(4):
        assert tree.equal(run.engine.client(i)._asdict(), whole.engine.client(i)._asdict())


@pytest.mark.parametrize("method", ["fedproto", "fedvtc"])
def test_prototypes_must_be_as_many_as_the_classes_that_are_held(experiment, method):
    def tamper(reply):
        return replace(reply, uplink={**reply.uplink, "prototypes": reply.uplink["prototypes"][:-1]})

    run = experiment(method, **SETTINGS)
    run.engine = Faulty(run.engine, tamper)
    assert run.run()["rejected"] == 1
    assert events(run)[0]["reason"].startswith("'prototypes' is ((")


def test_each_architecture_has_a_form_of_its_own(experiment):
    run = experiment("fedproto", **SETTINGS, models="mlp,fedavg_cnn", width=16)
    assert run.run()["rejected"] == 0


def test_a_client_without_a_reply_is_lost(experiment):
    run = experiment("fedavg", **SETTINGS)
    run.engine = Faulty(run.engine, lambda _: None)
    summary = run.run()
    assert events(run) == [{"round": 1, "event": "lost", "clients": [1], "reason": "no reply"}]
    assert summary["lost"] == 1
    assert run.rows[-1]["cohort"] == 3
    turns = {row["client"]: row for row in run.client_rows}
    assert "uplink_bytes" not in turns[1]
    assert sum(row["downlink_bytes"] for row in turns.values()) == summary["downlink_bytes"]


def test_with_too_few_clients_a_round_is_skipped(experiment):
    run = experiment("fedavg", **{**SETTINGS, "rounds": 2, "min_clients": 4})
    before, servers = tree.clone(run.server), []
    run.engine = Faulty(run.engine, FAULTS["nan"][0])
    run.run(lambda *_: servers.append(tree.clone(run.server)))
    assert tree.equal(servers[0], before)
    assert not tree.equal(servers[1], before)
    assert events(run)[1] == {"round": 1, "event": "skipped", "reason": "3 arrived, min_clients=4"}
    assert [row["skipped"] for row in run.rows] == [1, 1]
    assert [row["cohort"] for row in run.rows] == [0, 4]


@pytest.mark.parametrize("method", ["fedavg", "scaffold", "fedmr", "fedproto"])
def test_a_cohort_that_is_lost_as_a_whole_changes_nothing(experiment, method):
    run = experiment(method, **{**SETTINGS, "rounds": 2, "devices.dropout": 0.9999999})
    before = tree.clone(run.server)
    summary = run.run()
    assert tree.equal(run.server, before)
    assert (summary["lost"], summary["skipped"], summary["uplink_bytes"]) == (8, 2, 0)
    assert summary["downlink_bytes"] > 0
    assert list(run.engine.changed()) == []


@dataclass(frozen=True)
class Exploding(FedPer):
    """Diverges in every local update."""

    def loss(self, nets, batch, down, memory):
        return super().loss(nets, batch, down, memory) * float("nan")


@pytest.mark.parametrize("engine", ["sequential", "vectorised"])
def test_clients_that_diverge_return_to_their_earlier_state(experiment, engine):
    run = experiment(Exploding(), **{**SETTINGS, "engine": engine})
    assert run.run()["rejected"] == 4
    assert list(run.engine.changed()) == []


@dataclass(frozen=True)
class Sick(FedAvg):
    """FedAvg that sends finite tensors, but stores tensors that are not finite."""

    def init_memory(self, weights, task, data):
        return {"turns": torch.zeros(1)}

    def uplink(self, client, received, down, turn):
        message, memory = super().uplink(client, received, down, turn)
        return message, {"turns": memory["turns"] + (float("nan") if turn.number else 1)}


@pytest.mark.parametrize("engine", ["sequential", "vectorised", "bytes+sequential"])
def test_a_local_update_that_leaves_nonfinite_state_is_undone(experiment, engine):
    run = experiment(Sick(), **{**SETTINGS, "engine": engine, "rounds": 2})
    assert run.run()["rejected"] == 4
    assert all(run.engine.client(i).memory["turns"] == 1 for i in range(4))
    assert {event.get("reason") for event in events(run)} == {
        "'memory/turns' is not finite",
        "0 arrived, min_clients=1",
    }


# a server that breaks


@dataclass(frozen=True)
class Breaking(FedAvg):
    """FedAvg in which the server's head is infinite after round 3."""

    def aggregate(self, server, uplinks, round):
        after = super().aggregate(server, uplinks, round)
        if round.number == 2:
            after["weights"]["params"][WEIGHT] = after["weights"]["params"][WEIGHT] / 0
        return after


def test_a_server_that_is_not_finite_is_never_written(experiment):
    run = experiment(Breaking(), **{**SETTINGS, "rounds": 4, "checkpoint_every": 2})
    with pytest.raises(DivergedError, match=rf"round 3: the server's 'weights/params/{WEIGHT}' is not finite.*round 2"):
        run.run()
    state, server, _ = run.folder.load_checkpoint()
    assert state["round"] == 2
    assert tree.not_finite(server) == ""
    with pytest.raises(DivergedError, match="round 3"):
        Experiment.resume(run.folder.path, GivenObjects(method=Breaking())).run()


# devices

CODED = {"uplink": "topk:0.2,int8", "downlink": "fp16"}
RULES = [
    ("fedavg", "late", {}),
    ("fedrir", "late", CODED),
    ("scaffold", "partial", {}),
    ("fedvtc", "partial", BRIEF),
    ("fedmr", "drop", CODED),
    ("scaffold", "wait", {}),
]


def devices(experiment, method, rule, engine="sequential", **settings):
    chosen = {**SETTINGS, "clients": 6, "cohort": 5, "rounds": 5, "devices.dropout": 0.3, **SLOW, "data.rows": 200}
    return experiment(method, **{**chosen, "devices.stragglers": rule, "engine": engine, **settings})


@pytest.mark.parametrize(("method", "rule", "settings"), RULES)
def test_devices_are_the_same_on_every_engine(experiment, method, rule, settings):
    expected = left_by(devices(experiment, method, rule, **settings))
    assert expected.summary["lost"] > 0
    engine = "processes" if method in ("fedavg", "fedmr") else "debug+bytes+sequential"
    assert_same(left_by(devices(experiment, method, rule, engine, **settings)), expected)
    if settings != CODED:  # one bit may decide which values top-k selects, or to which integer int8 rounds
        assert_close(left_by(devices(experiment, method, rule, "vectorised", **settings)), expected)


@pytest.mark.parametrize(("case", "after"), [(0, 1), (0, 2), (0, 4), (1, 2), (1, 4), (2, 1)])
def test_a_run_is_taken_up_with_uplinks_under_way(experiment, case, after):
    method, rule, settings = RULES[case]
    whole = devices(experiment, method, rule, checkpoint_every=1, **settings)
    expected = left_by(whole)
    run = devices(experiment, method, rule, checkpoint_every=1, **settings)
    path = interrupted_after(run, after)
    assert bool(run.intake.flights) == (rule == "late")
    again = Experiment.resume(path)
    assert again.intake.flights.keys() == run.intake.flights.keys()
    assert_same(left_by(again), expected)
    assert events(again) == events(whole)


def test_a_late_uplink_is_aggregated_with_its_weight(experiment):
    servers = []
    settings = {"clients": 3, "rounds": 3, "devices.slow": 0.3, "devices.slowdown": 2.5, "devices.stragglers": "late"}
    run = experiment("fedavg", **{**SETTINGS, **settings})
    rounds = spied(run)
    servers.append(tree.clone(run.server["weights"]))
    run.run(lambda *_: servers.append(tree.clone(run.server["weights"])))
    (slow,) = (i for i, factor in enumerate(factors_of(run)) if factor > 1)
    first, second, third = ({reply.client: reply for reply in turns.replies} for turns in rounds)
    assert slow in first
    assert slow not in second  # busy until its uplink has landed, in round 3
    assert slow not in third
    for number, fresh in ((0, first), (1, second)):
        on_time = [r for r in fresh.values() if r.client != slow]
        n = sum(r.examples for r in on_time)
        expected = tree.mean([r.uplink["weights"] for r in on_time], [r.examples / n for r in on_time])
        torch.testing.assert_close(servers[number + 1], expected)
    moved_on = tree.add(servers[2], tree.sub(first[slow].uplink["weights"], servers[0]))
    messages = [*(r.uplink["weights"] for r in third.values()), moved_on]
    weights = [*(float(r.examples) for r in third.values()), first[slow].examples / math.sqrt(3)]
    expected = tree.mean(messages, [w / sum(weights) for w in weights])
    torch.testing.assert_close(servers[3], expected)
    assert [e for e in events(run) if e["event"] == "landed"] == [
        {"round": 3, "event": "landed", "clients": [slow], "sent": [1]}
    ]
    assert run.rows[-1]["late"] == 1


def test_half_of_two_epochs_is_one(experiment):
    settings = {**SETTINGS, "rounds": 2, "partition": {"name": "iid"}, "engine": "sequential"}
    slow = {"devices.slow": 1.0, "devices.slowdown": 2, "devices.stragglers": "partial"}
    for method in ("fedavg", "scaffold"):
        part = left_by(experiment(method, **settings, **slow, **{"method.local_epochs": 2}))
        whole = left_by(experiment(method, **settings))
        assert tree.equal(part.server, whole.server)
        assert [row["steps"] for row in part.turns] == [row["steps"] for row in whole.turns]
        assert part.summary["virtual_steps"] == 2 * whole.summary["virtual_steps"]


def test_partial_local_updates_have_the_recorded_steps(experiment):
    whole = experiment("fedavg", **SETTINGS)
    whole.run()
    run = experiment("fedavg", **{**SETTINGS, **SLOW, "devices.stragglers": "partial"})
    run.run()
    factors = factors_of(run)
    assert sorted(factors) == [1, 1, 3, 3]
    for all_of, some in zip(whole.client_rows, run.client_rows, strict=True):
        assert some["steps"] == max(all_of["steps"] // factors[some["client"]], 1)
    tiny = experiment("fedavg", **{**SETTINGS, **SLOW, "devices.stragglers": "partial", "devices.slowdown": 1000})
    tiny.run()
    assert {row["steps"] for row in tiny.client_rows if factors_of(tiny)[row["client"]] > 1} == {1}


def test_dropped_stragglers_never_train(experiment):
    run = experiment(
        "fedavg_ft", **{**SETTINGS, **SLOW, "rounds": 2, "devices.stragglers": "drop", "eval.fitted": True}
    )
    summary = run.run()
    slow = {i for i, factor in enumerate(factors_of(run)) if factor > 1}
    assert set(run.engine.changed()) == {0, 1, 2, 3} - slow
    assert summary["late"] == 4
    assert {row["client"] for row in run.client_rows if "steps" in row} == {0, 1, 2, 3} - slow


def test_the_server_waits_for_the_longest_local_update(experiment):
    times = {}
    for rule in ("wait", "drop", "late", "partial"):
        run = experiment("fedavg", **{**SETTINGS, **SLOW, "devices.stragglers": rule})
        times[rule] = run.run()["virtual_steps"]
        turns = [(row["steps"], factors_of(run)[row["client"]]) for row in run.client_rows if "steps" in row]
        longest = max(steps * (1 if rule == "late" else factor) for steps, factor in turns)
        assert times[rule] == longest
    assert times["drop"] <= times["late"] < times["wait"]


def test_a_pooled_reference_has_no_devices(experiment):
    run = experiment("centralised", **{**SETTINGS, **SLOW, "devices.slow": 1.0, "devices.dropout": 0.99})
    assert run.run()["lost"] == 0


@pytest.mark.parametrize("method", ["scaffold", "fedmr", "fedproto", "fedvtc", "local"])
def test_a_method_without_late_uplinks_refuses_them(experiment, method):
    with pytest.raises(ConfigError, match=rf"devices.stragglers=late: {method} cannot aggregate late uplinks"):
        experiment(method, **SETTINGS, **{"devices.stragglers": "late"})


def test_min_clients_above_the_cohort_is_refused(experiment):
    with pytest.raises(ConfigError, match=r"min_clients=3: must be at most 2, the largest cohort"):
        experiment("fedavg", **SETTINGS, **{"cohort": 2, "min_clients": 3})


def test_events_after_the_last_checkpoint_are_noted_once(experiment):
    run = devices(experiment, "fedavg", "wait", checkpoint_every=2)
    again = Experiment.resume(interrupted_after(run, 3))
    again.run()
    lines = (run.folder.path / "events.jsonl").read_text().splitlines()
    rounds = [json.loads(line)["round"] for line in lines]
    assert rounds == sorted(rounds)
    assert len(set(lines)) == len(lines)
