"""FedBuff: the steps of the server, the weights of late changes, and the case in which it is FedAvg with equal weights."""

import pytest
import torch

from fedloom import FedBuff, Round, Stream
from fedloom.method import Arrival
from rig import Facts, params, round_of, start, uplink


def arrivals(*ages, number=1):
    return Round(number, 9, tuple(Arrival(i, i, 1 / len(ages), age) for i, age in enumerate(ages)), Stream(0, number))


def test_a_buffer_of_one_punctual_cohort_is_fedavg_with_equal_weights():
    method = FedBuff(buffer_size=2)
    after = method.aggregate(start(method, 0.0, 0.0), [uplink(1.0, 2.0), uplink(3.0, -2.0)], round_of([0.9, 0.1], 0))
    torch.testing.assert_close(params(after), torch.tensor([2.0, 0.0]))
    assert (int(after["steps"][0]), int(after["buffer"]["held"])) == (1, 0)
    half = FedBuff(buffer_size=2, server_lr=0.5)
    after = half.aggregate(start(half, 0.0, 0.0), [uplink(1.0, 2.0), uplink(3.0, -2.0)], round_of([0.9, 0.1], 0))
    torch.testing.assert_close(params(after), torch.tensor([1.0, 0.0]))


def test_a_buffer_that_is_not_full_is_kept_and_used_later():
    method = FedBuff(buffer_size=3)
    first = method.aggregate(start(method, 0.0), [uplink(3.0), uplink(6.0)], round_of([0.5] * 2, 0))
    assert params(first) == 0
    second = method.aggregate(first, [uplink(3.0), uplink(30.0)], round_of([0.5] * 2, 1))
    assert params(second) == 4.0  # (3 + 6 + 3) / 3
    assert second["buffer"]["changes"]["model.w"] == pytest.approx(30 / 2**0.5)  # the server stepped since it was sent


def test_a_change_counts_by_the_servers_steps_since_its_downlink():
    """Three steps later, the weight is a half. A round without a step or without uplinks does not increase the staleness."""
    method = FedBuff(buffer_size=1)
    server = start(method, 0.0)
    for number in range(3):
        server = method.aggregate(server, [uplink(0.0)], arrivals(0, number=number))
    late = {age: float(params(method.aggregate(server, [uplink(8.0)], arrivals(age, number=3)))) for age in (0, 3, 500)}
    assert late == {0: 8.0, 3: 4.0, 500: 4.0}
    skipped = method.aggregate(server, [uplink(8.0)], arrivals(2, number=5))  # sent in round 3, after the three steps
    assert params(skipped) == 8.0
    waiting = FedBuff(buffer_size=9)
    server = start(waiting, 0.0)
    for number in range(3):
        server = waiting.aggregate(server, [uplink(0.0)], arrivals(0, number=number))
    assert waiting.aggregate(server, [uplink(8.0)], arrivals(3, number=3))["buffer"]["changes"]["model.w"] == 8.0
    assert waiting.server_logs(server, [uplink(8.0)], arrivals(3, number=3)) == {"steps": 0, "held": 3, "staleness": 0}


def test_running_statistics_are_means_over_the_buffer():
    method = FedBuff(buffer_size=2, server_lr=50.0)
    ups = [uplink(1.0), uplink(1.0)]
    for up, variance in zip(ups, (2.0, 5.0), strict=True):
        up["weights"]["buffers"] = {
            "model.running_var": torch.tensor([variance]),
            "model.count": torch.tensor(int(variance)),
        }
    server = method.init_server(ups[0]["weights"], Facts(), round_of([1.0]))
    after = method.aggregate(server, ups, round_of([0.5] * 2, 0))["weights"]["buffers"]
    assert after["model.running_var"] == 3.5
    assert after["model.count"].dtype == torch.int64


def test_a_buffer_that_no_run_can_fill_is_reported(caplog):
    start(FedBuff(buffer_size=37), 0.0)
    assert "method.buffer_size=37: the run has at most 36 uplinks" in caplog.text


def test_slow_clients_arrive_later_in_a_run(experiment):
    late = {"devices.stragglers": "late", "devices.slow": 0.5, "devices.slowdown": 2}
    run = experiment("fedbuff", rounds=4, **late, **{"method.buffer_size": 2})
    run.run()
    assert run.rows[1]["server.staleness"] > 0 == run.rows[0]["server.staleness"]
    assert run.rows[-1]["server.steps"] > 2
