"""Checks whether models in the zoo fit the inputs and the learning task."""

from __future__ import annotations

from fedloom.errors import ConfigError
from fedloom.inputs import InputSpec
from fedloom.models.zoo import BY_SPEC, KINDS, SEQUENCES, ZOO
from fedloom.objectives import Objective

SMALLEST_SIDE = 8
MOST_NAMES = 6  # maximum number of names in a message


def check_fits(name: str, spec: InputSpec, objective: Objective) -> None:
    """Raise ConfigError if a model in the zoo does not fit these inputs, or this learning task."""
    numeric = spec.is_single and not spec.fields[0].is_integer
    if KINDS[name] == {"picture"} and numeric:
        if len(spec.shape) != 3 or min(spec.shape[1:]) < SMALLEST_SIDE:
            raise ConfigError(
                f"model={name}: needs images (C, H, W) of at least 8x8 pixels, but the inputs have shape {spec.shape}; use mlp or logistic"
            )
    elif not spec.kinds <= KINDS[name] or not (spec.is_single or name in BY_SPEC):
        kinds = " or ".join(f"{kind} inputs" for kind in sorted(KINDS[name]))
        hint = _kind_hint(name, spec)
        raise ConfigError(
            f"model={name}: needs {kinds}, but the inputs are {spec}{hint}; use {_fitting(spec, objective)}"
        )
    if (objective.task == "language") != (name in SEQUENCES):
        has, needs = ("position", "example") if name in SEQUENCES else ("example", "position")
        raise ConfigError(
            f"model={name}: has one feature vector per {has}, but the task {objective.task} needs one per {needs}; "
            f"use {_fitting(spec, objective)}"
        )


def _kind_hint(name: str, spec: InputSpec) -> str:
    """Return how to make `from_arrays` treat integers differently from tokens, if the model accepts that; otherwise ""."""
    tokens = spec.of("token")
    kind = next((kind for kind in ("category", "number") if kind in KINDS[name]), "")
    if tokens is None or not kind:
        return ""
    setting = f"{{'{tokens.name}': '{kind}'}}" if tokens.name else f"'{kind}'"
    return f" (integers are tokens unless from_arrays is called with kind={setting})"


def _fitting(spec: InputSpec, objective: Objective) -> str:
    """Return the names of the models that fit such inputs and this task, for messages."""
    found = [name for name in ZOO if spec.kinds <= KINDS[name] and (spec.is_single or name in BY_SPEC)]
    found = [name for name in found if (name in SEQUENCES) == (objective.task == "language")]
    own = "a model of your own"
    if not spec.is_single:
        own += f" whose forward takes {', '.join(field.name for field in spec.fields)}"
    return ", ".join([*found[:MOST_NAMES], f"or {own}"]) if found else own
