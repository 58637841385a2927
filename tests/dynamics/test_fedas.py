"""FedAS: the alignment and the Fisher information, computed by hand, and the method without them."""

import pytest
import torch
from torch import nn

from fedloom import Batch, FedAS, Nets, tree
from small import spied

TINY = {"clients": 3, "rounds": 2, "data.rows": 90}


@pytest.fixture(autouse=True)
def _wide(float64):
    """Run all tests of this file in float64."""


class Plain(FedAS):
    """FedAS whose server weights bodies by numbers of examples."""

    def importances(self, uplinks, round):
        return round.shares


def test_without_alignment_and_fisher_information_it_is_fedper(experiment):
    one, other = experiment(Plain(align_lr=0.0), **TINY), experiment("fedper", **TINY)
    one.run(), other.run()
    assert tree.equal(one.server["weights"], other.server["weights"])
    assert [row["personal_accuracy"] for row in one.rows] == [row["personal_accuracy"] for row in other.rows]


def test_the_distance_is_a_mean_within_classes_and_a_sum_over_them():
    """The features are (1, 2) and (3, 0) for class 0, with prototype (1, 0), and (5, 5) for class 1, which has no prototype."""
    body = nn.Sequential()
    body.add_module("body", nn.Identity())
    batch = Batch(torch.tensor([[1.0, 2.0], [3.0, 0.0], [5.0, 5.0]]), torch.tensor([0, 0, 1]))
    memory = {"prototypes": {"sums": torch.tensor([[2.0, 0.0], [0.0, 0.0]]), "counts": torch.tensor([2.0, 0.0])}}
    nets = Nets({"model": body}, {}, {})
    assert FedAS().distance(nets, batch, {}, memory) == pytest.approx((4 / 2 + 4 / 2) / 2)
    memory["prototypes"]["counts"][1] = 1.0
    assert FedAS().distance(nets, batch, {}, memory) == pytest.approx(2 + 25)


def test_the_server_weighs_bodies_by_the_squared_gradients_of_the_trained_models(experiment):
    run = experiment(FedAS(fisher_batch=7), **TINY)
    rounds = spied(run)
    run.run()
    model, replies = run.problem.modules(0)["model"].eval(), rounds[-1].replies
    traces = []
    for reply in replies:
        own = tree.merge(run.engine.client(reply.client).weights, reply.uplink["weights"])["params"]
        wanted = {name.removeprefix("model."): p.clone().requires_grad_() for name, p in own.items()}
        x, y = (part.split(7) for part in run.data.train(reply.client))
        traces.append(0.0)
        for piece, labels in zip(x, y, strict=True):
            error = nn.functional.cross_entropy(torch.func.functional_call(model, wanted, (piece,)), labels)
            traces[-1] += sum(float(g.square().sum()) for g in torch.autograd.grad(error, list(wanted.values())))
        assert float(reply.uplink["fisher"]) == pytest.approx(traces[-1])
    mean = tree.mean([reply.uplink["weights"] for reply in replies], [t / sum(traces) for t in traces])
    tree.map_tree(lambda a, b: torch.testing.assert_close(a, b) or a, run.server["weights"], mean)


def test_clients_align_from_their_second_local_update_on(experiment):
    runs = [experiment(FedAS(align_lr=lr), **TINY) for lr in (0.0, 0.05)]
    rounds = [spied(run) for run in runs]
    for run in runs:
        run.run()
    plain, aligned = ([turns.replies[0].uplink["weights"]["params"] for turns in mine] for mine in rounds)
    assert tree.equal(plain[0], aligned[0])
    assert not tree.equal(plain[1], aligned[1])
    assert runs[1].rows[0]["align.loss"] == 0 < runs[1].rows[1]["align.loss"]


def test_the_aligned_body_is_nearer_to_the_clients_own_features(experiment):
    run = experiment(FedAS(align_lr=0.05, align_epochs=3), **TINY)
    run.run()
    down = run.hooks.deploy(run.server, 2)
    batch, found = Batch(*run.data.train(0)), []
    for adapt in (False, True):
        modules, client, _ = run.engine.personal(2, down, 0, adapt=adapt)
        nets = Nets(modules, client.weights["params"], client.weights["buffers"])
        found.append(float(FedAS().distance(nets, batch._replace(x=batch.x), {}, client.memory)))
    assert found[1] < 0.9 * found[0]
