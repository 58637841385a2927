"""One uplink that represents all: what methods only add up, and robust rules with known results and at their breakdown points."""

from dataclasses import dataclass

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from fedloom import FedAvg, FedProto, FedVTC, Method, Scaffold, tree
from fedloom.combining.additive import Additive
from fedloom.combining.robust import combine_robustly
from fedloom.combining.rules import RULES, parse_rule
from fedloom.experiment.exclusions import says_how_it_combines
from fedloom.method import Arrival, Round
from fedloom.rng import Stream

FORMS = ("pooled", "class", "full")


def a_round(shares):
    return Round(0, 9, tuple(Arrival(i, i, share) for i, share in enumerate(shares)), Stream(0))


def class_statistics(form, weighted, seed, shared=False):
    """Return a server and the uplinks of five clients, each with some of four classes and with features of three numbers."""
    method = FedVTC(covariance=form, prototype_mean="weighted" if weighted else "uniform", share_generator=shared)
    rng, uplinks = torch.Generator().manual_seed(seed), []
    for _ in range(5):
        counts = torch.randint(0, 4, (4,), generator=rng).double()
        counts[int(counts.argmax())] += 1
        root = torch.randn(3, 3, generator=rng).double()
        variance = {
            "pooled": root[0] ** 2,
            "class": torch.randn(4, 3, generator=rng).double() ** 2,
            "full": root @ root.T,
        }
        prototypes = 5 + torch.randn(int((counts > 0).sum()), 3, generator=rng).double()
        weights = {"params": {"generator.w": torch.randn(2, generator=rng).double()}, "buffers": {}}
        uplinks.append({"prototypes": prototypes, "counts": counts, "variance": variance[form]})
        uplinks[-1] |= {"weights": weights} if shared else {}
    server = {
        "prototypes": torch.ones(4, 3).double(),
        "counts": torch.zeros(4).double(),
        "variance": variance[form] * 0 + 1,
    }
    return method, server, uplinks


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weighted", [True, False])
@hypothesis.given(st.integers(0, 10**6))
def test_class_statistics_add_up_to_the_same_server(form, weighted, seed):
    method, server, uplinks = class_statistics(form, weighted, seed, shared=seed % 2 == 0)
    base = {"weights": {"params": {"generator.w": torch.ones(2).double()}, "buffers": {}}} if seed % 2 == 0 else {}
    parts = Additive(method, uplinks, base)
    one = parts.stand_in({path: parts.rows(path).mean(0) for path in parts.vectors})
    equal = a_round([0.2] * 5)
    direct, stood_in = method.aggregate(server, uplinks, equal), method.aggregate(server, [one] * 5, equal)
    assert tree.structure(direct) == tree.structure(stood_in)
    tree.map_tree(lambda a, b: torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10) or a, direct, stood_in)


def test_a_class_that_noise_leaves_without_examples_keeps_its_prototype():
    method, server, uplinks = class_statistics("class", weighted=True, seed=3)
    total = tree.map_tree(lambda *leaves: sum(leaves), *(method.sums(uplink) for uplink in uplinks))
    total["counts"][0] = -0.7
    total["squares"][1:] -= 1e6  # a negative variance
    after = method.aggregate(server, [method.from_sums(total, 5)] * 5, a_round([0.2] * 5))
    assert torch.equal(after["prototypes"][0], server["prototypes"][0])
    torch.testing.assert_close(after["variance"], torch.tensor([[1.0] * 3, *[[0.0] * 3] * 3]).double())


