"""FedKD: the losses of mentor and mentee, the compression of updates, and messages under partial participation."""

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from fedloom import Batch, FedKD, Nets, Round, Stream, tree
from fedloom.methods.fedkd import compressed, factors, restored
from fedloom.nets import read_weights
from small import losing, spied


@pytest.fixture(autouse=True)
def _wide(float64):
    """Run all tests of this file in float64."""


def test_the_rank_is_the_least_that_keeps_the_energy():
    """diag(2, 1) has energies 0.8 and 0.2. A flat spectrum needs all singular values, and a matrix of zeros needs none."""
    matrix = torch.diag(torch.tensor([2.0, 1.0]))
    ranks = {energy: len(factors(matrix, energy)["left"]) for energy in (0.75, 0.8, 0.95, 1.0)}
    assert ranks == {0.75: 1, 0.8: 1, 0.95: 2, 1.0: 2}
    assert len(factors(torch.eye(3), 0.98)["left"]) == 3
    assert [factors(torch.zeros(2, 5), 0.9)[side].shape for side in ("left", "right")] == [(0, 2), (0, 5)]
    torch.testing.assert_close(
        factors(matrix, 0.75)["left"].T @ factors(matrix, 0.75)["right"], torch.diag(torch.tensor([2.0, 0]))
    )
    full = factors(wide := torch.randn(4, 6), 1.0)
    torch.testing.assert_close(full["left"].T @ full["right"], wide)
    assert factors(matrix / 0, 0.9)["left"].isnan().all()


def test_the_fraction_grows_to_its_last_value_over_the_rounds():
    assert [FedKD().energy(number, 3) for number in range(3)] == pytest.approx([0.96, 0.97, 0.98])


def test_each_net_learns_from_its_own_loss(experiment):
    """Gradients computed by hand: teachers and divisor are constants, and the gradient in each net contains H once."""
    run = experiment(FedKD(hidden_weight=0.7), **{"data.rows": 160})
    modules = run.problem.modules(0)
    weights = read_weights(modules)
    wanted = {name: p.requires_grad_() for name, p in weights["params"].items()}
    nets, (x, y) = Nets(modules, wanted, {}), run.data.train(0)
    loss, _ = run.method.loss(nets, Batch(x, y), {}, {})
    found = dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))
    small, large = nets.model.body(x), nets.personal.body(x)
    mentee, mentor = nets.model.head(small), nets.personal.head(large)
    c_t, c_s, hidden = cross_entropy(mentor, y), cross_entropy(mentee, y), (large - nets.map(small)).square().mean()

    def taught(student, teacher, error):
        distance = kl_div(student.log_softmax(1), teacher.detach().softmax(1), reduction="batchmean")
        return error + (distance + 0.7 * hidden) / (c_t + c_s).detach()

    for net, own in (
        ("personal", taught(mentor, mentee, c_t)),
        ("model", taught(mentee, mentor, c_s)),
        ("map", taught(mentee, mentor, c_s)),
    ):
        names = [name for name in wanted if name.startswith(f"{net}.")]
        for name, g in zip(names, torch.autograd.grad(own, [wanted[n] for n in names], retain_graph=True), strict=True):
            torch.testing.assert_close(found[name], g, rtol=1e-8, atol=1e-12)


def test_without_loss_of_energy_the_mentee_is_the_mean_of_the_trained_ones(experiment):
    run = experiment(FedKD(energy_start=1.0, energy_end=1.0), rounds=3, **{"eval.fitted": True})
    run.run()
    trained = [
        {k: p for k, p in run.engine.client(i).weights["params"].items() if k.startswith("model.")} for i in range(4)
    ]
    expected = tree.mean(trained)
    for name, p in run.server["weights"]["params"].items():
        torch.testing.assert_close(p, expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("lossy", [False, True])
def test_every_client_starts_from_the_servers_mentee(experiment, lossy):
    """Members of the last round receive compressed changes. Other clients, and those whose uplink was lost, receive the whole mentee."""
    run = experiment(FedKD(), cohort=3, rounds=4, engine="bytes+sequential", **{"data.rows": 160})
    run = losing(run, {2: [1]}) if lossy else run
    rounds, before, aggregate = spied(run), [], run.hooks.aggregate
    run.hooks.aggregate = lambda server, *given: before.append(server["weights"]) or aggregate(server, *given)
    run.run()
    last: set[int] = set()
    for turns in rounds:
        for reply, message in zip(turns.replies, turns.sent, strict=True):
            assert bool(message["weights"]["params"]) == (reply.client not in last)
            assert bool(message["update"]["params"]) == (reply.client in last)
        last = {reply.client for reply in turns.replies}
    for i in last:
        mentee = run.engine.client(i).memory["mentee"]
        tree.map_tree(lambda a, b: torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12) or a, mentee, before[-1])
    kinds = run.ledger.kinds
    assert kinds["downlink"]["update"] > 0
    assert kinds["uplink"]["ranks"] == sum(len(turns.replies) for turns in rounds) * 2 * 4


