"""FedExP and FedMut: the server's use of the clients' changes, on known answers."""

import pytest
import torch

from fedloom import FedExP, FedMut, Round, Stream, tree
from rig import params, round_of, start, uplink


def test_fedexp_is_fedavg_if_changes_are_equal_and_half_the_cohorts_size_if_they_are_orthogonal():
    """For m orthogonal changes of equal length and epsilon = 0, eta = m / 2. The mean is weighted by shares."""
    method = FedExP(epsilon=0)
    server = start(method, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0)
    equal = method.aggregate(server, [uplink(2.0, 1.0, 0, 0, 0, 0)] * 3, round_of([0.2, 0.3, 0.5]))
    torch.testing.assert_close(params(equal)[:2], torch.tensor([2.0, 1.0]))
    eye = torch.eye(6)
    ups = [uplink(*(params(server) + eye[k]).tolist()) for k in range(6)]
    after = method.aggregate(server, ups, round_of([1 / 6] * 6))
    torch.testing.assert_close(params(after) - params(server), torch.full((6,), 3 / 6))
    assert method.server_logs(server, ups, round_of([1 / 6] * 6))["step_size"] == pytest.approx(3)
    assert method.step_size(server, ups[:3], round_of([0.5, 0.3, 0.2])) == pytest.approx(1 / (2 * (0.25 + 0.09 + 0.04)))
    assert FedExP(epsilon=100).step_size(server, ups, round_of([1 / 6] * 6)) == 1.0


def test_fedexp_predicts_with_the_mean_of_the_last_two_models_and_never_extrapolates_statistics(experiment):
    """The scored model differs from the model that is sent. With BatchNorm, running variances stay positive."""
    method = FedExP(epsilon=0)
    server = start(method, 0.0, 0.0)
    first = method.aggregate(server, [uplink(1.0, 0.0), uplink(0.0, 1.0)], round_of([0.5, 0.5], 0))
    assert tree.equal(method.deploy(first, None, round_of([1.0])).common["weights"], first["weights"])  # type: ignore[arg-type]
    second = method.aggregate(first, [uplink(4.0, 0.0)], round_of([1.0]))
    mean = method.deploy(second, None, round_of([1.0])).common["weights"]["params"]["model.w"]  # type: ignore[arg-type]
    torch.testing.assert_close(mean, (params(first) + params(second)) / 2)
    run = experiment("fedexp", model="fedrir_cnn", width=8, **{"data.rows": 80, "method.epsilon": 0.0, "clients": 3})
    run.run()
    assert any(row["server.step_size"] > 1 for row in run.rows)
    assert all((b >= 0).all() for n, b in run.server["weights"]["buffers"].items() if n.endswith("running_var"))


def layers(k):
    names = ("model.a.weight", "model.a.bias", "model.b.weight")
    return {"params": {n: torch.full((2,), float(i)) + k for i, n in enumerate(names)}, "buffers": {}}


@pytest.mark.parametrize(("members", "forward"), [(4, 0.0), (5, 0.0), (4, 0.5)])
def test_fedmuts_mutants_are_balanced_around_the_global_model_layer_by_layer(members, forward):
    """Every layer moves as a whole by +-alpha g; negative moves are smaller by the lean. An odd last member gets w. Rounds differ."""
    method = FedMut(alpha=2.0, forward=forward, forward_rounds=10)
    server = {"weights": layers(0.0), "change": layers(1.0)["params"]}

    def mutations(number):
        down = method.downlink(server, range(members), Round(number, 9, (), Stream(0, number)))
        sent = [down.to(slot)["weights"]["params"] for slot in range(members)]
        moved = [[(p[n] - w) / server["change"][n] for n, w in server["weights"]["params"].items()] for p in sent]
        return torch.stack([torch.stack(mine) for mine in moved])[:, :, 0]

    found = mutations(2)
    lean = forward * (1 - 2 / 10)
    assert torch.equal(found[:, 0], found[:, 1])  # weight and bias of a layer move together
    for unit in (0, 2):
        wanted = [2.0] * (members // 2) + [-2.0 * (1 - lean)] * (members // 2) + [0.0] * (members % 2)
        torch.testing.assert_close(found[:, unit].sort().values, torch.tensor(wanted).sort().values)
    if members % 2:
        assert not found[-1].any()
    assert any(
        not torch.equal(mutations(k)[:, 0], mutations(k)[:, 2]) for k in range(4)
    )  # layers are shuffled separately
    assert not torch.equal(torch.cat([mutations(k) for k in range(3)]), torch.cat([mutations(k) for k in range(3, 6)]))


def test_fedmut_without_mutation_is_fedavg_with_equal_weights_and_it_scores_the_mean(experiment):
    settings = {
        "partition.name": "iid",
        "clients": 4,
        "method.momentum": 0.5,
        "method.local_epochs": 1,
        "method.lr": 0.05,
    }
    mutated, still, plain = (experiment(name, **settings, **extra) for name, extra in
                             (("fedmut", {}), ("fedmut", {"method.alpha": 0.0}), ("fedavg", {})))  # fmt: skip
    for run in (mutated, still, plain):
        run.run()
    tree.map_tree(lambda a, b: torch.testing.assert_close(a, b) or a, still.server["weights"], plain.server["weights"])
    assert mutated.rows[0]["train.loss"] == plain.rows[0]["train.loss"]  # g = 0 in the first round
    assert not tree.equal(mutated.server["weights"], plain.server["weights"])
    deployed = mutated.hooks.deploy(mutated.server, 2).common
    assert tree.equal(deployed["weights"], mutated.server["weights"])
