"""MobileNetV2 (Sandler et al., CVPR 2018) with strides for small images."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fedloom.models.layers import norm2d, projected, sequence

STAGES = (
    # expansion, channels, blocks, stride of the first block: table 2 of the paper, but with stride 1 in the second row
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """A 1x1 expansion, a 3x3 depthwise convolution and a 1x1 linear reduction, with a shortcut if input and output shapes agree."""

    def __init__(self, n_in: int, n_out: int, expansion: int, stride: int, norm: str) -> None:
        super().__init__()
        n_inner = expansion * n_in
        layers: dict[str, nn.Module] = {}
        if expansion != 1:
            layers = {
                "expand": nn.Conv2d(n_in, n_inner, 1, bias=False),
                "norm1": norm2d(norm, n_inner),
                "relu1": nn.ReLU6(),
            }
        layers["depthwise"] = nn.Conv2d(n_inner, n_inner, 3, stride, padding=1, groups=n_inner, bias=False)
        layers |= {"norm2": norm2d(norm, n_inner), "relu2": nn.ReLU6()}
        layers |= {"reduce": nn.Conv2d(n_inner, n_out, 1, bias=False), "norm3": norm2d(norm, n_out)}
        self.layers = sequence(layers)
        self.has_shortcut = stride == 1 and n_in == n_out

    def forward(self, x: Tensor) -> Tensor:
        inner: Tensor = self.layers(x)
        return x + inner if self.has_shortcut else inner


def mobilenetv2(input_shape: Sequence[int], width: int | None = None, *, norm: str = "batch") -> nn.Sequential:
    """Return a MobileNetV2 whose stem and second stage keep the resolution, so that 32x32 images become 4x4 maps.

    It has 2.2 M parameters on CIFAR-10.
    """
    n_in = 32
    stem = nn.Conv2d(input_shape[0], n_in, 3, padding=1, bias=False)
    layers: dict[str, nn.Module] = {"conv1": stem, "norm1": norm2d(norm, n_in), "relu1": nn.ReLU6()}
    for i, (expansion, n_out, n_blocks, first_stride) in enumerate(STAGES, start=1):
        blocks = []
        for j in range(n_blocks):
            blocks.append(InvertedResidual(n_in, n_out, expansion, first_stride if j == 0 else 1, norm))
            n_in = n_out
        layers[f"stage{i}"] = nn.Sequential(*blocks)
    layers |= {"conv2": nn.Conv2d(n_in, 1280, 1, bias=False), "norm2": norm2d(norm, 1280), "relu2": nn.ReLU6()}
    return projected(layers | {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}, 1280, width)
