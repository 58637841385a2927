"""FD: clients learn from the mean predictions of other clients, without their own predictions."""

import math

import pytest
import torch

from fedloom import FD, Batch, Local, Nets, Round, Stream, tree
from fedloom.method import Arrival
from fedloom.models import arch
from fedloom.nets import read_weights
from small import spied

WHOLE = {"batch_size": 1000, "eval_every": 2, "data.rows": 160}


@pytest.fixture(autouse=True)
def _wide(float64):
    """Run all tests of this file in float64."""


def round_of(*clients):
    arrivals = tuple(Arrival(i, slot, 1 / len(clients)) for slot, i in enumerate(clients))
    return Round(0, 4, arrivals, Stream(0))


def test_without_distillation_every_client_trains_alone(experiment):
    free, alone = experiment(FD(gamma=0.0), **WHOLE), experiment(Local(), **WHOLE)
    free.run()
    alone.run()
    for i in range(4):
        assert tree.equal(free.engine.client(i).weights, alone.engine.client(i).weights)


def test_each_of_two_clients_receives_the_means_of_the_other(experiment):
    """Predictions are those of the trained model in evaluation mode, and an uplink has one row for each class of the client."""
    run = experiment(FD(), clients=2, **WHOLE)
    rounds = spied(run)
    run.run()
    first, second = rounds
    assert all((message["counts"] == 0).all() for message in first.sent)
    for mine, other in ((0, 1), (1, 0)):
        sent = first.replies[other].uplink
        held = sent["counts"] > 0
        assert sent["counts"].tolist() == run.data.train(other)[1].bincount(minlength=10).tolist()
        torch.testing.assert_close(second.sent[mine]["predictions"][held], sent["predictions"], rtol=0, atol=0)
        assert second.sent[mine]["counts"].tolist() == held.double().tolist()
    nets = Nets(run.problem.modules(0), **run.engine.client(0).weights)
    x, y = run.data.train(0)
    with torch.no_grad():
        p = nets.model(x).softmax(1)
    expected = torch.stack([p[y == label].mean(0) for label in y.unique()])
    torch.testing.assert_close(second.replies[0].uplink["predictions"], expected)


def test_only_members_of_the_latest_round_are_left_out():
    """Clients 0, 1 and 2 send uplinks; client 3 does not. Only client 0 has class 2."""
    method, server = FD(), {"predictions": torch.ones(3, 3, 3), "counts": torch.ones(3, 3), "clients": torch.arange(3)}
    rows = torch.eye(3)
    ups = [
        {"predictions": rows[[0, 0]], "counts": torch.tensor([2.0, 0, 5])},
        {"predictions": rows[[1]], "counts": torch.tensor([4.0, 0, 0])},
        {"predictions": rows[[2, 2]], "counts": torch.tensor([1.0, 3, 0])},
    ]
    after = method.aggregate(server, ups, round_of(0, 1, 2))
    down = method.downlink(after, (0, 3), round_of())
    assert down.to(0)["counts"].tolist() == [2, 1, 0]
    assert down.to(0)["predictions"].tolist() == [[0, 0.5, 0.5], [0, 0, 1], [0, 0, 0]]
    assert down.to(1)["counts"].tolist() == [3, 1, 1]
    torch.testing.assert_close(down.to(1)["predictions"][0], torch.full((3,), 1 / 3))
    assert tree.equal(method.deploy(after, None, round_of()).common, down.to(1))
    fewer = method.aggregate(after, ups[:1], round_of(2))
    assert fewer["clients"].tolist() == [2, -1, -1]
    assert method.mean_without(fewer, 2)["counts"].tolist() == [0, 0, 0]


def test_with_certain_targets_the_term_is_the_cross_entropy():
    """Targets one-hot(y) add gamma CE for examples of known classes; the loss with uniform targets is computed by hand."""
    method, choice = FD(gamma=2.0), arch("mlp", (1, 8, 8), 3)
    modules = {"model": choice.model()}
    nets, batch = Nets(modules, **read_weights(modules)), Batch(torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0]))
    down = {"predictions": torch.eye(3), "counts": torch.ones(3)}
    loss, logs = method.loss(nets, batch, down, {})
    assert loss.item() == pytest.approx(3 * logs["cross_entropy"].item())
    _, some = method.loss(nets, batch, down | {"counts": torch.tensor([0.0, 1, 0])}, {})
    log_p = nets.model(batch.x).log_softmax(1)
    assert some["distillation"].item() == pytest.approx(-log_p[1, 1].item() / 4)
    even = method.loss(nets, batch, down | {"predictions": torch.full((3, 3), 1 / 3)}, {})[1]["distillation"]
    assert even.item() == pytest.approx(-log_p.mean().item())
    assert even.item() > math.log(3)


def test_architectures_and_their_widths_may_differ(experiment):
    run = experiment(FD(), engine="debug+bytes+sequential", models=["mlp", "resnet8"], **{"data.rows": 120})
    kinds = run.run()["bytes_by_kind"]
    held = sum(int((run.data.train(i)[1].bincount() > 0).sum()) for i in range(4))
    assert kinds["uplink"]["predictions"] == 2 * held * 10 * 8
    assert kinds["downlink"]["predictions"] == 2 * 4 * 10 * 10 * 8
    assert set(kinds["uplink"]) == {"predictions", "counts", "header"}


def test_predictions_must_be_probabilities():
    good = {"predictions": torch.eye(2)[:1], "counts": torch.tensor([3.0, 0])}
    assert FD().uplink_fault(good, torch.tensor([3, 1])) == ""
    assert "not a probability" in FD().uplink_fault(good | {"predictions": torch.tensor([[-1.0, 2.0]])}, None)
    assert "more examples" in FD().uplink_fault(good, torch.tensor([2, 1]))
    with pytest.raises(ValueError, match=r"gamma=-1\.0"):
        FD(gamma=-1.0)
