"""The architectures by name, and the inputs that they accept. Each architecture is imported when it is looked up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
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
    "text": ("text_mean", "text_cnn", "char_lstm", "text_transformer", "lm_lstm", "lm_transformer"),
    "sensors": ("har_cnn",),
    "tables": ("table_mlp",),
}
_KINDS: Mapping[str, tuple[str, ...]] = {
    "mlp": ("picture", "number"),
    "text": ("token",),
    "sensors": ("number",),
    "tables": ("number", "category"),
}
"""The inputs that the models of a file accept. The models of files that are not listed accept images."""

FLAT = _FILES["mlp"]  # these models accept inputs of any shape
BY_SPEC = frozenset(name for file in ("text", "sensors", "tables") for name in _FILES[file])
"""The models whose builder takes an InputSpec instead of the shape of the only input."""
SEQUENCES = frozenset({"lm_lstm", "lm_transformer"})
"""The models with features for every position (B, T, D), for task=language. All others have one feature vector per example."""
KINDS: Mapping[str, frozenset[str]] = MappingProxyType(
    {name: frozenset(_KINDS.get(file, ("picture",))) for file, names in _FILES.items() for name in names}
)
"""The kinds of input fields that each model accepts (see `fedloom.inputs.Field`)."""

ZOO: Registry[Callable[..., nn.Module]] = Registry(
    {name: f"fedloom.models.{file}:{name}" for file, names in _FILES.items() for name in names}
)
"""`builder(input_shape, width=None, *, <options>) -> body`, or `builder(spec, ...)` for models in `BY_SPEC`; the builder's docstring
describes the model."""
