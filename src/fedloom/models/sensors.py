"""Models for signals: windows (B, C, T) with C channels and T time steps."""

from __future__ import annotations

from torch import nn

from fedloom.errors import ConfigError
from fedloom.inputs import InputSpec
from fedloom.models.layers import projected, sequence

KERNEL = 9
SHORTEST = 28
"""Number of time steps of the shortest window, for which two convolutions and poolings leave one step."""


def har_cnn(spec: InputSpec, width: int | None = None, *, linear: bool = True) -> nn.Sequential:
    """Return PFLlib's HARCNN: two Conv1d (32 and 64 filters of 9 steps) with pooling, then linear layers of 1024 and 512 (or `width`).

    With its head, it has 2,253,958 parameters for C=9, T=128 (UCI HAR) and 6 classes. With `linear=false`, it has no linear layers, and
    21,120 parameters without the head.
    """
    field = spec.fields[0]
    if not spec.is_single or field.kind != "number" or len(field.shape) != 2 or field.shape[1] < SHORTEST:
        raise ConfigError(
            f"model=har_cnn: needs windows (C, T) of numbers with at least {SHORTEST} steps, but the inputs are {spec}; use mlp"
        )
    n_channels, n_steps = field.shape
    layers: dict[str, nn.Module] = {}
    for i, (n_in, n_out) in enumerate([(n_channels, 32), (32, 64)], start=1):
        layers[f"conv{i}"] = nn.Conv1d(n_in, n_out, KERNEL)
        layers |= {f"pool{i}": nn.MaxPool1d(2), f"relu{i}": nn.ReLU()}
        n_steps = (n_steps - KERNEL + 1) // 2
    layers["flatten"] = nn.Flatten()
    if not linear:
        return projected(layers, 64 * n_steps, width)
    layers |= {"linear1": nn.Linear(64 * n_steps, 1024), "relu3": nn.ReLU()}
    return sequence({**layers, "linear2": nn.Linear(1024, width or 512), "relu4": nn.ReLU()})
