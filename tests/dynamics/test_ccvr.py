"""CCVR: FedAvg until the end, and then a head for features of all classes, from statistics that equal those of the pooled features."""

import torch

from fedloom import CCVR, Batch, Client, Nets, Round, Stream, Turn
from fedloom.nets import read_weights

Y, P = 3, 2
CLOSING = Turn(4, 3, 9, closing=True)


class Body(torch.nn.Module):
    """A model whose features are its inputs."""

    def __init__(self):
        super().__init__()
        self.body, self.head = torch.nn.Identity(), torch.nn.Linear(P, Y)

    def forward(self, x):
        return self.head(self.body(x))


def sent(method, z, y, modules, weights):
    zero = {"counts": torch.zeros(Y), "sums": torch.zeros(Y, P), "products": torch.zeros(Y, P, P)}
    total = {name: value.double() for name, value in zero.items()}
    found = method.statistics(Nets(modules, **weights), Batch(z, y), total, {}, {})
    return method.uplink(Client(weights, {"statistics": found}, {}), weights, {}, CLOSING)[0]


def clients():
    """Return two clients. The first lacks class 2, and the second has one example of class 1."""
    sizes = [(5, 4, 0), (3, 1, 6)]
    labels = [torch.cat([torch.full((n,), y) for y, n in enumerate(mine)]) for mine in sizes]
    return [
        (Stream(k).normal((len(y), P)) @ torch.tensor([[1.0, 0.7], [0.0, 0.5]]) + 4 * y[:, None], y)
        for k, y in enumerate(labels)
    ]


def test_the_merged_statistics_are_those_of_the_pooled_features():
    method, modules = CCVR(), {"model": Body()}
    weights = read_weights(modules)
    counts, means, covariances = method.merged([sent(method, z, y, modules, weights) for z, y in clients()])
    z, y = (torch.cat(parts) for parts in zip(*clients(), strict=True))
    assert counts.tolist() == [8, 5, 6]
    for c in range(Y):
        torch.testing.assert_close(means[c].float(), z[y == c].mean(0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(covariances[c].float(), z[y == c].T.cov(), rtol=1e-4, atol=1e-5)


def test_virtual_features_have_the_classes_moments_and_proportions():
    method = CCVR(virtual_features=4000)
    counts, means = (
        torch.tensor([30.0, 0.0, 10.0]).double(),
        torch.tensor([[0.0, 5.0], [9.0, 9.0], [-5.0, 0.0]]).double(),
    )
    covariances = torch.stack([torch.tensor([[2.0, 1.0], [1.0, 1.0]]).double()] * Y)
    z, y = method.virtual(counts, means, covariances, Stream(0))
    assert y.bincount(minlength=Y).tolist() == [9000, 0, 3000]
    torch.testing.assert_close(z[y == 0].mean(0), means[0].float(), atol=0.05, rtol=0)
    torch.testing.assert_close(z[y == 0].T.cov(), covariances[0].float(), atol=0.1, rtol=0)
    _, y = CCVR(virtual_features=10, sampling="equal").virtual(counts, means, covariances, Stream(0))
    assert y.bincount(minlength=Y).tolist() == [10, 0, 10]


def test_the_calibration_separates_classes_that_no_client_has_seen_together():
    """Each client has one class, whose features are at its own corner. The initial head is wrong for all of them."""
    method, modules = CCVR(calibration_lr=0.5), {"model": Body()}
    weights = read_weights(modules)
    corners = torch.tensor([[4.0, 0.0], [0.0, 4.0], [-4.0, -4.0]])
    data = [(corners[c] + 0.1 * Stream(c).normal((6, P)), torch.full((6,), c)) for c in range(Y)]
    ups = [sent(method, z, y, modules, weights) for z, y in data]
    server = {"weights": weights, "head": {"model.head.weight": -corners, "model.head.bias": torch.zeros(Y)}}
    round = Round(4, Y, (), Stream(1), nets=lambda weights: Nets(modules, **weights))
    head = method.finish(server, ups, round)["head"]
    right = [
        ((z @ head["model.head.weight"].T + head["model.head.bias"]).argmax(1) == y).float().mean() for z, y in data
    ]
    assert min(right) == 1
    assert method.finish(server, ups, round)["weights"] is weights


def test_only_the_last_score_differs_from_fedavg_and_only_the_head_changes(experiment):
    settings = {"model": {"name": "mlp", "hidden": 6}, "clients": 4, "cohort": 2, "data.rows": 160}
    runs = [experiment(name, **settings) for name in ("ccvr", "fedavg")]
    for run in runs:
        run.run()
    ours, plain = runs
    same = [{k: v for k, v in run.rows[0].items() if "accuracy" in k or "loss" in k} for run in runs]
    assert same[0] == same[1]
    for kind, part in plain.server["weights"].items():
        assert all(torch.equal(ours.server["weights"][kind][name], value) for name, value in part.items())
    assert not torch.equal(
        ours.server["head"]["model.head.weight"], plain.server["weights"]["params"]["model.head.weight"]
    )
    once = 4 * 8 * 10 * (1 + 6 + 21)  # all four clients, float64
    assert sum(ours.ledger.kinds["uplink"][name] for name in CCVR.also_travels) == once
    deployed = ours.hooks.deploy(ours.server, 2).common["weights"]["params"]
    assert torch.equal(deployed["model.head.bias"], ours.server["head"]["model.head.bias"])
