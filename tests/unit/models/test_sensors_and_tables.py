"""Models for signals and for tables."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap

from fedloom.errors import ConfigError
from fedloom.inputs import Field, InputSpec, call_arguments
from fedloom.models import ZOO

NUMBERS = Field(name="numbers", shape=(3,), kind="number")
CATEGORIES = Field(name="categories", shape=(4,), kind="category", levels=(2, 1, 9, 300))
BOTH = {
    "numbers": torch.linspace(-1, 1, 15).reshape(5, 3),
    "categories": torch.tensor([[2, 1, 9, 300]] * 2 + [[0, 0, 0, 0]] * 3),
}


def n_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def windows(n_channels=9, n_steps=128):
    return InputSpec((Field(shape=(n_channels, n_steps), kind="number"),))


def called(module, inputs):
    args, kwargs = call_arguments(module, inputs)
    return module(*args, **kwargs)


def assert_maps(models, *inputs):
    """Compare gradients mapped over clients with those of a loop. Each input is stacked."""
    weights, _ = stack_module_state(models)

    def loss(own, *mine):
        return functional_call(models[0], own, mine).square().mean()

    mapped = vmap(grad(loss))(weights, *inputs)
    for i, model in enumerate(models):
        model(*(part[i] for part in inputs)).square().mean().backward()
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(mapped[key][i], parameter.grad, rtol=1e-8, atol=1e-10, msg=key)


@pytest.mark.parametrize(
    ("n_steps", "options", "flat", "count"),
    [
        (128, {}, 512, 2_253_958),
        (128, {"linear": False}, 1664, 21_120 + 6 * 1665),
        (256, {"linear": False}, 3712, None),
    ],
)
def test_har_cnn_has_the_published_size(n_steps, options, flat, count):
    body = ZOO["har_cnn"](windows(n_steps=n_steps), **options)
    assert body(torch.randn(2, 9, n_steps)).shape == (2, flat)
    if count:
        assert n_parameters(body) + n_parameters(nn.Linear(flat, 6)) == count


@pytest.mark.parametrize("n_steps", [28, 29, 50])
@pytest.mark.parametrize("linear", [True, False])
def test_short_windows_and_a_common_width_are_taken(n_steps, linear):
    body = ZOO["har_cnn"](windows(3, n_steps), 24, linear=linear)
    assert body(torch.randn(2, 3, n_steps)).shape == (2, 24)


def test_har_cnn_can_be_mapped_over_clients():
    torch.manual_seed(0)
    models = [ZOO["har_cnn"](windows(2, 40), 8).double() for _ in range(2)]
    assert_maps(models, torch.randn(2, 3, 2, 40, dtype=torch.float64))


def test_a_tables_embeddings_have_one_row_more_than_levels():
    body = ZOO["table_mlp"](InputSpec((NUMBERS, CATEGORIES)))
    shapes = [tuple(part.weight.shape) for part in body.embeddings]
    assert shapes == [(3, 1), (2, 1), (10, 5), (301, 50)]
    n_in = 3 + 1 + 1 + 5 + 50
    count = 3 + 2 + 50 + 301 * 50 + (n_in * 200 + 200) + (200 * 100 + 100)
    assert n_parameters(body) == count
    assert called(body, BOTH).shape == (5, 100)


def test_an_unknown_level_adds_nothing():
    torch.manual_seed(0)
    body = ZOO["table_mlp"](InputSpec((NUMBERS, CATEGORIES)))
    called(body, BOTH).square().sum().backward()
    for part in body.embeddings:
        assert not part.weight[0].any()
        assert not part.weight.grad[0].any()
        assert part.weight.grad[-1].any()


def test_either_part_of_a_table_may_be_absent():
    plain = ZOO["table_mlp"](InputSpec((Field(shape=(3,), kind="number"),)), hidden1=6, hidden2=5)
    assert n_parameters(plain) == (3 * 6 + 6) + (6 * 5 + 5)
    assert called(plain, BOTH["numbers"]).shape == (5, 5)
    for spec in (InputSpec((CATEGORIES,)), InputSpec((Field(shape=(4,), kind="category", levels=CATEGORIES.levels),))):
        body = ZOO["table_mlp"](spec)
        inputs = BOTH["categories"] if spec.is_single else {"categories": BOTH["categories"]}
        assert called(body, inputs).shape == (5, 100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_table_can_be_mapped_over_clients(dtype):
    body = ZOO["table_mlp"](InputSpec((NUMBERS, CATEGORIES)), hidden1=6, hidden2=5).to(dtype)
    torch.manual_seed(0)
    assert body(BOTH["numbers"].to(dtype), BOTH["categories"]).dtype == dtype
    models = [ZOO["table_mlp"](InputSpec((NUMBERS, CATEGORIES)), hidden1=6, hidden2=5).double() for _ in range(2)]
    assert_maps(models, torch.randn(2, 5, 3, dtype=torch.float64), torch.stack([BOTH["categories"]] * 2))


@pytest.mark.parametrize(
    ("name", "spec", "words"),
    [
        ("har_cnn", windows(9, 27), ["har_cnn", "28 steps", "(9, 27)"]),
        ("har_cnn", InputSpec((Field(shape=(561,), kind="number"),)), ["har_cnn", "(C, T)", "(561,)", "mlp"]),
        (
            "table_mlp",
            InputSpec((Field(name="age", shape=(3,), kind="number"),)),
            ["table_mlp", "by these names", "age"],
        ),
        ("table_mlp", InputSpec((Field(shape=(1, 8, 8), kind="picture"),)), ["table_mlp", "picture"]),
        ("table_mlp", InputSpec((NUMBERS, Field(name="text", shape=(3,), kind="token", levels=(9,)))), ["text: token"]),
    ],
)
def test_inputs_that_do_not_fit_are_refused_in_one_line(name, spec, words):
    with pytest.raises(ConfigError) as caught:
        ZOO[name](spec)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
