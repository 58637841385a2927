"""Clustered sampling: urns without bias, one client per group, and Ward's clustering."""

import numpy as np
import pytest
import torch

from fedloom import ClusteredSampling, ConfigError, Round, Stream, tree
from fedloom.methods.clustered_sampling import filled, largest_first, ward_clusters
from small import losing


def round_of(examples, number=0):
    return Round(number, len(examples), (), Stream(0, number), examples=tuple(examples))


@pytest.mark.parametrize("m", [1, 3, 8])
def test_urns_hold_every_client_in_proportion_to_its_examples(m):
    """Each urn is full, and a client with n examples has m n places in total (integers, so exactly). Client 3 is larger than an urn."""
    examples = [5, 1, 9, 70, 12, 3, 8, 2]
    changes = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    for method in (ClusteredSampling(), ClusteredSampling(distance="l1"), ClusteredSampling(distance="l2")):
        for urns in (method.similar(changes, examples, m, Stream(1)), filled([], largest_first(examples), examples, m)):
            assert np.stack(urns).sum(1).tolist() == [sum(examples)] * m
            assert np.stack(urns).sum(0).tolist() == [m * n for n in examples]
            assert (np.stack(urns) >= 0).all()


def test_groups_with_orthogonal_changes_send_one_client_each_in_every_round():
    changes = torch.eye(3).repeat(4, 1)  # client i is in group i mod 3
    method, seen = ClusteredSampling(), set()
    for number in range(6):
        drawn = method.draw(changes, 3, round_of([7] * 12, number)).nonzero()[:, 0]
        assert sorted((drawn % 3).tolist()) == [0, 1, 2]
        seen |= set(drawn.tolist())
    assert len(seen) > 6
    by_examples = ClusteredSampling(urns="size")
    assert any(
        sorted((by_examples.draw(changes, 3, round_of([7] * 12, k)).nonzero()[:, 0] % 3).tolist()) != [0, 1, 2]
        for k in range(6)
    )


def test_the_largest_clusters_stay_whole():
    """Groups of 8, 7 and 7 examples, and two urns of 22 places: the first stays in one urn, and one of the others is divided."""
    changes = torch.eye(3).repeat_interleave(torch.tensor([4, 3, 3]), 0)
    urns = np.stack(ClusteredSampling().similar(changes, [2, 2, 2, 2, 3, 2, 2, 3, 2, 2], 2, Stream(0)))
    assert sorted(urns[:, :4].sum(1).tolist()) == [0, 16]
    assert sorted(urns[:, group].sum(1).min() > 0 for group in (slice(4, 7), slice(7, 10))) == [False, True]


def test_clients_that_were_never_drawn_are_at_distance_0_from_all():
    changes = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    found = ClusteredSampling().distances(changes)
    assert found[0, 2] == pytest.approx(np.pi / 2)
    assert found.count_nonzero() == 2
    assert ClusteredSampling(distance="l2").distances(changes)[0, 2] == pytest.approx(5)
    assert ClusteredSampling(distance="l1").distances(changes)[0, 2] == pytest.approx(3)


def test_clusters_are_those_of_wards_linkage_cut_largest_first():
    """As in the released code: the heights of the linkage are replaced by the sizes, and the tree is cut at the capacity."""
    hierarchy = pytest.importorskip("scipy.cluster.hierarchy")
    rng = np.random.default_rng(0)
    for capacity in (6, 15, 40, 1000):
        points, sizes = rng.normal(size=(20, 5)), rng.integers(1, 6, 20).tolist()
        linkage, totals = hierarchy.linkage(points, "ward"), [*sizes]
        for row in linkage:
            totals.append(totals[int(row[0])] + totals[int(row[1])])
            row[2] = totals[-1]
        labels = hierarchy.fcluster(linkage, capacity, criterion="distance")
        expected = sorted(np.flatnonzero(labels == label).tolist() for label in set(labels))
        assert sorted(ward_clusters(points, sizes, capacity)) == expected


def test_a_cohort_of_all_equal_clients_is_fedavg(experiment):
    settings = {"clients": 4, "partition.name": "iid", "data.rows": 100}
    one, plain = experiment("clustered_sampling", **settings), experiment("fedavg", **settings)
    assert len({one.data.n_train(i) for i in range(4)}) == 1
    one.run(), plain.run()
    tree.map_tree(lambda a, b: torch.testing.assert_close(a, b) or a, one.server["weights"], plain.server["weights"])


def test_a_client_that_is_drawn_twice_counts_twice_and_changes_are_kept(experiment):
    """The mean of the models is weighted by the draws of the clients that arrived; the others' changes stay 0."""
    for seed in range(20):
        run = experiment("clustered_sampling", seed=seed, clients=6, cohort=4, rounds=1, **{"data.rows": 120})
        drawn, start = run.server["drawn"].clone(), run.server["weights"]["params"]
        if drawn.max() > 1 and (drawn > 0).sum() > 2:
            break
    lost = int(drawn.nonzero()[-1])
    replies = []
    train = run.engine.train
    run.engine.train = lambda *given: replies.extend(train(*given)) or replies
    losing(run, {0: [lost]}).run()
    assert {reply.client for reply in replies} == set(drawn.nonzero()[:, 0].tolist())
    kept = {reply.client: reply.uplink["weights"]["params"] for reply in replies if reply.client != lost}
    total = sum(int(drawn[i]) for i in kept)
    for name, p in run.server["weights"]["params"].items():
        torch.testing.assert_close(p, sum(int(drawn[i]) / total * mine[name] for i, mine in kept.items()))
    flat = {i: torch.cat([leaf.flatten() for leaf in tree.leaves(tree.sub(mine, start))]) for i, mine in kept.items()}
    for i, change in enumerate(run.server["changes"]):
        assert torch.equal(change, flat[i]) if i in flat else not change.any()
    assert int(run.server["drawn"].sum()) == 4


def test_cohorts_of_different_sizes_and_unknown_examples_are_refused(experiment):
    with pytest.raises(ConfigError, match=r"participation=.*: clustered_sampling needs the same number of clients"):
        experiment("clustered_sampling", clients=8, rounds=5, participation="0.2-0.9").run()
    with pytest.raises(ConfigError, match=r"method=clustered_sampling: needs the number of examples of every client"):
        ClusteredSampling().draw(torch.zeros(2, 1), 1, round_of([3, 0]))
