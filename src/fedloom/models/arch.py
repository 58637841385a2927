"""Architectures: recipes for models on one problem, from the zoo or from a user's module."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from fedloom.errors import ConfigError, suggest
from fedloom.models.layers import refuse_tied, sequence
from fedloom.models.own_state import refuse_old_norms, refuse_own_state
from fedloom.models.splitting import check_split, dry_run, split
from fedloom.models.zoo import FLAT, ZOO

Option = str | int | float | bool
Builder = Callable[..., nn.Module]

SMALLEST_SIDE = 8


@dataclass(frozen=True, kw_only=True)
class Arch:
    """A recipe for models of one architecture on one problem. `arch(...)` creates and checks a recipe.

    Every model is `Sequential(body=..., head=Linear)`: the body maps inputs (B, *input_shape) to features
    (B, features), the head maps those to logits (B, n_classes). Initial weights come from torch's global generator,
    which the caller seeds.

    Attributes:
        name: the name in the zoo, or the name of the user's module.
        build: from the zoo, `build(input_shape, width, **options) -> body`; else the user's class, function or instance.
        input_shape: (C, H, W), or (D,) for flat features.
        n_classes: Y.
        width: the requested common feature width; None keeps the architecture's own.
        options: sorted pairs (name, value): hashable, so that recipes can be compared and clients grouped by them.
    """

    name: str
    build: Builder
    input_shape: tuple[int, ...]
    n_classes: int
    width: int | None = None
    options: tuple[tuple[str, Option], ...] = ()

    def model(self) -> nn.Sequential:
        """Return a new model; its tensors are named "body....", "head.weight" and "head.bias"."""
        return sequence({"body": self.body(), "head": self.head()})

    def body(self, width: int | None = None) -> nn.Module:
        """Return a new body with `width` output features; default: the recipe's width, else the architecture's own."""
        return self.build(self.input_shape, width or self.width, **dict(self.options))

    def head(self, features: int | None = None) -> nn.Linear:
        """Return a new linear head from `features` inputs (default: the features of `body()`) to the logits."""
        return nn.Linear(features or self.features, self.n_classes)

    @cached_property
    def features(self) -> int:
        """The number of features of `body()`, determined once by a dry run that restores the state of torch's generator."""
        with torch.random.fork_rng(devices=[]):
            return dry_run(self.body(), self.input_shape).shape[-1]


class OutsideArch(Arch):
    """A recipe for a user's module class, function or instance, which is split into body and head.

    A class or function is called with only those arguments (`input_shape`, `n_classes`, `width` and the options) that its signature
    names. An instance is copied: its weights are the initial weights of every model. If the requested width differs from the
    module's own, the body gets a final linear layer that maps its output to that width, and the head is replaced.
    """

    def model(self) -> nn.Sequential:
        body, head = self._parts(self.width)
        return sequence({"body": body, "head": head})

    def body(self, width: int | None = None) -> nn.Module:
        return self._parts(width or self.width)[0]

    def head(self, features: int | None = None) -> nn.Linear:
        own = self._parts(self.width)[1]
        return own if features is None or features == own.in_features else nn.Linear(features, self.n_classes)

    def check(self) -> None:
        """Raise ConfigError unless the module can be built, split and run on two dummy inputs."""
        with torch.random.fork_rng(devices=[]):
            refuse_old_norms(self.build, self.name)  # these modules cannot be copied
            module = self._module(self.width).to(torch.get_default_dtype())  # in the dtype that clients use
            refuse_old_norms(module, self.name)
            refuse_tied({self.name: module})  # before the split makes separate copies
            refuse_own_state(module, self.input_shape, self.name)
            check_split(module, self.input_shape, self.n_classes, self.name)

    def _parts(self, width: int | None) -> tuple[nn.Module, nn.Linear]:
        body, head = split(self._module(width), self.n_classes, self.name)
        if width is None or width == head.in_features:
            return body, head
        project = nn.Linear(head.in_features, width)
        return sequence({"backbone": body, "project": project}), nn.Linear(width, self.n_classes)

    def _module(self, width: int | None) -> nn.Module:
        if isinstance(self.build, nn.Module):
            return deepcopy(self.build)
        module: object = self.build(**self._arguments(inspect.signature(self.build), width))
        if not isinstance(module, nn.Module):
            raise ConfigError(f"model {self.name}: must return an nn.Module, not {type(module).__name__}")
        if any(isinstance(parameter, UninitializedParameter) for parameter in module.parameters()):
            dry_run(module, self.input_shape)
        return module

    def _arguments(self, signature: inspect.Signature, width: int | None) -> dict[str, object]:
        offered = {"input_shape": self.input_shape, "n_classes": self.n_classes, "width": width, **dict(self.options)}
        wanted: dict[str, object] = {key: value for key, value in offered.items() if key in signature.parameters}
        if width is None and "width" in wanted and signature.parameters["width"].default is not inspect.Parameter.empty:
            del wanted["width"]
        try:
            signature.bind(**wanted)
        except TypeError as error:
            raise ConfigError(f"model {self.name}: {error}; available arguments: {', '.join(offered)}") from None
        return wanted


