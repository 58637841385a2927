"""Pieces that several architectures share: normalisation by name, and the projection to a common feature width."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from torch import Tensor, nn

from fedloom.errors import ConfigError

CHANNELS_PER_GROUP = 16
"""Wu & He, Group Normalization (ECCV 2018), table 3. One channel per group would zero a map of one pixel."""


def group_norm(n_channels: int) -> nn.GroupNorm:
    """GroupNorm over groups of about 16 channels; fewer, larger groups where 16 does not divide."""
    n_groups = max(1, n_channels // CHANNELS_PER_GROUP)
    while n_channels % n_groups:
        n_groups -= 1
    return nn.GroupNorm(n_groups, n_channels)


def norm2d(kind: str, n_channels: int) -> nn.Module:
    """The normalisation layer called `kind` ("batch" or "group") for maps (B, n_channels, H, W)."""
    if kind == "batch":
        return nn.BatchNorm2d(n_channels)
    if kind == "group":
        return group_norm(n_channels)
    raise ConfigError(f"model option norm={kind!r} is unknown; known: batch, group")


def sequence(layers: Mapping[str, nn.Module]) -> nn.Sequential:
    """Named layers, one after the other."""
    return nn.Sequential(OrderedDict(layers))


def projected(layers: Mapping[str, nn.Module], features: int, width: int | None) -> nn.Sequential:
    """Named layers that end in (B, features), then a linear map to (B, width) where another width is asked for."""
    if width is None or width == features:
        return sequence(layers)
    return sequence({**layers, "project": nn.Linear(features, width)})


def refuse_tied(modules: Mapping[str, nn.Module]) -> None:
    """A client's tensors are bound by name, so only one of two names would be trained. Raises ConfigError."""
    names: dict[Tensor, str] = {}
    for net, module in modules.items():
        for name, tensor in module.state_dict(keep_vars=True).items():  # every name of every tensor that lasts
            if isinstance(tensor, Tensor) and tensor in names:
                raise ConfigError(
                    f"model: '{names[tensor]}' and '{net}.{name}' are one tensor; tied weights are not supported"
                )
            names[tensor] = f"{net}.{name}"
