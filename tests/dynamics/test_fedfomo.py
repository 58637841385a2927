"""FedFomo: moves with known results, the choice of candidates, and validation examples in local updates."""

import pytest
import torch
from torch import nn

from fedloom import FedFomo, Stream, tree
from fedloom.experiment.build import buffers_policy, initial_weights
from fedloom.method import Round
from small import spied

TINY = {"clients": 3, "rounds": 2, "data.rows": 120, "eval.valid": 0.25}


def weights_of(*values):
    return {"params": {"model.w": torch.tensor(values)}, "buffers": {}}


def situation(losses, *models, candidates=None):
    """Return a downlink with these models and a memory with the losses of the client's own model and of these models."""
    stacked = tree.stack([weights_of(*model) for model in models])
    numbers = torch.tensor(list(range(len(models))) if candidates is None else candidates)
    memory = {"losses": {"sums": 4 * torch.tensor(losses), "examples": torch.tensor(4.0)}, "affinity": torch.zeros(5)}
    return {"model": stacked, "candidates": numbers}, memory


@pytest.mark.parametrize(
    ("losses", "candidates", "expected"),
    [
        ([1.0, 0.9, 2.0], None, [3.0, 4.0]),  # one model is better, so the client takes it, regardless of the margin
        ([1.0, 0.5, 0.6], None, [0.6, 1.6]),  # v = 0.5 / 5 and 0.4 / 1: weights 0.2 and 0.8
        ([1.0, 1.0, 2.0], None, [0.0, 0.0]),  # no model is better
        ([1.0, 0.5, 0.6], [-1, -1], [0.0, 0.0]),  # empty places
        ([1.0, float("nan"), float("inf")], None, [0.0, 0.0]),
    ],
)
def test_a_client_moves_to_the_better_models_in_proportion_to_gain_per_distance(losses, candidates, expected):
    down, memory = situation(losses, [3.0, 4.0], [0.0, 1.0], candidates=candidates)
    found = FedFomo(candidates=2).move(weights_of(0.0, 0.0), down, memory)
    torch.testing.assert_close(found["params"]["model.w"], torch.tensor(expected))


def server_of(affinity, sent):
    model = {"params": {"model.w": torch.arange(float(len(sent)))[:, None]}, "buffers": {}}
    return {"model": model, "sent": torch.tensor(sent), "affinity": torch.tensor(affinity)}


def test_the_server_offers_the_models_with_the_highest_affinity_or_others():
    server = server_of([[9.0, 1.0, 3.0, 2.0]] * 4, [1.0, 1.0, 1.0, 1.0])
    method = FedFomo(candidates=2, epsilon=0.0)
    rounds = [Round(0, 4, (), Stream(seed)) for seed in range(30)]
    assert all(method.chosen(server, 0, round) == [2, 3] for round in rounds)
    curious = FedFomo(candidates=2, epsilon=1.0, epsilon_decay=0.0)
    assert {j for round in rounds for j in curious.chosen(server, 0, round)} == {1, 2, 3}
    late = [Round(20, 4, (), Stream(seed)) for seed in range(30)]
    assert all(FedFomo(candidates=2, epsilon=1.0).chosen(server, 0, round) == [2, 3] for round in late)
    few = server_of([[0.0] * 4] * 4, [0.0, 0.0, 1.0, 0.0])
    found = method.downlink(few, [0, 2], rounds[0])
    assert [message["candidates"].tolist() for message in found.each] == [[2, -1], [-1, -1]]
    assert found.each[0]["model"]["params"]["model.w"].tolist() == [[2.0], [0.0]]


def test_losses_are_those_of_the_validation_examples_and_affinities_reach_the_server(experiment):
    run = experiment(FedFomo(), **TINY)
    rounds = spied(run)
    run.run()
    model, own = run.problem.modules(0)["model"].double().eval(), rounds[0].replies[0].uplink["model"]["params"]
    x, y = run.data.valid(0)
    assert 0 < len(y) < run.data.n_train(0)
    state = {name.removeprefix("model."): p for name, p in own.items()}
    expected = nn.functional.cross_entropy(torch.func.functional_call(model, state, (x.double(),)), y)
    losses = run.engine.client(0).memory["losses"]
    assert losses["examples"] == len(y)
    assert float(losses["sums"][0] / len(y)) == pytest.approx(float(expected))
    for reply in rounds[-1].replies:
        affinity = reply.uplink["affinity"]
        assert torch.equal(run.server["affinity"][reply.client], affinity)
        assert affinity.abs().sum() == pytest.approx(1)
        assert affinity[reply.client] == 0


def test_clients_that_only_see_worse_models_train_alone(experiment):
    class Hopeless(FedFomo):
        def gains(self, weights, down, memory):
            return -super().gains(weights, down, memory).abs()

    one, other = experiment(Hopeless(), **TINY), experiment("local", **TINY)
    one.run(), other.run()
    for i in range(3):
        assert tree.equal(one.engine.client(i).weights, other.engine.client(i).weights)


@pytest.mark.parametrize(("method", "expected"), [("fedfomo", "shared"), ("fedamp", "private")])
def test_a_run_records_whether_running_statistics_are_sent(experiment, method, expected):
    run = experiment(method, model="resnet8", **TINY)
    assert buffers_policy(run.server, initial_weights(run.problem)) == expected


def test_without_validation_examples_training_examples_are_used_and_one_line_says_so(experiment, caplog):
    run = experiment(FedFomo(), **{**TINY, "eval.valid": 0.0, "rounds": 1})
    run.run()
    assert "3 of 3 clients have no validation examples" in caplog.text
    assert run.engine.client(0).memory["losses"]["examples"] == run.data.n_train(0)
