"""IFCA: clients find the cluster of their group, and with one cluster, the method is FedAvg."""

import numpy as np
import pytest
import torch

from fedloom import IFCA, from_arrays, tree


def test_one_cluster_is_fedavg(experiment):
    one, plain = experiment(IFCA(clusters=1)), experiment("fedavg")
    one.run(), plain.run()
    (model,) = tree.unstack(one.server["models"])
    tree.map_tree(
        lambda a, b: torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12) or a, model, plain.server["weights"]
    )


def test_two_groups_with_opposite_labels_find_their_own_models(experiment):
    """Two clients label x > 0 as 1, and two as 0. From the first round on, each group selects one model, which then fits its examples."""
    x = np.random.default_rng(0).normal(size=(80, 1))
    group = np.repeat([0, 0, 1, 1], 20)
    y = (x[:, 0] > 0).astype(int) ^ group
    owners = {"owner": np.repeat(["a", "b", "c", "d"], 20)}
    run = experiment(
        IFCA(clusters=2, lr=1.0), dataset=from_arrays(x, y, columns=owners), model="logistic", clients=4, rounds=3,
        batch_size=100, partition={"name": "natural", "column": "owner", "min_examples": 2},
    )  # fmt: skip
    starts = tree.unstack(run.server["models"])
    assert not tree.equal(*starts)
    run.run()
    assert [(row["server.cluster0"], row["server.cluster1"]) for row in run.rows] == [(2.0, 2.0)] * 3
    assert run.rows[-1]["personal_accuracy"] >= 0.9
    assert run.rows[-1].get("server_accuracy") is None
    slopes = [model["params"]["model.head.weight"] for model in tree.unstack(run.server["models"])]
    assert (slopes[0][1] - slopes[0][0]) * (slopes[1][1] - slopes[1][0]) < 0


def test_a_model_that_no_client_takes_stays_as_it_is(experiment):
    run = experiment(IFCA(clusters=3), clients=1, rounds=1)
    before = tree.unstack(tree.clone(run.server["models"]))
    run.run()
    taken = [run.rows[0][f"server.cluster{j}"] for j in range(3)]
    assert sorted(taken) == [0, 0, 1]
    after = tree.unstack(run.server["models"])
    assert [float(not tree.equal(a, b)) for a, b in zip(before, after, strict=True)] == taken


@pytest.mark.parametrize("cluster", [[0.0, 0.0], [1.0, 1.0], [0.0, 2.0], [-1.0, 1.0]])
def test_an_uplink_names_one_cluster(cluster):
    method = IFCA(clusters=2)
    assert method.uplink_fault({"cluster": torch.tensor(cluster)}, None) == "'cluster' does not name one cluster"
    assert not method.uplink_fault({"cluster": torch.tensor([0.0, 1.0])}, None)
