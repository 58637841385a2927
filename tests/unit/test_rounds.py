"""Draws and rules of rounds, tested without running a round."""

import pytest

from fedloom.config.settings import make_settings
from fedloom.engines import Reply
from fedloom.experiment.arrivals import LateUplink, RoundRequest, slowdowns
from fedloom.method import Method
from fedloom.methods.centralised import Centralised


def factors(n=10, method=None, **values):
    devices = {"slow": 0.3, "slowdown": 5.0, **values.pop("devices", {})}
    return slowdowns(make_settings({"devices": devices, **values}), method or Method(), n)


def test_the_fraction_of_slow_clients_is_fixed():
    assert sorted(factors()) == [1.0] * 7 + [5.0] * 3
    assert factors() == factors()
    assert len({factors(seed=seed) for seed in range(20)}) > 5
    assert factors(devices={"slow": 0.0}) == (1.0,) * 10
    assert factors(devices={"slow": 1.0}) == (5.0,) * 10
    assert factors(method=Centralised()) == (1.0,) * 10


@pytest.mark.parametrize(("slow", "n", "expected"), [(0.5, 3, 2), (0.1, 4, 0), (0.1, 5, 1), (0.25, 10, 3)])
def test_the_number_of_slow_clients_is_rounded(slow, n, expected):
    assert sum(factor > 1 for factor in factors(n, devices={"slow": slow})) == expected


def arrivals_of(run, *found):
    """Return the round's arrivals from replies `(slot, examples)` and uplinks in flight `(client, slot, examples, sent)`."""
    sent = run.problem.codec.send(run.hooks.downlink(run.server, 0, ()))
    uplink = {"weights": sent.common["weights"]}
    replies, flights = (sorted(facts for facts in found if len(facts) == n) for n in (2, 4))
    run.intake.flights |= {
        client: LateUplink(client=client, slot=slot, examples=examples, sent=sent_in, message=uplink)
        for client, slot, examples, sent_in in flights
    }
    number, cohort = 3, [4, 2, 5, 7]
    given = [
        Reply(client=cohort[slot], slot=slot, uplink=uplink, examples=examples, steps={}, logs={}, seconds=0.0)
        for slot, examples in replies
    ]
    return run.intake.take(RoundRequest(number, cohort, sent, [slot for slot, _ in replies]), given).arrivals


def test_shares_are_by_examples_and_age(experiment):
    settings = {"clients": 8, "devices.stragglers": "late", "devices.slowdown": 2.0, "devices.slow": 0.0}
    arrivals = arrivals_of(experiment("fedavg", **settings), (0, 30), (1, 10), (7, 3, 40, 0))
    assert [a.share for a in arrivals] == pytest.approx([0.5, 1 / 6, 1 / 3])  # 30, 10 and 40 / 2 of 60
    assert [(a.client, a.slot, a.age) for a in arrivals] == [(4, 0, 0), (2, 1, 0), (7, 3, 3)]
    fresh = arrivals_of(experiment("fedavg", clients=8), (0, 3), (1, 7))
    assert [a.share for a in fresh] == [3 / 10, 7 / 10]  # to the bit


def test_the_fraction_of_lost_clients_matches_dropout(experiment):
    run = experiment("fedavg", **{"clients": 20, "data.rows": 300, "devices.dropout": 0.3, "partition.name": "iid"})
    lost = [
        slot for number in range(200) for slot in set(range(20)) - set(run.intake.roster(number, range(20)).working)
    ]
    assert len(lost) == pytest.approx(0.3 * 4000, abs=120)  # 4 standard deviations
    assert max(lost.count(i) for i in range(20)) < 100


def test_a_busy_client_is_not_sent_the_downlink(experiment):
    run = experiment("fedavg", **{"devices.stragglers": "late", "devices.slow": 0.5})
    run.intake.flights[2] = LateUplink(client=2, slot=0, examples=10, sent=0, message={})
    roster = run.intake.roster(1, [0, 2, 3])
    assert (roster.sent, roster.working) == ([0, 2], [0, 2])
    assert run.intake.events == [{"round": 2, "event": "busy", "clients": [2]}]
