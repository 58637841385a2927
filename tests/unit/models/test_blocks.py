"""Building blocks compared with their papers."""

import pytest
import torch
from torch import nn

from fedloom.models import arch
from fedloom.models.attention import Attention
from fedloom.models.layers import group_norm
from fedloom.models.mobilenet import InvertedResidual
from fedloom.models.resnet import BasicBlock, PreactivationBottleneck


@pytest.mark.parametrize(
    ("block", "last"),
    [
        (BasicBlock(8, 8, 1, "batch"), "norm2"),
        (PreactivationBottleneck(8, 2, 1, "batch"), "conv3"),
        (InvertedResidual(8, 8, 6, 1, "batch"), "layers.norm3"),
    ],
)
def test_a_block_whose_inner_path_ends_in_zeros_passes_its_input_on(block, last):
    nn.init.zeros_(block.get_submodule(last).weight)
    inputs = torch.rand(2, 8, 5, 5)
    torch.testing.assert_close(block(inputs), inputs)


@pytest.mark.parametrize("block", [BasicBlock, PreactivationBottleneck])
def test_a_block_with_stride_halves_the_map_rounded_up(block):
    assert block(8, 12, 2, "group")(torch.rand(2, 8, 5, 5)).shape == (2, 12 * block.expansion, 3, 3)


def test_resnet20_starts_as_in_fedmr():
    torch.manual_seed(0)
    body = arch("resnet20", (3, 32, 32), 10).body()
    assert all((m.weight == 0.5).all() for m in body.modules() if isinstance(m, nn.BatchNorm2d))
    kernel = body.stage3[0].conv2.weight
    assert kernel.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)


def test_attention_is_torchs_own():
    ours, theirs = Attention(12, 3), nn.MultiheadAttention(12, 3, batch_first=True)
    names = {"in_proj_weight": "qkv.weight", "in_proj_bias": "qkv.bias"}
    names |= {"out_proj.weight": "out.weight", "out_proj.bias": "out.bias"}
    theirs.load_state_dict({theirs_name: ours.state_dict()[name] for theirs_name, name in names.items()})
    tokens = torch.randn(2, 5, 12)
    torch.testing.assert_close(ours(tokens), theirs(tokens, tokens, tokens)[0])


def test_pooling_before_relu_gives_the_bits_of_the_papers_order():
    torch.manual_seed(0)
    body = arch("fedavg_cnn", (3, 32, 32), 10).body()
    layers = dict(body.named_children())
    order = [*(f"{layer}{i}" for i in (1, 2) for layer in ("conv", "relu", "pool")), "flatten", "linear", "relu3"]
    papers = nn.Sequential(*(layers[name] for name in order))
    images = torch.randn(4, 3, 32, 32)
    assert torch.equal(body(images), papers(images))
    ours, theirs = (torch.autograd.grad(net(images).square().sum(), [*body.parameters()]) for net in (body, papers))
    assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize(("n_channels", "n_groups"), [(3, 1), (16, 1), (24, 1), (50, 2), (64, 4), (512, 32)])
def test_groups_hold_about_sixteen_channels(n_channels, n_groups):
    assert group_norm(n_channels).num_groups == n_groups
