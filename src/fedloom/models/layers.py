"""Layers that several architectures share: normalisation by name, and the projection to a common feature width."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fedloom.errors import ConfigError
from fedloom.inputs import unwrapped

CHANNELS_PER_GROUP = 16
"""From Wu & He, Group Normalization (ECCV 2018), table 3. With one channel per group, a map of one pixel would become zero."""


def group_norm(n_channels: int) -> nn.GroupNorm:
    """Return GroupNorm over groups of about 16 channels, or over fewer, larger groups if 16 does not divide `n_channels`."""
    n_groups = max(1, n_channels // CHANNELS_PER_GROUP)
    while n_channels % n_groups:
        n_groups -= 1
    return nn.GroupNorm(n_groups, n_channels)


def norm2d(kind: str, n_channels: int) -> nn.Module:
    """Return the normalisation layer called `kind` ("batch" or "group") for maps (B, n_channels, H, W)."""
    if kind == "batch":
        return nn.BatchNorm2d(n_channels)
    if kind == "group":
        return group_norm(n_channels)
    raise ConfigError(f"model option norm={kind!r} is unknown; known: batch, group")


def sequence(layers: Mapping[str, nn.Module]) -> nn.Sequential:
    """Return the named layers as one sequence."""
    return nn.Sequential(OrderedDict(layers))


class InputChain(nn.Sequential):
    """Modules in sequence, the first of which receives all inputs."""

    @property
    def entry(self) -> nn.Module:
        """The module that receives the inputs."""
        return next(self.children())

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Return the last module's output."""
        first, *others = self.children()
        x = unwrapped(first(*inputs, **named))
        for module in others:
            x = module(x)
        return x


class Split(InputChain):
    """A model in two parts: `body` outputs features, and `head` maps them to predictions."""

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__(OrderedDict(body=body, head=head))


def projected(layers: Mapping[str, nn.Module], features: int, width: int | None) -> nn.Sequential:
    """Return the named layers, which output (B, features). If `width` differs, a linear map to (B, width) follows them."""
    if width is None or width == features:
        return sequence(layers)
    return sequence({**layers, "project": nn.Linear(features, width)})


def refuse_tied(modules: Mapping[str, nn.Module]) -> None:
    """Raise ConfigError for tied weights. A client's tensors are bound by name, so only one of two tied tensors would be trained."""
    names: dict[Tensor, str] = {}
    for net, module in modules.items():
        for name, tensor in module.state_dict(keep_vars=True).items():  # all names of every persistent tensor
            if isinstance(tensor, Tensor) and tensor in names:
                raise ConfigError(
                    f"model: '{names[tensor]}' and '{net}.{name}' are one tensor; tied weights are not supported, so use separate ones"
                )
            names[tensor] = f"{net}.{name}"


def check_dropout(dropout: float) -> None:
    """Raise ConfigError unless `dropout` is a probability below 1."""
    if not 0 <= dropout < 1:
        raise ConfigError(f"model option dropout={dropout!r}: must be a number from 0 to below 1")
