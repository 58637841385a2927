"""Residual networks for small images, with a 3x3 stem of stride 1, stages that halve the map, and global average pooling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedloom.models.layers import norm2d, projected

Block = type["BasicBlock"] | type["PreactivationBottleneck"]


def _conv(n_in: int, n_out: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, kernel, stride=stride, padding=kernel // 2, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut (He et al., CVPR 2016, figure 5 left, with option B for the shortcut)."""

    expansion = 1

    def __init__(self, n_in: int, n_planes: int, stride: int, norm: str) -> None:
        super().__init__()
        self.conv1 = _conv(n_in, n_planes, 3, stride)
        self.norm1 = norm2d(norm, n_planes)
        self.conv2 = _conv(n_planes, n_planes, 3)
        self.norm2 = norm2d(norm, n_planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or n_in != n_planes:
            self.shortcut.add_module("conv", _conv(n_in, n_planes, 1, stride))
            self.shortcut.add_module("norm", norm2d(norm, n_planes))

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))


class PreactivationBottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, each of which follows a normalisation and a ReLU (He et al., ECCV 2016).

    The shortcut is applied to the raw input. It is a plain convolution if the shapes differ.
    """

    expansion = 4

    def __init__(self, n_in: int, n_planes: int, stride: int, norm: str) -> None:
        super().__init__()
        n_out = self.expansion * n_planes
        self.norm1 = norm2d(norm, n_in)
        self.conv1 = _conv(n_in, n_planes, 1)
        self.norm2 = norm2d(norm, n_planes)
        self.conv2 = _conv(n_planes, n_planes, 3, stride)
        self.norm3 = norm2d(norm, n_planes)
        self.conv3 = _conv(n_planes, n_out, 1)
        self.shortcut = nn.Sequential()
        if stride != 1 or n_in != n_out:
            self.shortcut.add_module("conv", _conv(n_in, n_out, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv1(torch.relu(self.norm1(x)))
        inner = self.conv2(torch.relu(self.norm2(inner)))
        inner = self.conv3(torch.relu(self.norm3(inner)))
        total: Tensor = inner + self.shortcut(x)
        return total


def _stages(
    block: Block, n_in: int, planes: Sequence[int], depths: Sequence[int], norm: str
) -> tuple[dict[str, nn.Module], int]:
    """Return stages of residual blocks, and their number of output channels.

    The first stage has full resolution; each later one halves it.
    """
    stages: dict[str, nn.Module] = {}
    for i, (n_planes, depth) in enumerate(zip(planes, depths, strict=True), start=1):
        blocks = []
        for j in range(depth):
            stride = 2 if i > 1 and j == 0 else 1
            blocks.append(block(n_in, n_planes, stride, norm))
            n_in = n_planes * block.expansion
        stages[f"stage{i}"] = nn.Sequential(*blocks)
    return stages, n_in


def _basic(
    input_shape: Sequence[int], width: int | None, norm: str, planes: Sequence[int], depths: Sequence[int]
) -> nn.Sequential:
    stem = {"conv": _conv(input_shape[0], planes[0], 3), "norm": norm2d(norm, planes[0]), "relu": nn.ReLU()}
    stages, features = _stages(BasicBlock, planes[0], planes, depths, norm)
    return projected(stem | stages | {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}, features, width)


def resnet8(input_shape: Sequence[int], width: int | None = None, *, norm: str = "batch") -> nn.Sequential:
    """Return a ResNet with basic blocks [1, 1, 1] of 16, 32 and 64 channels. It has 78,042 parameters on CIFAR-10."""
    return _basic(input_shape, width, norm, (16, 32, 64), (1, 1, 1))


def resnet10(input_shape: Sequence[int], width: int | None = None, *, norm: str = "batch") -> nn.Sequential:
    """Return a ResNet with basic blocks [1, 1, 1, 1] of 64 to 512 channels. It has 4.9 M parameters on CIFAR-10."""
    return _basic(input_shape, width, norm, (64, 128, 256, 512), (1, 1, 1, 1))


def resnet18(input_shape: Sequence[int], width: int | None = None, *, norm: str = "batch") -> nn.Sequential:
    """Return a ResNet with basic blocks [2, 2, 2, 2] of 64 to 512 channels. It has 11,173,962 parameters on CIFAR-10."""
    return _basic(input_shape, width, norm, (64, 128, 256, 512), (2, 2, 2, 2))


def resnet34(input_shape: Sequence[int], width: int | None = None, *, norm: str = "batch") -> nn.Sequential:
    """Return a ResNet with basic blocks [3, 4, 6, 3] of 64 to 512 channels. It has 21.3 M parameters on CIFAR-10."""
    return _basic(input_shape, width, norm, (64, 128, 256, 512), (3, 4, 6, 3))


def resnet20(
    input_shape: Sequence[int], width: int | None = None, *, norm: str = "batch", final_norm: bool = True
) -> nn.Sequential:
    """Return FedMR's ResNet-20 with pre-activation bottlenecks [2, 2, 2] of 16, 32 and 64 (x4) channels.

    It has 219,482 parameters on CIFAR-10. The last norm and ReLU belong to the pre-activation design. FedMR's released code creates that
    norm but never applies it; `final_norm=False` gives the same results as that code (218,970 parameters, without the 512 unused ones).
    Initial weights also follow that code: convolutions are He-normal by fan-out, and norm weights are 0.5.
    """
    stages, features = _stages(PreactivationBottleneck, 16, (16, 32, 64), (2, 2, 2), norm)
    end: dict[str, nn.Module] = {"norm": norm2d(norm, features), "relu": nn.ReLU()} if final_norm else {}
    layers = {"conv": _conv(input_shape[0], 16, 3)} | stages | end
    body = projected(layers | {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}, features, width)
    for module in body.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            nn.init.constant_(module.weight, 0.5)
    return body
