"""Methods that must equal a plain torch loop, which is implemented here."""

from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedloom import Centralised, FedAvg, FedAvgFT, FedMR, FedProx, Local, Train, tree
from fedloom.nets import write_weights


@pytest.fixture(autouse=True)
def _wide(float64):
    """Compare in float64."""


BATCHES: list[tuple[int, torch.Tensor, torch.Tensor]] = []


def note(batch, task, rng):
    """Record the batches in their order, as a draw. `rng.key` contains the round and the client."""
    number, client = [part for part in rng.key if isinstance(part, int)][1:3]
    BATCHES.append((number, client, batch.x.clone(), batch.y.clone()))
    return {}


def noting(cls):
    """Return a subclass whose training records its batches."""

    @dataclass(frozen=True)
    class Noting(cls):
        def phases(self):
            (train,) = super().phases()
            return (Train(**{**vars(train), "draw": note}),)

    return Noting


def train_plainly(model, batches, **settings):
    """Train with plain stochastic gradient descent."""
    optimizer = torch.optim.SGD(model.parameters(), **settings)
    model.train()
    for x, y in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def initial(run):
    modules = run.problem.modules(0)
    return {name: module.requires_grad_(True) for name, module in modules.items()}["model"]


def assert_holds(weights, model):
    for name, tensor in model.state_dict().items():
        mine = {**weights["params"], **weights["buffers"]}[f"model.{name}"]
        torch.testing.assert_close(mine, tensor, rtol=1e-9, atol=1e-12)


@pytest.fixture
def batches():
    BATCHES.clear()
    return BATCHES


SGD = {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.01}


@pytest.mark.parametrize("model", ["mlp", "resnet8"])
def test_one_client_that_shares_everything_trains_plainly(experiment, batches, model):
    run = experiment(noting(FedAvg)(local_epochs=2, **SGD), clients=1, rounds=2, model=model, **{"data.rows": 120})
    plain = initial(run)
    run.run()
    for number in range(2):  # momentum is reset every round
        train_plainly(plain, [(x, y) for r, _, x, y in batches if r == number], **SGD)
    assert_holds(run.server["weights"], plain)
    x, y = run.data.test(0)
    accuracy = (plain.eval()(x).argmax(1) == y).double().mean().item()
    assert run.rows[-1]["personal_accuracy"] == pytest.approx(accuracy, abs=1e-12)
    assert run.rows[-1]["server_accuracy"] == pytest.approx(accuracy, abs=1e-12)


def test_an_epoch_visits_every_example_once(experiment, batches):
    run = experiment(noting(FedAvg)(local_epochs=2), clients=2, rounds=1)
    run.run()
    for i in range(2):
        seen = torch.cat([x for _, c, x, _ in batches if c == i]).flatten(1)
        rows = run.data.train(i)[0].flatten(1)
        for half in seen.split(len(rows)):
            assert torch.equal(half.sort(0).values, rows.sort(0).values)


def test_local_clients_train_alone(experiment, batches):
    run = experiment(noting(Local)(**SGD), clients=3, rounds=2)
    plain = [deepcopy(initial(run)) for _ in range(3)]
    run.run()
    for i, model in enumerate(plain):
        for number in range(2):
            train_plainly(model, [(x, y) for r, c, x, y in batches if (r, c) == (number, i)], **SGD)
        assert_holds(run.engine.client(i).weights, model)
    assert run.ledger.total("uplink") == run.ledger.total("downlink") == 0


def test_centralised_trains_on_the_union(experiment, batches):
    run = experiment(noting(Centralised)(**SGD), clients=3, rounds=2)
    plain = initial(run)
    union = torch.cat([run.data.rows(run.data.partition.train[i])[0] for i in range(3)])
    run.run()
    for number in range(2):
        mine = [(x, y) for r, _, x, y in batches if r == number]
        assert torch.equal(torch.cat([x for x, _ in mine]).flatten(1).sort(0).values, union.flatten(1).sort(0).values)
        train_plainly(plain, mine, **SGD)
    assert_holds(run.server["weights"], plain)
    assert {turn["client"] for turn in run.client_rows if "examples" in turn} == {0}