def test_means_of_weights_with_counters_and_other_parts():
    def uplink(x, steps):
        weights = {"params": {"w": torch.tensor([[x, 1.0]])}, "buffers": {"steps": torch.tensor(steps)}}
        return {"weights": weights, "control": {"w": torch.tensor([x * 2])}, "empty": {}}

    uplinks = [uplink(1.0, 5), uplink(2.0, 7), uplink(6.0, 9)]
    parts = Additive(Scaffold(), uplinks, {"weights": tree.map_tree(lambda leaf: leaf * 0 + 1, uplinks[0]["weights"])})
    assert parts.vectors == ["weights/params/w", "control/w"]
    assert parts.rows("weights/params/w").tolist() == [[0, 0], [1, 0], [5, 0]]
    assert parts.rows("control/w").tolist() == [[2], [4], [12]]
    one = parts.stand_in(combine_robustly(parse_rule("median"), parts))
    assert tree.equal(one, uplink(2.0, 7))
    assert one["weights"]["buffers"]["steps"].dtype is torch.int64


def test_a_variance_never_becomes_negative():
    weights = [{"weights": {"params": {}, "buffers": {"n.running_var": torch.tensor([-v])}}} for v in (1.0, 2.0)]
    parts = Additive(FedAvg(), weights, {})
    assert (
        parts.stand_in({"weights/buffers/n.running_var": torch.tensor([-3.0])})["weights"]["buffers"]["n.running_var"]
        == 0
    )


@dataclass(frozen=True)
class Silent(FedAvg):
    """FedAvg that overrides `aggregate` without stating what it needs."""

    def aggregate(self, server, uplinks, round):
        return super().aggregate(server, uplinks[:1], round._replace(arrivals=round.arrivals[:1]))


@dataclass(frozen=True)
class Stated(Silent):
    """FedAvg that overrides `aggregate` and states what it needs."""

    combines = "individual"


def test_overriding_aggregate_requires_a_statement():
    assert [says_how_it_combines(cls) for cls in (Method, FedAvg, Scaffold, FedProto, FedVTC, Stated)] == [True] * 6
    assert not says_how_it_combines(Silent)


# rules


def combined(word, rows, received=0.0):
    """Combine vectors (n, d), split into two tensors; return (d,)."""
    rows = torch.as_tensor(rows, dtype=torch.float64)
    uplinks = [{"weights": {"params": {"a": row[:1], "b": row[1:]}, "buffers": {}}} for row in rows]
    base = tree.map_tree(lambda leaf: torch.full_like(leaf, received), uplinks[0])
    parts = Additive(FedAvg(), uplinks, base)
    one = parts.stand_in(combine_robustly(parse_rule(word), parts))["weights"]["params"]
    return torch.cat([one["a"], one["b"]])


@pytest.mark.parametrize(
    ("word", "rows", "expected"),
    [
        ("median", [[0, 5], [1, 4], [9, 0]], [1, 4]),
        ("median", [[0, 5], [1, 4], [3, 3], [9, 0]], [2, 3.5]),
        ("trimmed:0.2", [[0, 1], [1, 2], [2, 3], [3, 7], [99, -9]], [2, 2]),
        ("trimmed:0.01", [[0, 0], [1, 1], [5, 5]], [1, 1]),  # at least one of each end
        ("trimmed:0.4", [[0, 0], [1, 1], [3, 3], [9, 9]], [2, 2]),  # two values are left
        ("krum:1", [[0, 0], [1, 0], [1, 1], [2, 1], [50, 50]], [1, 0]),
        ("multikrum:1", [[0, 0], [2, 0], [0, 2], [2, 2], [50, 50]], [1, 1]),
        ("multikrum:3", [[0, 0], [2, 0], [0, 2], [2, 2], [50, 50]], [1, 1]),  # five uplinks support F = 1
        ("geometric", [[0, 0], [4, 0], [0, 4], [4, 4]], [2, 2]),
        ("geometric", [[1, 1], [1, 1], [1, 1], [7, 9]], [1, 1]),  # a majority at one point
        ("geometric", [[0, 0], [2, 0], [1, 3**0.5]], [1, 3**-0.5]),  # the Fermat point of an equilateral triangle
        ("norm-bound:2", [[1, 0], [0, 1], [0, -1], [30, 40]], [(1 + 1.2) / 4, 1.6 / 4]),
        ("norm-bound:1", [[3, 4], [3, 4], [3, 4]], [3, 4]),
        ("clip:1", [[1, 1], [1, 1], [1, 1], [9, 9]], [1, 1]),
        ("clip:1000", [[0, 0], [1, 0], [5, 3]], [2, 1]),  # nothing is shortened: the mean
    ],
)  # fmt: skip
def test_known_results(word, rows, expected):
    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(combined(word, rows), torch.tensor(expected).double(), **close)
    moved = torch.tensor(rows).double() + 7.0  # all rules are relative to the downlink
    torch.testing.assert_close(combined(word, moved, received=7.0), torch.tensor(expected).double() + 7, **close)


