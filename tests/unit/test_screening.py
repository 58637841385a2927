"""The rules of screening, tested one by one."""

from types import SimpleNamespace

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch

from fedloom.config.settings import make_settings
from fedloom.experiment.roll_back import RollBack
from fedloom.experiment.screening import Candidate, Screen, capped, sizes_of
from fedloom.method import Method
from fedloom.methods.fedproto import FedProto
from fedloom.methods.fedvtc import FedVTC
from fedloom.objectives import Classification


class Partition:
    """Ten examples of class 0 for every client."""

    def counts(self, labels, n_classes, split):
        return np.array([[10, 0]] * 8)


def screen_of(method=None, claims=False, known=True, **rules):
    data = SimpleNamespace(
        counts_are_claims=claims,
        n_train=lambda _client: 10 if known else 0,
        partition=Partition(),
        dataset=SimpleNamespace(labels=None),
        n_classes=2,
        objective=Classification.numbered(2),
    )
    problem = SimpleNamespace(method=method or Method(), data=data)
    return Screen(problem, make_settings({"screen": {"norm": 10.0, **rules}}).screen)


def candidate(client, size, examples=10, received=0.0):
    """Return an uplink whose weights differ by `size` from the received weights."""
    tensors = {"params": {"w": torch.full((3,), received + size)}, "buffers": {"n": torch.tensor(7)}}
    down = {"weights": {"params": {"w": torch.full((3,), received)}, "buffers": {"n": torch.tensor(0)}}}
    return Candidate(client, examples, {"weights": tensors}, down)


@hypothesis.given(st.lists(st.integers(1, 10**6), min_size=1, max_size=9), st.floats(0.01, 1.0))
def test_no_weight_has_more_than_its_largest_share(examples, share):
    weights = capped([float(n) for n in examples], share)
    n = len(weights)
    assert max(weights) <= max(share, 1 / n) * sum(weights) * (1 + 1e-9)
    assert all(w <= n for w, n in zip(weights, examples, strict=True))
    level = max(weights)
    assert all(w == e or w == pytest.approx(level) for w, e in zip(weights, examples, strict=True))
    if max(examples) <= share * sum(examples):
        assert weights == examples


