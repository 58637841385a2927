"""FedDBE: the consensus mean, the regulariser and the shift on known answers."""

import pytest
import torch

from fedloom import Nets, tree
from fedloom.experiment.build import arithmetic
from fedloom.methods.feddbe import Domain


def test_the_running_mean_and_the_gradient_of_the_regulariser():
    """m = (1 - mu) m + mu mean(z); the gradient of kappa / 2 mean_d (m - G)^2 is kappa mu (m - G) / (D B) for each example."""
    domain = Domain(2, 0.25)
    domain.mean.copy_(torch.tensor([4.0, 0.0]))
    z = torch.tensor([[1.0, 2.0], [3.0, 2.0]], requires_grad=True)
    shifted, mean = domain(z)
    torch.testing.assert_close(mean.detach(), torch.tensor([3.5, 0.5]))
    torch.testing.assert_close(domain.mean, mean.detach())
    assert torch.equal(shifted, z)
    (slope,) = torch.autograd.grad(8.0 * (mean - 0.5).square().mean() / 2, z)
    torch.testing.assert_close(slope, 8.0 * 0.25 * torch.tensor([[3.0, 0.0]] * 2) / (2 * 2))
    domain.eval()
    domain(z)
    torch.testing.assert_close(domain.mean, torch.tensor([3.5, 0.5]))


def test_the_first_round_only_finds_the_mean_of_all_clients(experiment):
    """All clients take part for every size of the cohort, and the model does not change. The mean is that of the last batches."""
    run = experiment("feddbe", clients=4, cohort=2, rounds=2, batch_size=1000, **{"data.rows": 120})
    before = tree.clone(run.server)
    with arithmetic(run.settings):
        run.run_round(0)
    assert tree.equal(run.server["weights"], before["weights"])
    nets = Nets(run.problem.modules(0), **before["weights"])
    n = [run.data.n_train(i) for i in range(4)]
    means = [nets.model.body(run.data.train(i)[0].double()).mean(0).detach() for i in range(4)]
    expected = sum(k * m for k, m in zip(n, means, strict=True)) / sum(n)
    torch.testing.assert_close(run.server["mean"], expected)
    found = run.server["mean"]
    with arithmetic(run.settings):
        run.run_round(1)
    assert torch.equal(run.server["mean"], found)
    assert not tree.equal(run.server["weights"], before["weights"])
    assert run.rows[1]["cohort"] == 2
    shifts = [run.engine.client(i).weights["params"]["domain.shift"].any().item() for i in range(4)]
    assert sorted(shifts) == [False, False, True, True]


def test_the_regulariser_keeps_the_features_mean_near_the_consensus(experiment):
    small = {
        "clients": 3,
        "rounds": 4,
        "data.rows": 150,
        "method.lr": 0.02,
        "batch_size": 1000,
        "method.local_epochs": 10,
    }
    runs = {k: experiment("feddbe", **small, **{"method.kappa": k}) for k in (0.0, 10.0)}
    away = {}
    for kappa, run in runs.items():
        run.run()
        away[kappa] = run.rows[-1]["train.mean_distance"]
    assert away[10.0] < 0.5 * away[0.0]


def test_clients_predict_with_their_shift_and_the_server_without(experiment):
    run = experiment("feddbe", clients=2, rounds=2, **{"data.rows": 80})
    run.run()
    x = run.data.test(0)[0].double()
    model = run.problem.modules(0)["model"].double()
    model.load_state_dict({n.removeprefix("model."): p for n, p in run.server["weights"]["params"].items()})
    z = model.body(x)
    shift = run.engine.client(0).weights["params"]["domain.shift"]
    torch.testing.assert_close(run.personal_model(0)(x), model.head(z + shift))
    common = run.data.common()
    right = (model(common[0].double()).argmax(1) == common[1]).double().mean()
    assert run.rows[-1]["server_accuracy"] == pytest.approx(float(right))
