"""The architectures by name; each is imported at lookup."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from fedloom.lazy import Registry

if TYPE_CHECKING:
    from torch import nn

_FILES: Mapping[str, tuple[str, ...]] = {
    "mlp": ("mlp", "logistic"),
    "cnn": ("fedavg_cnn", "fedmr_cnn", "fedrir_cnn"),
    "vgg": ("vgg16",),
    "mobilenet": ("mobilenetv2",),
    "resnet": ("resnet8", "resnet10", "resnet18", "resnet20", "resnet34"),
    "patches": ("vit_tiny", "mixer"),
}
FLAT = _FILES["mlp"]  # these take inputs of any shape

ZOO: Registry[Callable[..., nn.Module]] = Registry(
    {name: f"fedloom.models.{file}:{name}" for file, names in _FILES.items() for name in names}
)
"""`builder(input_shape, width=None, *, <options>) -> body`; the builder's docstring describes the model."""