def test_a_client_with_most_examples_has_three_shares_of_its_own():
    assert capped([100.0, 1.0, 1.0, 1.0, 1.0, 1.0], 0.5) == pytest.approx([5.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    assert capped([90.0, 80.0, 1.0, 1.0], 0.4) == pytest.approx([4.0, 4.0, 1.0, 1.0])
    assert capped([9.0, 2.0, 1.0], 0.1) == [1.0, 1.0, 1.0]  # 1/3 is the least possible share
    assert screen_of(claims=True).max_share(6) == 0.5
    assert screen_of().max_share(6) == 1.0
    assert screen_of(claims=True, max_share=0.2).max_share(6) == 0.2


def test_sizes_are_of_differences_and_without_counters():
    assert sizes_of(candidate(0, 2.0, received=5.0)) == {"weights/params": pytest.approx(2.0)}
    other = Candidate(0, 1, {"prototypes": torch.full((4, 2), -3.0), "counts": torch.full((9,), 1e9)}, {})
    assert sizes_of(other) == {"prototypes": pytest.approx(3.0)}


def test_an_uplink_of_ten_times_the_median_size_is_the_largest():
    screen = screen_of()
    sizes = [1.0, 2.0, 2.0, 19.9, 20.2, 1e38]
    found = screen.faults([candidate(i, size) for i, size in enumerate(sizes)])
    assert sorted(found) == [4, 5]
    assert found[4] == "'weights/params' is 10.1 times as large as the median; at most 10 times is allowed"


def test_clients_with_more_examples_may_send_larger_updates_in_proportion():
    rounds = [candidate(i, 1.0) for i in range(4)]
    assert screen_of().faults([*rounds, candidate(4, 50.0, examples=50)]) == {}
    assert list(screen_of().faults([*rounds, candidate(4, 51.0, examples=50)])) == [4]
    # an unchecked number of examples gives at most 3/5 of the weight, that is, six times the others' examples
    claimed = screen_of(claims=True).faults([*rounds, candidate(4, 61.0, examples=10**7)])
    assert list(claimed) == [4]
    assert screen_of(claims=True).faults([*rounds, candidate(4, 59.0, examples=10**7)]) == {}


def test_small_cohorts_are_compared_with_earlier_rounds():
    screen = screen_of()
    assert screen.faults([candidate(0, 1.0), candidate(1, 2.0)]) == {}  # nothing to compare with yet
    assert list(screen.faults([candidate(0, 1.0), candidate(1, 11.0)])) == [1]
    again = screen_of()
    again.restore(screen.state())
    assert list(again.faults([candidate(1, 11.0)])) == [1]
    assert again.state() == screen.state()


def test_a_median_of_zero_limits_nothing():
    assert screen_of().faults([candidate(i, float(i == 3)) for i in range(4)]) == {}


def test_negative_running_variances_are_refused():
    uplink = {"weights": {"params": {}, "buffers": {"m.running_var": torch.tensor([1.0, -1e-9])}}}
    (reason,) = screen_of().faults([Candidate(0, 10, uplink, {})]).values()
    assert reason == "'weights/buffers/m.running_var' is negative"


def prototypes(counts, **more):
    held = sum(n > 0 for n in counts)
    return Candidate(0, 10, {"prototypes": torch.ones(held, 2), "counts": torch.tensor(counts), **more}, {})


@pytest.mark.parametrize(
    ("counts", "reason"),
    [
        ([-1.0, 0.0], "negative or not an integer"),
        ([2.5, 0.0], "negative or not an integer"),
        ([11.0, 0.0], "more examples"),
        ([5.0, 1.0], "more examples"),
    ],
)
def test_impossible_counts_are_refused(counts, reason):
    assert reason in screen_of(FedProto()).faults([prototypes(counts)])[0]


def test_possible_counts_are_accepted():
    assert screen_of(FedProto()).faults([prototypes([10.0, 0.0])]) == {}
    assert screen_of(FedProto()).faults([prototypes([3.0, 0.0])]) == {}


@pytest.mark.parametrize(
    ("form", "variance", "reason"),
    [
        ("pooled", [1.0, -1e-6], "has a negative number"),
        ("class", [[0.0, -1.0], [1.0, 1.0]], "has a negative number"),
        ("full", [[1.0, 0.0], [0.0, -1.0]], "negative number on its diagonal"),
        ("full", [[1.0, 0.5], [0.4, 1.0]], "is not symmetric"),
        ("full", [[1.0, -0.5], [-0.5, 1.0]], ""),
        ("pooled", [0.0, 3.0], ""),
    ],
)
def test_impossible_variances_are_refused(form, variance, reason):
    one = prototypes([10.0, 0.0], variance=torch.tensor(variance))
    found = screen_of(FedVTC(covariance=form)).faults([one])
    assert bool(found) == bool(reason)
    assert reason in found.get(0, "")


def test_variances_have_a_wider_limit():
    def sized(i, size):
        return Candidate(i, 10, {**prototypes([10.0, 0.0]).uplink, "variance": torch.full((2,), size)}, {})

    every = [sized(i, 1.0) for i in range(4)]
    assert screen_of(FedVTC()).faults([*every, sized(4, 1e5)]) == {}
    assert list(screen_of(FedVTC()).faults([*every, sized(4, 1e7)])) == [4]


def test_a_number_of_examples_that_cannot_be_checked_must_stay_the_same():
    screen = screen_of(claims=True, known=False)
    assert screen.faults([candidate(0, 1.0, examples=50)]) == {}
    assert screen.faults([candidate(0, 1.0, examples=51)]) == {
        0: "it reports 51 training examples, but reported 50 before"
    }


def test_three_rejected_uplinks_in_ten_rounds_exclude_a_client():
    screen = screen_of()
    assert [screen.strike(number, [5]) for number in (0, 1, 11, 12)] == [[], [], [], []]
    again = screen_of()
    again.restore(screen.state())
    assert again.strike(13, [5, 6]) == [5]
    assert again.excluded == {5}


def test_without_a_norm_nothing_is_screened():
    screen = screen_of(FedProto(), norm=0.0)
    assert screen.faults([prototypes([-1.0, 0.0])]) == {}
    assert screen.bad_logs({"train.loss": float("nan")}) == []
    assert [screen.strike(number, [5]) for number in range(4)] == [[]] * 4


def test_logs_must_be_finite_and_of_a_size_that_can_be_averaged():
    logs = {"a": 1.0, "b": float("nan"), "c": float("-inf"), "d": 1e308, "e": -1e29}
    assert screen_of().bad_logs(logs) == ["b", "c", "d"]


def test_a_roll_back_restores_the_state_before_the_last_aggregation_and_no_earlier_one():
    back = RollBack(on=True)
    assert back.restored({"s": torch.tensor(0)})["s"] == 0  # nothing was aggregated yet
    back.keep({"s": torch.tensor(1)})
    back.keep({"s": torch.tensor(2)})
    assert back.restored({"s": torch.tensor(3)})["s"] == 2
    assert back.restored({"s": torch.tensor(2)})["s"] == 2
    back.check(4, [1])
    back.keep({"s": torch.tensor(3)})
    assert back.failed == 0
