"""Architectures: recipes for models on one problem, from the zoo or from a user's module."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypedDict

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from fedloom.errors import ConfigError, suggest
from fedloom.inputs import Inputs, InputSpec
from fedloom.lazy import classes_in
from fedloom.models import lora
from fedloom.models.fitting import check_fits
from fedloom.models.layers import InputChain, Split, refuse_tied
from fedloom.models.own_state import refuse_old_norms, refuse_own_state
from fedloom.models.splitting import can_split, check_outputs, check_split, dry_run, made_up, split
from fedloom.models.zoo import BY_SPEC, ZOO
from fedloom.objectives import Classification, Objective

Option = str | int | float | bool
Builder = Callable[..., nn.Module]


@dataclass(frozen=True, kw_only=True)
class Arch:
    """A recipe for models of one architecture on one problem. `arch(...)` creates and checks a recipe.

    Every model is `Split(body=..., head=Linear)`. The body maps inputs to features (B, features), or (B, T, features) for sequences. The
    head maps these features to outputs, such as logits (B, n_outputs). Initial weights come from torch's global generator, which the
    caller seeds.

    Attributes:
        name: the name in the zoo, or the name of the user's module.
        build: for a model from the zoo, a function that returns the body (see `fedloom.models.zoo`); otherwise, the user's class, function
            or instance.
        spec: the description of the inputs.
        objective: the learning task, which sets the number of outputs.
        example: two inputs for dry runs.
        width: the requested common feature width; None means the architecture's own width.
        options: sorted pairs (name, value), which are hashable, so that recipes can be compared and clients can be grouped by them.
        base: pretrained weights and low-rank adapters of the body.
        other: the recipe for the model that all clients have in common, if it differs from this recipe.
    """

    name: str
    build: Builder
    spec: InputSpec
    objective: Objective
    width: int | None = None
    options: tuple[tuple[str, Option], ...] = ()
    base: lora.Base = lora.NO_BASE
    example: Inputs = field(compare=False, repr=False)
    other: Arch | None = None

    @property
    def n_outputs(self) -> int:
        """Number of outputs of the head."""
        return self.objective.n_outputs

    @property
    def common(self) -> Arch:
        """The recipe for the model that all clients have in common. Default: this recipe."""
        return self.other or self

    def model(self) -> nn.Module:
        """Return a new model. The names of its tensors are "body....", "head.weight" and "head.bias"."""
        return Split(self.body(), self.head())

    def body(self, width: int | None = None) -> nn.Module:
        """Return a new body with `width` output features. By default, the width is that of the recipe, or else the architecture's own."""
        inputs = self.spec if self.name in BY_SPEC else self.spec.shape
        return self.base.prepared(self.build(inputs, width or self.width, **dict(self.options)))

    def head(self, features: int | None = None) -> nn.Linear:
        """Return a new linear head from `features` inputs (default: the features of `body()`) to the outputs."""
        return nn.Linear(features or self.features, self.n_outputs)

    @cached_property
    def features(self) -> int:
        """The number of features that `body()` outputs; 0 for a model without a head."""
        return self._form[-1]

    @property
    def has_head(self) -> bool:
        """Whether the model ends in a linear head."""
        return True

    @property
    def has_vector(self) -> bool:
        """Whether the body outputs one feature vector per example."""
        return self.has_head and len(self._form) == 2

    @cached_property
    def _form(self) -> tuple[int, ...]:
        """The shape of `body()`'s features for two examples. It is found once, by a dry run that restores torch's generator."""
        if not self.has_head:
            return (2, 0)
        with torch.random.fork_rng(devices=[]):
            return tuple(dry_run(self.body(), self.example).shape)


