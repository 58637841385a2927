"""Ditto: the common model is FedAvg's, and the personal model is pulled to it."""

import pytest
import torch
from torch import nn

from fedloom import Ditto, FedAvg, Local, tree
from small import initial_weights, spied


@pytest.fixture(autouse=True)
def _wide(float64):
    """Run all tests of this file in float64."""


WHOLE = {"batch_size": 1000, "eval_every": 1}  # one batch of all examples, so order does not matter


def test_the_common_model_is_fedavgs_bit_for_bit(experiment):
    common, plain = experiment(Ditto(mu=0.5), rounds=3), experiment(FedAvg(), rounds=3)
    common.run()
    plain.run()
    assert tree.equal(common.server, plain.server)
    for one, other in zip(common.rows, plain.rows, strict=True):
        assert one["server_accuracy"] == other["server_accuracy"]
        assert one["personal_accuracy"] != other["personal_accuracy"]
    assert common.ledger.total("uplink") == plain.ledger.total("uplink")


def test_without_the_pull_the_personal_model_trains_alone(experiment):
    free, alone = experiment(Ditto(mu=0.0), rounds=3, **WHOLE), experiment(Local(), rounds=3, **WHOLE)
    free.run()
    alone.run()
    for i in range(4):
        mine, other = free.engine.client(i).weights["params"], alone.engine.client(i).weights["params"]
        assert set(mine) == {name.replace("model.", "personal.") for name in other}
        for name, p in other.items():
            torch.testing.assert_close(mine[name.replace("model.", "personal.")], p, rtol=1e-9, atol=1e-12)
    assert [row["personal_accuracy"] for row in free.rows] == [row["personal_accuracy"] for row in alone.rows]


def test_the_pull_is_to_the_model_that_was_received(experiment):
    mu, lr = 0.7, 0.1
    run = experiment(Ditto(mu=mu, lr=lr, personal_epochs=2), rounds=3, **WHOLE)
    rounds = spied(run)
    model = run.problem.modules(0)["personal"].requires_grad_(True)
    run.run()
    x, y = run.data.train(0)
    for turns in rounds:
        w = turns.down.common["weights"]["params"]
        for _ in range(2):
            grads = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), list(model.parameters()))
            with torch.no_grad():
                for (name, v), g in zip(model.named_parameters(), grads, strict=True):
                    v -= lr * (g + mu * (v - w[f"model.{name}"]))
    kept = run.engine.client(0).weights["params"]
    for name, v in model.named_parameters():
        torch.testing.assert_close(kept[f"personal.{name}"], v.detach(), rtol=1e-9, atol=1e-12)


def test_both_models_start_equal_and_only_the_common_one_travels(experiment):
    run = experiment(Ditto(), model="resnet8", rounds=1, **{"data.rows": 120})
    whole = initial_weights(run)
    for part in whole.values():
        for name, t in part.items():
            if name.startswith("model."):
                assert torch.equal(t, part[f"personal.{name.removeprefix('model.')}"])
    run.run()
    assert all(name.startswith("model.") for part in run.server["weights"].values() for name in part)
    assert all(name.startswith("personal.") for part in run.engine.client(0).weights.values() for name in part)


@pytest.mark.parametrize(("field", "value"), [("mu", -1.0), ("personal_epochs", 0)])
def test_invalid_hyper_parameters_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field}={value}: must be at least"):
        Ditto(**{field: value})