def test_after_a_round_that_was_skipped_or_undone_the_whole_mentee_is_sent():
    mentee = {"params": {"w": torch.eye(3), "b": torch.ones(3)}, "buffers": {}}
    server = {
        "weights": mentee,
        "change": mentee,
        "number": torch.tensor(4),
        "holders": torch.tensor([True, False]),
        "rounds": torch.tensor(9),
    }
    next_round, later = Round(5, 2, (), Stream(0)), Round(6, 2, (), Stream(0))
    known = FedKD().downlink(server, (0,), next_round)
    assert known.each is None
    assert known.common["ranks"].tolist() == [3]
    assert known.common["update"]["params"]["b"].tolist() == [1, 1, 1]
    torch.testing.assert_close(restored(known.common["update"], mentee)["params"]["w"], torch.eye(3))
    for down in (FedKD().downlink(server, (1,), next_round), FedKD().downlink(server, (0, 1), later)):
        assert down.common["weights"] is mentee
    both = FedKD().downlink(server, (0, 1), next_round)
    assert [bool(message["weights"]["params"]) for message in both.each] == [False, True]


def test_an_update_of_low_rank_is_small(experiment):
    """After one step on n examples, the rank of the first layer's change is at most n, so an uplink is smaller than the mentee."""
    run = experiment(FedKD(), clients=2, rounds=1, batch_size=1000, **{"data.rows": 24, "model.hidden": 40})
    rounds = spied(run)
    kinds = run.run()["bytes_by_kind"]
    for reply in rounds[0].replies:
        (first, second), sent = reply.uplink["ranks"].tolist(), tree.n_bytes(reply.uplink["update"])
        assert 0 < first <= run.data.n_train(reply.client)
        assert sent == 8 * (first * (64 + 40) + second * (40 + 10) + 40 + 10)
    assert kinds["uplink"]["update"] < kinds["downlink"]["weights"]


def test_ranks_belong_to_names_in_any_order():
    change = {"params": {"b": torch.eye(3), "c": torch.ones(3), "a": torch.ones(2, 4)}, "buffers": {}}
    up = compressed(change, 1.0)
    assert up["ranks"].tolist() == [1, 3]
    turned = {**up, "update": {**up["update"], "params": dict(sorted(up["update"]["params"].items()))}}
    for sent in (up, turned):
        assert FedKD().ragged(sent)["update/params/b/left"] == 3


def test_factors_with_too_many_rows_are_a_fault():
    up = {
        "update": {"params": {"w": {"left": torch.ones(4, 3), "right": torch.ones(4, 5)}}, "buffers": {}},
        "ranks": torch.tensor([4]),
    }
    assert "more singular vectors" in FedKD().uplink_fault(up, None)
    assert FedKD().ragged(up) == {"update/params/w/left": 4, "update/params/w/right": 4}
    with pytest.raises(ValueError, match=r"energy_start=0\.0"):
        FedKD(energy_start=0.0)


def test_architectures_differ_and_running_statistics_travel(experiment):
    run = experiment(
        FedKD(),
        engine="debug+bytes+sequential",
        models=["mlp", "fedavg_cnn"],
        common_model="resnet8",
        **{"data.rows": 90},
    )
    run.run()
    assert any(name.endswith("running_var") for name in run.server["weights"]["buffers"])
    assert run.problem.modules(1)["map"].weight.shape == (
        run.problem.archs[1].features,
        run.problem.archs[0].common.features,
    )
