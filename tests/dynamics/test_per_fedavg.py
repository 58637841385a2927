"""Per-FedAvg on a network: the parts of a batch, the Hessian-free product against autograd, and the adaptation."""

import pytest
import torch
from torch import nn

from fedloom import Batch, Nets, PerFedAvg, Stream, optim
from fedloom.methods.per_fedavg import parts


@pytest.fixture(autouse=True)
def _wide(float64):
    """Run all tests of this file in float64."""


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def batch_of(n):
    return Batch(Stream(0).normal((n, 4)), Stream(1).integers(3, (n,)))


def slope_of(method, batch):
    """Return the gradient of the method's loss and its parameters."""
    model = net()
    params = {f"model.{name}": p for name, p in model.named_parameters()}
    loss = method.loss(Nets({"model": model}, params, {}, ("model",)), batch, {}, {})
    return torch.autograd.grad(loss, list(params.values())), params


def by_autograd(batch, inner_lr, second_order):
    """Return the gradient of f(w - inner_lr grad f(w; D); D'); second derivatives, if wanted, are those of D''."""
    model = net()
    params = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}

    def error(values, part):
        return nn.functional.cross_entropy(torch.func.functional_call(model, values, (part.x,)), part.y)

    first, second, *third = parts(batch, 3 if second_order else 2)
    slope = torch.autograd.grad(error(params, first), list(params.values()))
    ahead = {name: p - inner_lr * s for (name, p), s in zip(params.items(), slope, strict=True)}
    u = torch.autograd.grad(error(ahead, second), list(params.values()))
    if not second_order:
        return u
    curved = torch.autograd.grad(error(params, third[0]), list(params.values()), create_graph=True)
    product = torch.autograd.grad(sum((c * v).sum() for c, v in zip(curved, u, strict=True)), list(params.values()))
    return [v - inner_lr * h for v, h in zip(u, product, strict=True)]


@pytest.mark.parametrize("variant", ["fo", "hf"])
def test_the_meta_step_is_that_of_autograd(variant):
    batch = batch_of(12)
    found, _ = slope_of(PerFedAvg(variant=variant, inner_lr=0.5), batch)
    expected = by_autograd(batch, 0.5, variant == "hf")
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    other = by_autograd(batch, 0.5, variant != "hf")
    assert not torch.allclose(found[0], other[0], rtol=1e-2)


@pytest.mark.parametrize(("rows", "n", "sizes"), [(9, 2, [4, 5]), (9, 3, [3, 3, 3]), (3, 2, [3, 3]), (5, 3, [5, 5, 5])])
def test_a_batch_is_divided_into_disjoint_parts_of_at_least_two_examples(rows, n, sizes):
    batch = batch_of(rows)
    found = parts(batch, n)
    assert [len(part.y) for part in found] == sizes
    if sum(sizes) == rows:
        assert torch.equal(torch.cat([part.x for part in found]), batch.x)


def test_a_client_predicts_after_one_step_on_one_batch(experiment):
    run = experiment(PerFedAvg(inner_lr=0.3), rounds=1, clients=3, batch_size=1000, **{"data.rows": 90})
    run.run()
    down = run.hooks.deploy(run.server, 1)
    before, after = (run.engine.personal(1, down, 0, adapt=adapt)[1].weights["params"] for adapt in (False, True))
    x, y = run.data.train(0)
    model = run.problem.modules(0)["model"].double()
    wanted = {name: p.clone().requires_grad_() for name, p in before.items()}
    outputs = torch.func.functional_call(model, {n.removeprefix("model."): p for n, p in wanted.items()}, (x.double(),))
    slopes = torch.autograd.grad(nn.functional.cross_entropy(outputs, y), list(wanted.values()))
    expected, _ = optim.sgd(0.3).update(dict(zip(wanted, slopes, strict=True)), {}, before)
    torch.testing.assert_close(dict(after), dict(expected))


def test_a_difference_without_effect_is_refused():
    with pytest.raises(ValueError, match=r"delta=0\.1: has no effect with variant=fo; set variant=hf"):
        PerFedAvg(delta=0.1)
