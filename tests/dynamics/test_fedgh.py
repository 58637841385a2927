"""FedGH: the server's head learns the class means of the clients' features."""

import pytest
import torch

from fedloom import FedGH, Nets, Round, Stream, tree
from fedloom.method import Arrival
from small import spied

Y, D = 3, 4


@pytest.fixture(autouse=True)
def _wide(float64):
    """Run all tests of this file in float64."""


def trained(method, uplinks):
    """Return the head of zeros after one aggregation."""
    modules = {"head": torch.nn.Linear(D, Y)}
    arrivals = tuple(Arrival(i, i, 1 / len(uplinks)) for i in range(len(uplinks)))
    round = Round(0, 9, arrivals, Stream(3), nets=lambda weights: Nets(modules, **weights))
    zeros = {"head.weight": torch.zeros(Y, D), "head.bias": torch.zeros(Y)}
    return method.aggregate({"weights": {"params": zeros, "buffers": {}}}, uplinks, round)["weights"]["params"]


def test_the_first_step_is_the_gradient_of_the_cross_entropy():
    """From a head of zeros, the first step is lr (onehot - 1 / Y) z'."""
    z = torch.tensor([[1.0, -2, 0, 3]])
    head = trained(FedGH(server_lr=0.3), [{"prototypes": z, "counts": torch.tensor([0.0, 7, 0])}])
    error = torch.tensor([-1.0, 2, -1]) / 3
    torch.testing.assert_close(head["head.weight"], 0.3 * error[:, None] * z)
    torch.testing.assert_close(head["head.bias"], 0.3 * error)


def test_means_that_are_separable_are_learned():
    """Two clients have different classes, and one class in common. The number of examples has no effect."""
    ups = [
        {"prototypes": torch.eye(D)[[0, 1]], "counts": torch.tensor([1.0, 2, 0])},
        {"prototypes": torch.eye(D)[[1, 2]], "counts": torch.tensor([0.0, 9, 1])},
    ]
    head = trained(FedGH(server_lr=1.0, server_epochs=200, server_batch=2), ups)
    logits = torch.eye(D)[:3] @ head["head.weight"].T + head["head.bias"]
    assert torch.nn.functional.cross_entropy(logits, torch.arange(3)) < 0.02
    more = [up | {"counts": up["counts"] * 5} for up in ups]
    assert tree.equal(head, trained(FedGH(server_lr=1.0, server_epochs=200, server_batch=2), more))


def test_clients_send_the_means_of_the_trained_body_and_no_head(experiment):
    """Architectures differ. With lr 0, the head does not change. It is scored with each client's own body."""
    settings = {"models": ["mlp", "resnet8"], "width": 12, "data.rows": 120}
    run = experiment(FedGH(server_lr=0.0), engine="debug+bytes+sequential", **settings)
    rounds, head = spied(run), tree.clone(run.server["weights"])
    kinds = run.run()["bytes_by_kind"]
    assert tree.equal(run.server["weights"], head)
    assert set(kinds["uplink"]) == {"prototypes", "counts", "header"}
    assert kinds["downlink"]["weights"] == 2 * 4 * (12 * 10 + 10) * 8
    for i in range(4):
        assert all(name.startswith("body.") for name in run.engine.client(i).weights["params"])
        nets = Nets(run.problem.modules(run.problem.arch_of[i]), **run.engine.client(i).weights)
        x, y = run.data.train(i)
        with torch.no_grad():
            z = nets.body(x)
            expected = torch.stack([z[y == label].mean(0) for label in y.unique()])
            scored = z @ head["params"]["head.weight"].T + head["params"]["head.bias"]
        torch.testing.assert_close(rounds[1].replies[i].uplink["prototypes"], expected, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(run.personal_model(i)(x), scored)
    assert run.rows[-1]["train.loss"] < run.rows[0]["train.loss"]
