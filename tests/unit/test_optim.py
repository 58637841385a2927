"""Optimisers, which equal those of torch and have no side effects."""

import pytest
import torch

from fedloom import Stream, optim, tree

SETTINGS = {
    "sgd": (optim.sgd(0.1), torch.optim.SGD, {"lr": 0.1}),
    "momentum": (optim.sgd(0.1, 0.9), torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "decay": (
        optim.sgd(0.1, 0.5, 0.01),
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.01},
    ),
    "adam": (optim.adam(0.05), torch.optim.Adam, {"lr": 0.05}),
    "adam betas": (
        optim.adam(0.05, (0.8, 0.95), 1e-6, 0.02),
        torch.optim.Adam,
        {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.02},
    ),
}


def start() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(3, 2, dtype=torch.float64, generator=generator),
        "b": torch.randn((), dtype=torch.float64, generator=generator),
    }


def gradients(params: dict[str, torch.Tensor], step: int) -> dict[str, torch.Tensor]:
    return {name: torch.cos(3 * p + step) + p for name, p in params.items()}


@pytest.mark.parametrize("name", SETTINGS)
def test_twenty_steps_equal_torchs(name):
    ours, theirs, settings = SETTINGS[name]
    params, state = start(), ours.init(start())
    modules = {name: torch.nn.Parameter(p.clone()) for name, p in start().items()}
    reference = theirs(modules.values(), **settings)
    for step in range(20):
        for key, grad in gradients({k: p.detach() for k, p in modules.items()}, step).items():
            modules[key].grad = grad
        reference.step()
        params, state = ours.update(gradients(params, step), state, params, 1.0)
    for key, p in params.items():
        torch.testing.assert_close(p, modules[key].detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", SETTINGS)
def test_nothing_is_changed_in_place(name):
    optimizer = SETTINGS[name][0]
    params, grads = start(), gradients(start(), 0)
    _, state = optimizer.update(grads, optimizer.init(params), params, 1.0)  # a state that is not all zeros
    everything = {"params": params, "grads": grads, "state": state}
    before = tree.clone(everything)
    optimizer.update(grads, state, params, 1.0)
    assert tree.equal(before, everything)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_state_is_complete_from_the_start(name):
    optimizer = SETTINGS[name][0]
    state = optimizer.init(start())
    _, later = optimizer.update(gradients(start(), 0), state, start(), 1.0)
    assert tree.structure(state) == tree.structure(later)


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam"])
def test_scale_multiplies_the_learning_rate(name):
    optimizer, grads = SETTINGS[name][0], gradients(start(), 0)
    whole, _ = optimizer.update(grads, optimizer.init(start()), start(), 1.0)
    half, _ = optimizer.update(grads, optimizer.init(start()), start(), 0.5)
    for key, p in start().items():
        torch.testing.assert_close(half[key] - p, (whole[key] - p) / 2, rtol=1e-12, atol=1e-15)


def test_clamped_parameters_stay_in_their_range():
    params = {"a": torch.tensor([0.2, 0.9, 0.5])}
    optimizer = optim.clamped(optim.sgd(1.0), 0.0, 1.0)
    optimizer.step({"a": torch.tensor([0.5, -0.5, 0.1])}, optimizer.init(params), params, 1.0)
    torch.testing.assert_close(params["a"], torch.tensor([0.0, 1.0, 0.4]))


def test_fit_is_the_optimiser_over_the_batches_and_keeps_its_state():
    """Compare with (p - t)^2 / 2 with momentum, computed by hand. The inputs do not change."""
    before, targets = {"p": torch.tensor(0.0)}, [(torch.tensor(1.0),), (torch.tensor(2.0),)]

    def loss(params, target):
        return (params["p"] - target).square() / 2

    after, state = optim.fit(loss, before, optim.sgd(0.5, 0.5), targets)
    assert before["p"] == 0
    assert float(after["p"]) == 0.5 + 0.5 * (1.5 + 0.5)  # velocities -1, then -0.5 - 1.5
    again, _ = optim.fit(loss, after, optim.sgd(0.5, 0.5), targets[:1], state)
    assert float(again["p"]) == 1.5 - 0.5 * (0.5 * -2.0 + 0.5)


def test_minibatches_visit_every_row_once_per_epoch():
    rows = torch.arange(5), 10 * torch.arange(5)
    found = list(optim.minibatches(rows, 2, 3, Stream(0)))
    assert [len(x) for x, _ in found] == [2, 2, 1] * 3
    assert all(torch.equal(10 * x, y) for x, y in found)
    for epoch in range(3):
        assert sorted(torch.cat([x for x, _ in found[3 * epoch : 3 * epoch + 3]]).tolist()) == list(range(5))
