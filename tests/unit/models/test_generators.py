"""The image generators, and FedRIR's information distillation."""

import pytest
import torch

from fedloom.errors import ConfigError
from fedloom.models import ImageGenerator, InformationDistillation, VtcDecoder

SHAPES = [(1, 8, 8), (1, 16, 16), (1, 28, 28), (3, 32, 32), (3, 64, 64), (1, 11, 9), (2, 30, 31), (3, 8, 32)]


def n_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("shape", SHAPES)
def test_image_generator_makes_images_of_the_exact_size(shape):
    assert ImageGenerator(20, shape)(torch.randn(3, 20)).shape == (3, *shape)


@pytest.mark.parametrize(("shape", "count"), [((1, 28, 28), 577_345), ((3, 32, 32), 874_435), ((3, 64, 64), 5_602_243)])
def test_image_generator_has_the_published_size(shape, count):
    assert n_parameters(ImageGenerator(512, shape)) == count


def test_information_distillation_gives_a_mean_and_a_bounded_log_variance():
    module = InformationDistillation(512)
    assert n_parameters(module) == 263_424
    mean, log_variance = module(100 * torch.randn(4, 512))
    assert mean.shape == log_variance.shape == (4, 512)
    assert log_variance.abs().max() <= 1 < mean.abs().max()


@pytest.mark.parametrize("form", ["linear", "conv"])
@pytest.mark.parametrize("shape", [*SHAPES, (1, 4, 4)])
def test_decoder_makes_images_of_the_exact_size_within_one(shape, form):
    images = VtcDecoder(20, shape, form)(100 * torch.randn(3, 20))
    assert images.shape == (3, *shape)
    assert images.abs().max() <= 1
    assert images.std() > 0


@pytest.mark.parametrize("form", ["linear", "conv"])
def test_decoder_can_learn_an_image(form):
    torch.manual_seed(0)
    decoder = VtcDecoder(8, (1, 8, 8), form)
    features, image = torch.randn(1, 8), torch.linspace(-0.8, 0.8, 64).reshape(1, 1, 8, 8)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        error = (decoder(features) - image).square().mean()
        error.backward()
        optimizer.step()
    assert error < 0.01


def test_only_images_can_be_made():
    with pytest.raises(ConfigError, match=r"\(64,\)"):
        ImageGenerator(8, (64,))
    with pytest.raises(ConfigError, match=r"\(64,\)"):
        VtcDecoder(8, (64,))
    with pytest.raises(ConfigError, match="known: conv, linear"):
        VtcDecoder(8, (1, 8, 8), "spline")