def arch(
    source: str | Builder,
    input_shape: Sequence[int],
    n_classes: int,
    width: int | None = None,
    options: Mapping[str, Option] | None = None,
) -> Arch:
    """Return the checked recipe for `source`: a name in `ZOO`, or a user's nn.Module class, instance, or function that returns a module.

    Raises:
        ConfigError: an unknown name or option, an impossible size, or a module without a linear head.
    """
    shape, options = tuple(input_shape), dict(options or {})
    sizes = {"n_classes": n_classes, **({} if width is None else {"width": width})}
    for key, value in [*sizes.items(), *(("input_shape", side) for side in shape)]:
        _check_count(key, value)
    if not isinstance(source, str):
        return _outside(source, shape, n_classes, width, options)
    if source not in ZOO:
        raise ConfigError(f"model={source}: there is no such model{suggest(source, ZOO)}")
    builder = ZOO[source]
    if source not in FLAT and (len(shape) != 3 or min(shape[1:]) < SMALLEST_SIDE):
        raise ConfigError(
            f"model={source}: needs images (C, H, W) of at least 8x8 pixels, but the inputs have shape {shape}; use mlp or logistic"
        )
    _check_options(source, options)
    made = Arch(
        name=source,
        build=builder,
        input_shape=shape,
        n_classes=n_classes,
        width=width,
        options=tuple(sorted(options.items())),
    )
    _ = made.features  # reports impossible combinations of options now, not during a run
    return made


def option_defaults(name: str) -> dict[str, Option]:
    """Return the options of a model in the zoo with their default values."""
    parameters = inspect.signature(ZOO[name]).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


def _outside(
    source: Builder, shape: tuple[int, ...], n_classes: int, width: int | None, options: dict[str, Option]
) -> OutsideArch:
    name = type(source).__name__ if isinstance(source, nn.Module) else getattr(source, "__name__", repr(source))
    if not callable(source):
        raise ConfigError(f"model={source!r}: give a name, an nn.Module, or a function that returns one")
    known = () if isinstance(source, nn.Module) else inspect.signature(source).parameters
    for key in options:
        if key not in known:
            raise ConfigError(f"model {name} has no option '{key}': its signature does not name it")
    made = OutsideArch(
        name=name,
        build=source,
        input_shape=shape,
        n_classes=n_classes,
        width=width,
        options=tuple(sorted(options.items())),
    )
    made.check()
    return made


def _check_count(key: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{key}={value!r}: must be an integer of at least 1")


def _check_options(name: str, options: Mapping[str, Option]) -> None:
    defaults = option_defaults(name)
    for key, value in options.items():
        if key not in defaults:
            hint = suggest(key, defaults) if defaults else "; it has none"
            raise ConfigError(f"model {name} has no option '{key}'{hint}")
        default = defaults[key]
        if type(value) is not type(default) and not (type(default) is float and type(value) is int):
            raise ConfigError(
                f"model option {key}={value!r}: must be of type {type(default).__name__}, such as {key}={default!r}"
            )
        if type(default) is int:
            _check_count(f"model option {key}", value)