class OutsideArch(Arch):
    """A recipe for a user's module class, function or instance, which is split into body and head.

    A class or function is called only with those arguments that its signature names: `input_shape`, `n_classes` or `n_outputs`,
    `vocabulary` (of tokens), `levels` (of categories), `width` and the options. An instance is copied, and its weights are the initial
    weights of every model. If the requested width differs from the module's own width, the body gets a final linear layer that maps its
    output to the requested width, and the head is replaced. A module without a linear head stays whole, for methods that do not need a
    head.
    """

    def model(self) -> nn.Module:
        return Split(*self._parts(self.width)) if self.has_head else self.base.prepared(self._module(self.width))

    @cached_property
    def has_head(self) -> bool:
        with torch.random.fork_rng(devices=[]):
            return can_split(self._module(self.width), self.n_outputs)

    def body(self, width: int | None = None) -> nn.Module:
        return self._parts(width or self.width)[0]

    def head(self, features: int | None = None) -> nn.Linear:
        own = self._parts(self.width)[1]
        return own if features is None or features == own.in_features else nn.Linear(features, self.n_outputs)

    def check(self) -> None:
        """Raise ConfigError unless the module can be built, split and run on two examples."""
        with torch.random.fork_rng(devices=[]):
            refuse_old_norms(self.build, self.name)  # these modules cannot be copied
            module = self._module(self.width).to(torch.get_default_dtype())  # the dtype that clients use
            refuse_old_norms(module, self.name)
            refuse_tied({self.name: module})  # before the split makes separate copies
            refuse_own_state(module, self.example, self.name)
            checks = check_split if self.has_head else check_outputs
            checks(module, self.example, self.objective, self.name)

    def _parts(self, width: int | None) -> tuple[nn.Module, nn.Linear]:
        body, head = split(self._module(width), self.n_outputs, self.name)
        body = self.base.prepared(body)
        if width is None or width == head.in_features:
            return body, head
        project = nn.Linear(head.in_features, width)
        return InputChain(OrderedDict(backbone=body, project=project)), nn.Linear(width, self.n_outputs)

    def _module(self, width: int | None) -> nn.Module:
        if isinstance(self.build, nn.Module):
            return deepcopy(self.build)
        module: object = self.build(**self._arguments(inspect.signature(self.build), width))
        if not isinstance(module, nn.Module):
            raise ConfigError(f"model {self.name}: must return an nn.Module, not {type(module).__name__}")
        if any(isinstance(parameter, UninitializedParameter) for parameter in module.parameters()):
            dry_run(module, self.example)
        return module

    def _arguments(self, signature: inspect.Signature, width: int | None) -> dict[str, object]:
        tokens, categories, n = self.spec.of("token"), self.spec.of("category"), self.n_outputs
        offered = {"input_shape": self.spec.shape, "n_classes": n, "n_outputs": n, "width": width, **dict(self.options)}
        if tokens:
            offered["vocabulary"] = tokens.levels[0]
        if categories:
            offered["levels"] = categories.levels
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
    inputs: Sequence[int] | InputSpec,
    outputs: int | Objective,
    width: int | None = None,
    options: Mapping[str, Option] | None = None,
    *,
    example: Inputs | None = None,
) -> Arch:
    """Return the checked recipe for `source`: a name in `ZOO`, or a user's nn.Module class or instance, or function that returns a module.

    Args:
        source: see above.
        inputs: description of the inputs, or a shape such as (C, H, W) for images or (D,) for flat features.
        outputs: the learning task, or the number of classes.
        width: common feature width; default: the architecture's own width.
        options: the model's own options, and those that every model has: `weights`, `lora`, `lora_alpha`, `lora_freeze_a`.
        example: two real inputs for dry runs; default: dummy inputs.

    Raises:
        ConfigError: a name or option is unknown, a size is impossible, or a module does not fit the inputs and the task.
    """
    every, options = _options(source, options or {})
    sizes = {} if isinstance(outputs, Objective) else {"n_classes": outputs}
    shapes = () if isinstance(inputs, InputSpec) else tuple(inputs)
    for key, value in [*sizes.items(), *({} if width is None else {"width": width}).items()]:
        _check_count(key, value)
    for side in shapes:
        _check_count("input_shape", side)
    spec = inputs if isinstance(inputs, InputSpec) else InputSpec.plain(shapes)
    objective = outputs if isinstance(outputs, Objective) else Classification.numbered(outputs)
    facts = ArchFacts(
        spec=spec,
        objective=objective,
        width=width,
        options=tuple(sorted(options.items())),
        base=lora.Base.of(every),
        example=made_up(spec) if example is None else example,
    )
    if not isinstance(source, str):
        return _outside(source, facts)
    if source not in ZOO:
        if source.endswith(".py"):
            name = next(iter(classes_in(Path(source))), "Net")
            raise ConfigError(f"model={source}: must name a class of the file, as model={source}:{name}")
        raise ConfigError(f"model={source}: there is no such model{suggest(source, ZOO)}; or your own as my.py:Net")
    builder = ZOO[source]
    check_fits(source, spec, objective)
    _check_options(source, options)
    made = Arch(name=source, build=builder, **facts)
    _ = made.features  # reports impossible combinations of options now, not during a run
    made.base.check(made.body, source)
    return made


class ArchFacts(TypedDict):
    """The fields that `Arch` and `OutsideArch` have in common; they are described there."""

    spec: InputSpec
    objective: Objective
    width: int | None
    options: tuple[tuple[str, Option], ...]
    base: lora.Base
    example: Inputs


def _options(source: object, options: Mapping[str, Option]) -> tuple[dict[str, Option], dict[str, Option]]:
    """Split the options into those that every model has and those of this model. A user's function receives all options that it names."""
    own = inspect.signature(source).parameters if callable(source) and not isinstance(source, nn.Module) else ()
    every = {key: value for key, value in options.items() if key in lora.OPTIONS and key not in own}
    return every, {key: value for key, value in options.items() if key not in every}


def option_defaults(name: str) -> dict[str, Option]:
    """Return the options of a model in the zoo with their default values."""
    parameters = inspect.signature(ZOO[name]).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


def _outside(source: Builder, facts: ArchFacts) -> OutsideArch:
    name = type(source).__name__ if isinstance(source, nn.Module) else getattr(source, "__name__", repr(source))
    if not callable(source):
        raise ConfigError(f"model={source!r}: give a name, an nn.Module, or a function that returns one")
    known = () if isinstance(source, nn.Module) else inspect.signature(source).parameters
    for key, _ in facts["options"]:
        if key not in known:
            close = suggest(key, lora.OPTIONS)
            raise ConfigError(f"model {name} has no option '{key}': its signature does not name it{close}")
    made = OutsideArch(name=name, build=source, **facts)
    made.check()
    made.base.check(made.body if made.has_head else made.model, name)
    return made


def _check_count(key: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{key}={value!r}: must be an integer of at least 1")


def _check_options(name: str, options: Mapping[str, Option]) -> None:
    defaults = option_defaults(name)
    for key, value in options.items():
        if key not in defaults:
            raise ConfigError(f"model {name} has no option '{key}'{suggest(key, [*defaults, *lora.OPTIONS])}")
        default = defaults[key]
        if type(value) is not type(default) and not (type(default) is float and type(value) is int):
            raise ConfigError(
                f"model option {key}={value!r}: must be of type {type(default).__name__}, such as {key}={default!r}"
            )
        if type(default) is int:
            _check_count(f"model option {key}", value)
