"""FedAvgM, FedAdam, FedYogi and FedAdagrad: closed forms of their steps."""

import pytest
import torch

from fedloom import FedAdagrad, FedAdam, FedAvgM, FedYogi, Round, Stream, compose
from fedloom.method import Arrival
from fedloom.methods import FedProx


def uplink(*values):
    return {
        "weights": {
            "params": {"model.w": torch.tensor(values).double()},
            "buffers": {"model.running_var": torch.ones(1)},
        }
    }


ROUND = Round(1, 2, (Arrival(0, 0, 0.25), Arrival(1, 1, 0.75)), Stream(0))


def after(method, changes):
    """Return x after rounds in which the mean change has the given values, from x = 0. The second client moves by more."""
    server = method.init_server(uplink(0.0, 0.0)["weights"], None, ROUND)
    for change in changes:
        d = torch.tensor(change).double()
        x = server["weights"]["params"]["model.w"]
        ups = [uplink(*(x + d - 3).tolist()), uplink(*(x + d + 1).tolist())]
        server = method.aggregate(server, ups, ROUND)
    assert torch.equal(server["weights"]["buffers"]["model.running_var"], torch.ones(1))
    return server["weights"]["params"]["model.w"], server


def test_fedavgm_is_heavy_ball_momentum_without_damping():
    """A constant change D gives x = server_lr D sum_s (1 - beta^s) / (1 - beta). Without momentum, the method is FedAvg."""
    d, beta = torch.tensor([1.0, -2.0]).double(), 0.5
    x, _ = after(FedAvgM(beta=beta, server_lr=0.1), [d.tolist()] * 4)
    torch.testing.assert_close(x, 0.1 * d * sum((1 - beta**s) / (1 - beta) for s in range(1, 5)))
    torch.testing.assert_close(after(FedAvgM(beta=0.0), [d.tolist()] * 2)[0], 2 * d)


@pytest.mark.parametrize(("initial", "start"), [("tau2", 1e-4), ("zero", 0.0)])
def test_fedadam_by_hand(initial, start):
    """Compute two rounds without bias correction by hand."""
    method = FedAdam(server_lr=0.3, beta1=0.5, beta2=0.9, tau=0.01, initial=initial)
    x, m, v = torch.zeros(2).double(), torch.zeros(2).double(), torch.full((2,), start).double()
    changes = [[1.0, -0.2], [0.5, 0.0]]
    for change in changes:
        d = torch.tensor(change).double()
        m, v = 0.5 * m + 0.5 * d, 0.9 * v + 0.1 * d.square()
        x = x + 0.3 * m / (v.sqrt() + 0.01)
    torch.testing.assert_close(after(method, changes)[0], x)


def test_fedyogi_keeps_the_mean_square_of_a_coordinate_that_does_not_move_and_fedadam_does_not():
    changes = [[1.0, 0.0]] * 5
    yogi, adam = (after(cls(beta2=0.9, tau=0.1), changes)[1]["square"]["model.w"] for cls in (FedYogi, FedAdam))
    assert yogi[1] == pytest.approx(0.01)
    assert adam[1] == pytest.approx(0.01 * 0.9**5)
    assert yogi[0] == pytest.approx(0.01 + 5 * 0.1)  # below D^2 = 1, steps of (1 - beta2) D^2
    assert (after(FedYogi(beta2=0.5), [[3.0, 1.0], [0.1, 0.0], [0.0, 2.0]])[1]["square"]["model.w"] >= 0).all()


def test_fedadagrad_adds_up_squares():
    """With a constant change, v_t = tau^2 + t D^2, and step t is eta D / (sqrt(v_t) + tau)."""
    x, server = after(FedAdagrad(server_lr=0.2, tau=0.1), [[2.0, 0.0]] * 3)
    steps = [0.2 * 2.0 / ((0.01 + t * 4.0) ** 0.5 + 0.1) for t in (1, 2, 3)]
    torch.testing.assert_close(x, torch.tensor([sum(steps), 0.0]).double())
    assert server["square"]["model.w"][0] == pytest.approx(12.01)
    with pytest.raises(ValueError, match=r"beta2=0\.5: fedadagrad"):
        FedAdagrad(beta2=0.5)


def test_server_optimisers_are_servers_for_other_clients(experiment):
    """`fedadam+fedprox` combines FedProx's loss with FedAdam's server."""
    mixed = compose(server=FedAdam(server_lr=0.05), client=FedProx(mu=0.3))
    run = experiment(mixed, clients=2, rounds=1, **{"data.rows": 60})
    run.run()
    assert set(run.server) == {"weights", "mean", "square"}
    assert mixed.mu == 0.3
