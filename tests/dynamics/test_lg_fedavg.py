"""LG-FedAvg: heads are averaged with equal weights for all clients; clients keep their bodies, which may differ."""

import pytest
import torch

from fedloom import LGFedAvg, tree
from small import spied

TINY = {"clients": 3, "rounds": 2, "data.rows": 90}


def test_heads_are_averaged_with_equal_weights_whatever_the_numbers_of_examples(experiment):
    run = experiment("lg_fedavg", **TINY)
    rounds = spied(run)
    run.run()
    assert len({run.data.n_train(i) for i in range(3)}) > 1
    heads = [reply.uplink["weights"] for reply in rounds[-1].replies]
    assert set(heads[0]["params"]) == {"model.head.weight", "model.head.bias"}
    tree.map_tree(lambda a, b: torch.testing.assert_close(a, b) or a, run.server["weights"], tree.mean(heads))
    bodies = [run.engine.client(i).weights["params"]["model.body.linear.weight"] for i in range(3)]
    assert not torch.equal(bodies[0], bodies[1])
    assert run.rows[-1]["server_accuracy"] is None


def test_with_one_client_it_is_fedavg(experiment):
    settings = {"clients": 1, "rounds": 2, "data.rows": 60}
    one, other = experiment("lg_fedavg", **settings), experiment("fedavg", **settings)
    one.run(), other.run()
    assert tree.equal(tree.merge(one.engine.client(0).weights, one.server["weights"]), other.server["weights"])


def test_bodies_of_different_architectures_share_a_head(experiment):
    run = experiment(LGFedAvg(), models="mlp,fedavg_cnn", width=12, **TINY)
    assert run.run()["rejected"] == 0


def test_late_uplinks_count_less(experiment):
    """Equal shares are divided by sqrt(1 + age), like shares that depend on numbers of examples."""
    late = {"devices.slow": 0.5, "devices.slowdown": 2, "devices.stragglers": "late"}
    run, seen = experiment("lg_fedavg", **TINY, **late), []
    aggregate = run.hooks.aggregate

    def watched(server, uplinks, round):
        seen.append(round.arrivals)
        return aggregate(server, uplinks, round)

    run.hooks.aggregate = watched
    run.run()
    assert {arrival.age for arrivals in seen for arrival in arrivals} == {0, 1}
    for arrivals in seen:
        weights = [(1 + arrival.age) ** -0.5 for arrival in arrivals]
        assert [arrival.share for arrival in arrivals] == pytest.approx([w / sum(weights) for w in weights])
