"""FedPAC: the weights of the heads on known answers, the statistics, and that every client is scored with its own head."""

import pytest
import torch

from fedloom import Nets, Stream
from fedloom.methods.fedpac import least_on_simplex


def test_the_quadratic_program_has_known_answers():
    """For two clients at distance d, a = (V2 + d^2) / (V1 + V2 + d^2) for the first.

    For equal clients, the weights are proportional to 1 / V. A client with V = 0 has the whole weight.
    """
    v, d2 = torch.tensor([0.3, 0.1]).double(), 0.5
    first = v.diag() + torch.tensor([[0.0, 0.0], [0.0, d2]]).double()
    torch.testing.assert_close(
        least_on_simplex(first)[0], torch.tensor((0.1 + d2) / (0.4 + d2)).double(), rtol=1e-6, atol=0
    )
    v = torch.tensor([0.2, 0.1, 0.4]).double()
    torch.testing.assert_close(least_on_simplex(v.diag()), (1 / v) / (1 / v).sum(), rtol=1e-6, atol=0)
    assert least_on_simplex(torch.tensor([0.5, 0.0]).double().diag())[1] == pytest.approx(1)
    far = v.diag() + torch.tensor([0.0, 1e9, 1e9]).double().diag()
    assert least_on_simplex(far)[0] == pytest.approx(1)


@pytest.mark.parametrize("m", [2, 5, 12])
def test_the_solution_satisfies_the_conditions_of_optimality(m):
    """On the support, all slopes equal the value; elsewhere, they are larger."""
    for seed in range(5):
        a = Stream(seed, m).normal((m, 3)).double()
        matrix = a @ a.T + (0.01 + Stream(seed, m, 1).uniform((m,)).double()).diag() * 0.1
        found = least_on_simplex(matrix)
        slopes, value = matrix @ found, found @ matrix @ found
        assert found.sum() == pytest.approx(1)
        assert (found >= 0).all()
        torch.testing.assert_close(slopes[found > 0], value.expand(int((found > 0).sum())), rtol=1e-6, atol=1e-9)
        assert (slopes >= value * (1 - 1e-6)).all()


def test_statistics_are_those_of_the_received_body_and_heads_are_combined_and_scored(experiment):
    run = experiment("fedpac", clients=3, rounds=2, **{"method.local_epochs": 1, "data.rows": 120, "method.lr": 0.05})
    sent, down = [], []
    train = run.engine.train

    def watched(number, cohort, message):
        replies = train(number, cohort, message)
        sent.append(replies)
        down.append(message)
        return replies

    run.engine.train = watched  # type: ignore[method-assign]
    run.run()
    method = run.method
    modules = run.problem.modules(0)
    for reply in sent[1]:
        x, y = run.data.train(reply.client)
        params = {**down[1].common["weights"]["params"], **down[1].to(reply.slot)["head"]}
        nets = Nets({name: module.double() for name, module in modules.items()}, params, {})
        z = nets.body(x.double()).detach()
        h = torch.stack([z[y == c].sum(0) for c in range(10)]) / len(y)
        torch.testing.assert_close(reply.uplink["mixture"], h)
        variance = (z.square().sum(1).mean() - h.square().sum()) / len(y)
        torch.testing.assert_close(reply.uplink["variance"], variance)
    shares = [method.head_shares([reply.uplink for reply in sent[1]], place) for place in range(3)]
    assert all(share[place] > 1 / 3 for place, share in enumerate(shares))
    for i, share in enumerate(shares):
        expected = sum(a * reply.uplink["head"]["head.bias"] for a, reply in zip(share.tolist(), sent[1], strict=True))
        torch.testing.assert_close(run.server["heads"]["head.bias"][i], expected)
        x = run.data.test(i)[0].double()
        params = {**run.server["weights"]["params"], **{n: p[i] for n, p in run.server["heads"].items()}}
        nets = Nets(modules, params, {})
        torch.testing.assert_close(run.personal_model(i)(x), nets.head(nets.body(x)))
    assert 0 < run.rows[-1]["server.own_head"] <= 1
