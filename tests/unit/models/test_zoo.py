"""The architectures for images: sizes, shapes, tensor names, seeds, widths, memory formats, and vectorisation over clients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap

from fedloom.models import ZOO, arch
from fedloom.models.zoo import KINDS

SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 64, 64)]
HEAVY = {"vgg16", "resnet10", "resnet18", "resnet34", "mobilenetv2"}
PICTURES = sorted(name for name in ZOO if "picture" in KINDS[name])
LIGHT = sorted(set(PICTURES) - HEAVY)
WITH_NORM = ["fedrir_cnn", "resnet8", "resnet10", "resnet18", "resnet20", "resnet34", "vgg16", "mobilenetv2"]


def n_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def seeded_model(*recipe, seed=0):
    made = arch(*recipe)
    torch.manual_seed(seed)
    return made.model()


@pytest.fixture
def float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize(
    ("name", "shape", "count"),
    [
        ("mlp", (1, 28, 28), 784 * 200 + 200 + 200 * 10 + 10),
        ("logistic", (1, 28, 28), 7_850),
        ("fedavg_cnn", (1, 28, 28), 582_026),
        ("fedmr_cnn", (3, 32, 32), 62_006),
        ("resnet8", (3, 32, 32), 78_042),
        ("resnet20", (3, 32, 32), 219_482),
        ("resnet18", (3, 32, 32), 11_173_962),
        ("vgg16", (3, 32, 32), 33_646_666),
    ],
)
def test_number_of_parameters_is_the_papers(name, shape, count):
    assert n_parameters(arch(name, shape, 10).model()) == count


@pytest.mark.parametrize(
    ("shape", "width", "count"),
    [
        ((1, 28, 28), None, 577_088),
        ((3, 32, 32), None, 873_600),
        ((3, 64, 64), None, 5_592_192),
        ((1, 28, 28), 1024, 1_101_888),
        ((3, 32, 32), 1024, 1_693_312),
        ((3, 64, 64), 1024, 11_130_496),
    ],
)
def test_fedrir_extractors_have_the_published_sizes(shape, width, count):
    assert n_parameters(arch("fedrir_cnn", shape, 10).body(width)) == count


def test_the_unused_norm_of_fedmrs_released_resnet20_can_be_left_out():
    made = arch("resnet20", (3, 32, 32), 10, options={"final_norm": False})
    assert n_parameters(made.model()) == 219_482 - 512


@pytest.mark.parametrize(
    ("name", "shape"),
    [(name, shape) for name in LIGHT for shape in SHAPES] + [(name, SHAPES[0]) for name in sorted(HEAVY)],
)
def test_body_gives_features_and_head_gives_logits(name, shape):
    made = arch(name, shape, 7)
    model = made.model().eval()
    features = model.body(torch.randn(2, *shape))
    assert features.shape == (2, made.features)
    assert model.head(features).shape == (2, 7)
    assert {key.split(".")[0] for key in model.state_dict()} <= {"body", "head"}
    assert {"head.weight", "head.bias"} <= set(model.state_dict())


@pytest.mark.parametrize("name", ["fedavg_cnn", "fedrir_cnn", "resnet8", "vit_tiny", "mixer", "mobilenetv2"])
@pytest.mark.parametrize("shape", [(1, 11, 9), (2, 30, 17)])
def test_odd_and_oblong_images_are_taken(name, shape):
    assert arch(name, shape, 3).model().eval()(torch.randn(2, *shape)).shape == (2, 3)


@pytest.mark.parametrize("name", ["mlp", "logistic"])
def test_flat_models_take_flat_features(name):
    assert arch(name, (13,), 3).model()(torch.randn(4, 13)).shape == (4, 3)


@pytest.mark.parametrize("name", PICTURES)
def test_a_common_width_is_kept_by_body_head_and_model(name):
    shape = (1, 8, 8)
    made = arch(name, shape, 5, width=24)
    assert made.features == 24
    model = made.model().eval()
    assert model.head.in_features == 24
    assert model.body(torch.randn(2, *shape)).shape == (2, 24)


def test_body_can_be_asked_for_another_width_than_the_recipes():
    made = arch("resnet8", (3, 32, 32), 10, width=32)
    assert made.body(48).eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 48)
    assert made.head(48).in_features == 48


def test_a_projection_appears_only_where_the_width_differs():
    assert arch("resnet8", (1, 8, 8), 10, width=64).body().state_dict().keys() == (
        arch("resnet8", (1, 8, 8), 10).body().state_dict().keys()
    )
    assert "project.weight" in arch("resnet8", (1, 8, 8), 10, width=63).body().state_dict()


@pytest.mark.parametrize("name", LIGHT)
def test_weights_depend_on_torchs_seed_alone(name):
    one, two, other = (seeded_model(name, (1, 8, 8), 10, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not torch.equal(one["head.weight"], other["head.weight"])


def test_making_a_recipe_leaves_torchs_generator_alone():
    before = torch.get_rng_state()
    assert arch("resnet8", (1, 8, 8), 10).features == 64
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", [*LIGHT, "mobilenetv2", "resnet10"])
def test_channels_last_changes_nothing(name):
    model = seeded_model(name, (3, 16, 16), 4)
    inputs = torch.randn(3, 3, 16, 16)
    expected = model(inputs)
    permuted = inputs.to(memory_format=torch.channels_last)
    model = model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(permuted), expected)


def loss(weights, buffers, model, inputs, labels):
    return F.cross_entropy(functional_call(model, (weights, buffers), (inputs,)), labels)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", [*LIGHT, "mobilenetv2"])
def test_mapping_over_two_clients_equals_a_loop(name):
    models = [seeded_model(name, (1, 8, 8), 4, seed=seed) for seed in (1, 2)]
    inputs, labels = torch.randn(2, 5, 1, 8, 8), torch.randint(4, (2, 5))
    weights, buffers = stack_module_state(models)
    mapped = vmap(lambda w, b, x, y: grad(loss)(w, b, models[0], x, y))(weights, buffers, inputs, labels)
    for i, model in enumerate(models):
        F.cross_entropy(model(inputs[i]), labels[i]).backward()
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(mapped[key][i], parameter.grad, rtol=1e-8, atol=1e-10, msg=key)
        for key, buffer in model.named_buffers():
            torch.testing.assert_close(buffers[key][i], buffer, rtol=1e-8, atol=1e-10, msg=key)


@pytest.mark.parametrize("name", WITH_NORM)
def test_group_norm_leaves_no_statistics_behind(name):
    model = arch(name, (1, 8, 8), 4, options={"norm": "group"}).model()
    assert not list(model.buffers())
    norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
    assert norms
    assert all(norm.num_channels > norm.num_groups for norm in norms)


@pytest.mark.parametrize(("dropout", "n"), [(0.5, 2), (0, 0)])
def test_vggs_dropout_can_be_left_out(dropout, n):
    body = arch("vgg16", (1, 8, 8), 4, options={"dropout": dropout}).body()
    assert sum(isinstance(module, nn.Dropout) for module in body.modules()) == n


@pytest.mark.parametrize("name", ["vit_tiny", "mixer"])
def test_patch_models_are_built_as_their_options_say(name):
    body = arch(name, (3, 32, 32), 4, options={"patch": 8, "dim": 32, "depth": 2}).body()
    assert body(torch.zeros(1, 3, 32, 32)).shape == (1, 32)
    assert len([key for key in dict(body.named_children()) if key.startswith("block")]) == 2