def test_centralised_is_scored_on_the_same_examples_as_other_methods(experiment):
    pooled, shared = experiment("centralised", rounds=1), experiment("fedavg", rounds=1)
    for i in range(4):
        assert torch.equal(pooled.data.test(i)[0], shared.data.test(i)[0])
    assert sum(pooled.data.n_train(i) for i in range(4)) == sum(shared.data.n_train(i) for i in range(4))


def test_fedavg_is_the_mean_by_examples(experiment, batches):
    run = experiment(noting(FedAvg)(lr=0.1), clients=3, rounds=1)
    start = initial(run)
    run.run()
    models = []
    for i in range(3):
        models.append(deepcopy(start))
        train_plainly(models[i], [(x, y) for _, c, x, y in batches if c == i], lr=0.1)
    n = np.array([run.data.n_train(i) for i in range(3)])
    assert len(set(n)) > 1
    for name, p in run.server["weights"]["params"].items():
        mean = sum(
            share * m.get_parameter(name.removeprefix("model.")) for share, m in zip(n / n.sum(), models, strict=True)
        )
        torch.testing.assert_close(p, mean.detach(), rtol=1e-9, atol=1e-12)


def test_fedprox_without_its_term_is_fedavg(experiment):
    plain, proximal = (experiment(m, rounds=2) for m in (FedAvg(), FedProx(mu=0.0)))
    plain.run()
    proximal.run()
    for name, p in plain.server["weights"]["params"].items():
        torch.testing.assert_close(proximal.server["weights"]["params"][name], p, rtol=1e-12, atol=1e-15)
    held = experiment(FedProx(mu=1.0), rounds=2)
    held.run()
    assert not tree.equal(held.server, plain.server)


def test_fine_tuned_copies_are_scored_and_thrown_away(experiment):
    plain, tuned = (experiment(m, rounds=2) for m in (FedAvg(), FedAvgFT(tuning_epochs=3)))
    plain.run()
    tuned.run()
    assert tree.equal(plain.server, tuned.server)
    for one, other in zip(plain.rows, tuned.rows, strict=True):
        assert one["server_accuracy"] == other["server_accuracy"]
        assert one["personal_accuracy"] < other["personal_accuracy"]
    assert all(not tree.leaves(tuned.engine.client(i)._asdict()) for i in range(4))


def test_fine_tuning_is_plain_training_of_the_received_model(experiment, batches):
    @dataclass(frozen=True)
    class NotingFT(FedAvgFT):
        def adapt(self):
            (tune,) = super().adapt()
            return (Train(**{**vars(tune), "draw": note}),)

    run = experiment(NotingFT(tuning_lr=0.2), clients=2, rounds=1)
    run.run()
    right = rows = 0
    for i in range(2):
        model = initial(run)
        write_weights({"model": model}, run.server["weights"])
        train_plainly(model, [(x, y) for _, c, x, y in batches if c == i], lr=0.2)
        x, y = run.data.test(i)
        right, rows = right + int((model.eval()(x).argmax(1) == y).sum()), rows + len(y)
    assert run.rows[-1]["personal_accuracy"] == pytest.approx(right / rows)


@dataclass(frozen=True)
class EqualWeights(FedAvg):
    """FedAvg with FedMR's defaults and equal weights."""

    lr: float = 0.01
    momentum: float = 0.5
    local_epochs: int = 2
    seen: Any = field(default=None, compare=False)

    def aggregate(self, server, uplinks, round):
        return {"weights": tree.mean([up["weights"] for up in uplinks])}


@pytest.mark.parametrize("model", ["mlp", "resnet8"])
def test_fedmr_that_stays_in_its_first_stage_is_fedavg_with_equal_weights(experiment, model):
    settings = {"rounds": 2, "model": model, "data.rows": 120}
    mixed = experiment(FedMR(local_epochs=2, first_stage_rounds=2), **settings)
    plain = experiment(EqualWeights(), **settings)
    mixed.run()
    plain.run()
    down = mixed.hooks.deploy(mixed.server, mixed.done)
    for a, b in zip(tree.leaves(down.common["weights"]), tree.leaves(plain.server["weights"]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_fedmr_with_one_slot_is_plain_training(experiment):
    mixed, plain = (experiment(m, rounds=3, clients=1) for m in (FedMR(local_epochs=2), EqualWeights()))
    mixed.run()
    plain.run()
    assert tree.equal(tree.unstack(mixed.server["slots"])[0], plain.server["weights"])
