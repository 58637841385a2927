"""Steps traced as lists of operations: their results, steps that cannot be traced, and modules that tracing must not load."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from fedloom import tree
from fedloom.training.fast.cpu_trace import trace

LATER = torch.tensor([3.0, 2.0, 1.0])


def made(seed):
    rng = torch.Generator().manual_seed(seed)
    normal = {name: torch.randn(shape, generator=rng) for name, shape in {"w": (3, 4), "x": (5, 4)}.items()}
    return {"in": {**normal, "y": torch.randint(3, (5,), generator=rng)}, "unused": torch.ones(2)}


def gradient(loss):
    """Return a step that returns the gradient of a loss with respect to `w`, and the loss."""

    def step(inputs):
        w = inputs["in"]["w"].detach().requires_grad_()
        value = loss(w, inputs["in"]["x"], inputs["in"]["y"])
        return {"w": torch.autograd.grad(value, w)[0]}, {"loss": value.detach()}

    return step


def several(w, x, y):
    """Return several tensors together, one of which is changed in place."""
    low, high = torch.split(torch.relu(x @ w.T), [2, 3])
    total = torch.zeros(3)
    total.add_(low.sum(0)).add_(high.max(0).values)
    return (total * LATER).square().mean() + F.cross_entropy(x @ w.T, y)


def inner(w, x, y):
    return torch.autograd.grad(F.cross_entropy(x @ w.T, y), w, create_graph=True)[0].square().sum()


LOSSES = {
    "cross-entropy": lambda w, x, y: F.cross_entropy(torch.tanh(x @ w.T), y),
    "several results, in place, a constant": several,
    "an inner gradient": inner,
    "chosen by integers": lambda w, x, y: (x @ w.T).log_softmax(1)[torch.arange(5), y].mean(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_list_gives_the_bits_of_the_step_for_other_inputs(name):
    step = gradient(LOSSES[name])
    replay = trace(step, made(0))
    for seed in (1, 2):
        inputs = made(seed)
        before = tree.clone(inputs)
        found, expected = replay(inputs), step(inputs)
        assert all(tree.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
        assert tree.equal(inputs, before)


REFUSED = {
    "a number that is read": lambda w, x, y: (x @ w.T).sum() * float(y.max()),
    "a mask": lambda w, x, y: (x @ w.T)[y == 0].sum(),
    "a choice": lambda w, x, y: (x @ w.T).sum() if y.max() > 1 else w.sum(),
    "places of some": lambda w, x, y: (x @ w.T)[torch.nonzero(y).flatten()].sum(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_steps_that_depend_on_values_cannot_be_traced(name):
    with pytest.raises(ValueError, match="depends on the values"):
        trace(gradient(REFUSED[name]), made(0))


def test_nothing_is_compiled_for_it(tmp_path):
    """Neither tracing nor counting operations imports torch's compiler, which takes seconds."""
    script = """
import sys, torch, fedloom as fl
from fedloom.training.fast import step_cache
step_cache.TRIALS, step_cache.SHORT_S, traced = 3, 1e9, []
make = step_cache.trace
step_cache.trace = lambda *given: traced.append(given) or make(*given)
experiment = fl.run(fl.FedAvg(), data="digits", clients=3, rounds=2, engine="sequential", out=sys.argv[1])
assert traced and experiment.summary["flops_per_round"] > 0
assert "torch._dynamo" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "run"], check=False, timeout=120)
    assert done.returncode == 0
