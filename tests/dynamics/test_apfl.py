"""APFL: one step of both models and of the proportion, computed by hand, and the limits in which it equals other methods."""

import pytest
import torch
from torch import nn

from fedloom import APFL, tree
from small import spied


@pytest.fixture(autouse=True)
def _wide(float64):
    """Run all tests of this file in float64."""


WHOLE = {
    "batch_size": 1000,
    "rounds": 2,
    "clients": 3,
    "data.rows": 90,
}  # one batch of all examples, so the order does not matter


def test_both_models_and_the_proportion_step_from_the_same_point(experiment):
    lr, alpha_lr = 0.1, 0.5
    run = experiment(APFL(lr=lr, alpha=0.3, alpha_lr=alpha_lr, local_epochs=2), **WHOLE)
    rounds = spied(run)
    model = run.problem.modules(0)["model"]
    run.run()
    (x, y), a = run.data.train(0), torch.tensor(0.3)
    names = [name for name, _ in model.named_parameters()]
    v = {name: p.detach().clone() for name, p in model.named_parameters()}

    def slopes(values):
        wanted = {name: p.detach().requires_grad_() for name, p in values.items()}
        error = nn.functional.cross_entropy(torch.func.functional_call(model, wanted, (x,)), y)
        return dict(zip(names, torch.autograd.grad(error, list(wanted.values())), strict=True))

    for turns in rounds:
        w = {name: turns.down.common["weights"]["params"][f"model.{name}"] for name in names}
        for _ in range(2):
            common, mixed = slopes(w), slopes({name: a * v[name] + (1 - a) * w[name] for name in names})
            slope = sum((mixed[name] * (v[name] - w[name])).sum() for name in names)
            v = {name: v[name] - lr * a * mixed[name] for name in names}
            w = {name: w[name] - lr * common[name] for name in names}
            a = (a - alpha_lr * slope).clamp(0, 1)
        sent = turns.replies[0].uplink["weights"]["params"]
        torch.testing.assert_close({f"model.{name}": p for name, p in w.items()}, dict(sent))
    kept = run.engine.client(0).weights["params"]
    assert abs(float(a) - 0.3) > 1e-3
    torch.testing.assert_close(kept, {f"personal.{name}": p for name, p in v.items()} | {"alpha.own": a})


def same(one, other):
    tree.map_tree(lambda p, q: torch.testing.assert_close(p, q) or p, one, other)


def test_with_1_a_client_trains_alone_and_with_0_it_predicts_with_the_common_model(experiment):
    one, alone = experiment(APFL(alpha=1.0), **WHOLE), experiment("local", **WHOLE)
    zero = experiment(APFL(alpha=0.0), eval={"general_every": 1}, **WHOLE)
    for run in (one, alone, zero):
        run.run()
    mine, other = (run.engine.client(1).weights["params"] for run in (one, alone))
    same(
        {f"personal.{name.removeprefix('model.')}": p for name, p in other.items()},
        {n: mine[n] for n in mine if n != "alpha.own"},
    )
    assert [row["personal_accuracy"] for row in one.rows] == [row["personal_accuracy"] for row in alone.rows]
    unmoved = zero.problem.modules(0)["personal"].state_dict()
    same(
        {f"personal.{name}": p for name, p in unmoved.items()} | {"alpha.own": torch.tensor(0.0)},
        zero.engine.client(1).weights["params"],
    )
    assert [row["general_accuracy"] for row in zero.rows] == [row["server_accuracy"] for row in zero.rows]


def test_the_common_model_does_not_depend_on_the_mixture(experiment):
    """With FedAvg's `aggregate`, clients are weighted by their numbers of examples, and the common model is FedAvg's."""
    mixed, plain = experiment("fedavg+apfl", **WHOLE), experiment("fedavg", **WHOLE)
    mixed.run(), plain.run()
    same(mixed.server, plain.server)


def test_a_proportion_above_1_is_refused():
    with pytest.raises(ValueError, match=r"alpha=1\.5: must be at least 0 and at most 1"):
        APFL(alpha=1.5)