N, F, D = 11, 4, 50
HONEST = 1.0 + torch.randn(N - F, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
UNIT = torch.ones(D, dtype=torch.float64)
HOSTILE = {
    "a thousand": 1e3 * UNIT,
    "a million": -1e6 * UNIT,
    "the largest in float32": 3e37 * UNIT,
    "the largest of all": 1e300 * UNIT,
    "the other sign": -10 * HONEST.mean(0),
    "like an honest one": HONEST[0],
    "nothing": 0 * UNIT,
}


@pytest.mark.parametrize("attack", HOSTILE)
@pytest.mark.parametrize(
    "word", ["median", "trimmed:0.36", "krum:4", "multikrum:4", "geometric", "clip:1", "norm-bound:1"]
)
def test_a_minority_cannot_move_the_result_far(word, attack):
    """Four of eleven clients send the same vector. No rule supports more (krum: 2 F + 3 = 11)."""
    middle, spread = HONEST.mean(0), float((HONEST - HONEST.mean(0)).norm(dim=1).mean())
    result = combined(word, torch.cat([HONEST, HOSTILE[attack].expand(F, D)]))
    error = float((result - middle).norm())
    if word.startswith("norm-bound"):  # it bounds the move, and does not remove it
        assert error <= 2 * float(HONEST.norm(dim=1).max())
    else:
        assert error <= 1.5 * spread


@pytest.mark.parametrize("word", ["median", "geometric", "clip:1", "multikrum:4"])
def test_a_majority_moves_the_result(word):
    """With six malicious clients of eleven, beyond the bound, no rule helps. The tests above would detect a rule without effect."""
    result = combined(word, torch.cat([HONEST[:5], (1e6 * UNIT).expand(6, D)]))
    assert float((result - HONEST.mean(0)).norm()) > 1e5


def test_rules_do_not_depend_on_the_order_of_clients():
    rows = torch.cat([HONEST, 1e3 * UNIT[None]])
    for kind in RULES.values():
        torch.testing.assert_close(combined(kind.example, rows), combined(kind.example, rows.flip(0)))


@pytest.mark.parametrize("word", [kind.example for kind in RULES.values()])
def test_examples_are_rules_and_equal_uplinks_stay_as_they_are(word):
    assert parse_rule(word).name == word.partition(":")[0]
    torch.testing.assert_close(combined(word, [[1.5, -2.0]] * 5), torch.tensor([1.5, -2.0]).double())


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("mean", "unknown rule 'mean'.*median"),
        ("medain", "did you mean 'median'"),
        ("median:1", "'median:1' is not of the form median"),
        ("trimmed", "'trimmed' is not of the form trimmed:FRACTION, such as trimmed:0.2"),
        ("trimmed:0.5", "FRACTION of trimmed:FRACTION must be above 0 and below 0.5"),
        ("krum:0", "F of krum:F must be an integer of at least 1"),
        ("krum:1.5", "must be an integer"),
        ("clip:nan", "not of the form clip:C"),
        ("norm-bound:0", "must be above 0"),
        ("norm-bound:-1", "must be above 0"),
    ],
)
def test_wrong_rules_are_refused(word, message):
    with pytest.raises(ValueError, match=message):
        parse_rule(word)
