"""FedNTD, FedLC and FedDisco: losses and weights that depend on class labels, with known results."""

import math

import pytest
import torch

from fedloom import FedDisco, FedLC, FedNTD, Round, Stream, losses, tree
from fedloom.method import Arrival, ClientData
from small import spied


def same(one, other):
    one.run(), other.run()
    tree.map_tree(lambda a, b: torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12) or a, one.server, other.server)


def test_fedntds_distillation_has_known_values():
    """Teacher (., ln 3, 0), student (., 0, 0), true class 0: q = (3/4, 1/4) and (1/2, 1/2). With two classes, the distillation is 0."""
    teacher, student = torch.tensor([[7.0, math.log(3), 0.0]]), torch.tensor([[-5.0, 0.0, 0.0]], requires_grad=True)
    value = FedNTD().distillation(student, teacher, torch.tensor([0]))
    assert float(value.detach()) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-5)
    (slope,) = torch.autograd.grad(value, student)
    torch.testing.assert_close(slope, torch.tensor([[0.0, -0.25, 0.25]]))  # the true class has no effect
    warm = FedNTD(temperature=2.0).distillation(2 * student, 2 * teacher, torch.tensor([0]))
    assert float(warm.detach()) == pytest.approx(4 * float(value.detach()), rel=1e-5)
    assert FedNTD().distillation(torch.randn(4, 2), torch.randn(4, 2), torch.tensor([0, 1, 0, 1])).abs() < 1e-6


def test_fedntd_is_fedavg_in_its_first_step_and_without_its_term(experiment):
    first = {"rounds": 1, "batch_size": 1000}
    same(experiment("fedntd", **first), experiment("fedavg", **first))
    same(experiment("fedntd", **{"method.beta": 0.0}), experiment("fedavg"))
    kept, plain = experiment("fedntd", **{"method.beta": 5.0}), experiment("fedavg")
    kept.run(), plain.run()
    assert kept.rows[-1]["train.forgotten"] > 0
    assert not tree.equal(kept.server, plain.server)


def margins(method, *counts):
    data = ClientData(sum(counts), torch.tensor(counts, dtype=torch.float32))
    return method.init_memory({}, None, data)["margins"]


def test_fedlcs_margins_and_losses_have_known_values():
    assert margins(FedLC(), 16, 1).tolist() == [-0.5, -1.0]
    assert margins(FedLC(), 16, 0).tolist() == [-0.5, torch.tensor(losses.ABSENT).item()]
    assert margins(FedLC(tau=0.0), 16, 0).tolist() == [0.0, 0.0]
    from fedloom.methods.fedlc import unbounded

    label = torch.tensor([0])
    assert float(unbounded(torch.tensor([[2.0, 0.0]]), label)) == -2.0
    alone = torch.tensor([[2.0, losses.ABSENT]], requires_grad=True)
    value = unbounded(alone, label)
    assert float(value.detach()) == 0.0
    assert torch.autograd.grad(value, alone)[0].isfinite().all()


def test_fedlc_without_margins_is_fedavg_and_never_trains_a_class_that_a_client_lacks(experiment):
    same(experiment("fedlc", **{"method.tau": 0.0}), experiment("fedavg"))
    skewed = {"clients": 3, "rounds": 1, "partition.alpha": 0.1}
    for more in ({}, {"method.denominator": "others"}):
        run = experiment("fedlc", **skewed, **more)
        start, sent = run.server["weights"]["params"]["model.head.weight"], spied(run)
        run.run()
        for reply in sent[0].replies:
            held = run.data.train(reply.client)[1].unique()
            moved = (reply.uplink["weights"]["params"]["model.head.weight"] != start).any(1)
            assert moved.nonzero()[:, 0].tolist() == held.tolist() if len(held) > 1 else not moved.any()


def shares(method, counts, ages=None):
    n = torch.tensor(counts, dtype=torch.float64).sum(1)
    ages = ages or [0] * len(counts)
    weights = [float(k) / math.sqrt(1 + age) for k, age in zip(n, ages, strict=True)]
    arrivals = tuple(Arrival(i, i, w / sum(weights), age) for i, (w, age) in enumerate(zip(weights, ages, strict=True)))
    return method.shares([{"counts": torch.tensor(c)} for c in counts], Round(0, 9, arrivals, Stream(0)))


EVEN, ONE = [5.0, 5.0], [10.0, 0.0]


@pytest.mark.parametrize(
    ("settings", "distance"),
    [
        ({}, 1.0),
        ({"metric": "l1"}, 1.0),
        ({"metric": "l2"}, math.sqrt(0.5)),
        ({"metric": "cosine"}, 1 - math.sqrt(0.5)),
    ],
)
def test_feddiscos_weights_have_known_values(settings, distance):
    """Of two equally large clients, one has all classes, the other one class: max(1/2 - a d + b, 0), then divided by the sum."""
    low = 0.5 - 0.5 * distance + 0.1
    assert shares(FedDisco(**settings), [EVEN, ONE]) == pytest.approx([0.6 / (0.6 + low), low / (0.6 + low)], rel=1e-6)


def test_feddisco_without_its_terms_is_fedavg_and_it_never_divides_by_zero(experiment):
    same(experiment("feddisco", **{"method.a": 0.0, "method.b": 0.0}), experiment("fedavg"))
    assert shares(FedDisco(a=0.0, b=0.0), [EVEN, [30.0, 0.0]]) == pytest.approx([0.25, 0.75])
    assert shares(FedDisco(a=9.0, b=-0.6), [EVEN, ONE]) == [0.5, 0.5]  # no weight is positive
    assert shares(FedDisco(), [EVEN, EVEN]) == [0.5, 0.5]  # all divergences are 0
    assert shares(FedDisco(), [EVEN, EVEN], [0, 3]) == pytest.approx([2 / 3, 1 / 3])  # late
