"""Split a user's module into a body, which outputs features, and a linear head, which outputs predictions."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from fedloom.errors import ConfigError
from fedloom.inputs import Inputs, InputSpec, call_arguments, map_inputs, shapes_of, unwrapped
from fedloom.objectives import Objective


def split(module: nn.Module, n_outputs: int, name: str) -> tuple[nn.Module, nn.Linear]:
    """Split `module`, in place, into body and head.

    They are the module's `.body` and `.head` if it has both. Otherwise, the last nn.Linear with `n_outputs` outputs is the head, and an
    Identity replaces it in the body.

    Raises:
        ConfigError: there is no such head.
    """
    body, head = getattr(module, "body", None), getattr(module, "head", None)
    if isinstance(body, nn.Module) and isinstance(head, nn.Module):
        if isinstance(head, nn.Linear) and head.out_features == n_outputs:
            return body, head
        raise ConfigError(f"model {name}: its .head must be an nn.Linear with {n_outputs} outputs, not {head}")
    path = last_linear(module, n_outputs)
    if path is None:
        raise ConfigError(
            f"model {name}: it has no nn.Linear with {n_outputs} outputs as its head; name its .body and .head"
        )
    last = module.get_submodule(path)
    assert isinstance(last, nn.Linear)
    if not path:
        return nn.Identity(), last
    parent, _, child = path.rpartition(".")
    setattr(module.get_submodule(parent), child, nn.Identity())
    return module, last


def last_linear(module: nn.Module, n_outputs: int) -> str | None:
    """Return the path of the last nn.Linear with `n_outputs` outputs ("" for the module itself), or None."""
    found = (p for p, part in module.named_modules() if isinstance(part, nn.Linear) and part.out_features == n_outputs)
    return max(enumerate(found), default=(0, None))[1]


def can_split(module: nn.Module, n_outputs: int) -> bool:
    """Return whether `split` finds a head."""
    named = all(isinstance(getattr(module, part, None), nn.Module) for part in ("body", "head"))
    return named or last_linear(module, n_outputs) is not None


def check_outputs(module: nn.Module, example: Inputs, objective: Objective, name: str) -> Tensor:
    """Return the module's outputs for two examples. Raise ConfigError unless they have the shape that the learning task requires."""
    try:
        outputs = dry_run(module, example)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"model {name} fails on inputs of shape {shapes_of(example)}: {reason}") from error
    if not isinstance(outputs, Tensor):
        raise ConfigError(f"model {name} returns a {type(outputs).__name__}; return only the logits, as one tensor")
    n = objective.n_outputs
    if outputs.ndim != objective.output_ndim or outputs.shape[0] != 2 or outputs.shape[-1] != n:
        wanted = f"(2, {n})" if objective.output_ndim == 2 else f"(2, T, {n})"
        hint = _one_logit(outputs, objective)
        raise ConfigError(
            f"model {name} returns shape {tuple(outputs.shape)} for 2 examples; return logits {wanted}{hint}"
        )
    return outputs


def _one_logit(outputs: Tensor, objective: Objective) -> str:
    """Return a hint if the model returns a single logit for two classes, or ""."""
    single = objective.task == "classification" and objective.n_outputs == 2 and outputs.shape[-1] == 1
    return ", or create the data set with task='multilabel' and one label" if single else ""


def check_split(module: nn.Module, example: Inputs, objective: Objective, name: str) -> None:
    """Raise ConfigError unless the head, applied to the body's features, gives the outputs of `module` (in evaluation mode)."""
    logits = check_outputs(module, example, objective, name)
    body, head = split(deepcopy(module), objective.n_outputs, name)
    features = dry_run(body, example)
    if not isinstance(features, Tensor):
        raise ConfigError(
            f"model {name}'s body returns a {type(features).__name__}; return only the features, as one tensor"
        )
    fits = features.ndim >= 2 and features.shape[0] == 2 and features.shape[-1] == head.in_features
    if not fits or not torch.allclose(head(features), logits, rtol=1e-3, atol=1e-5):
        softmax = torch.allclose(logits.exp().sum(-1), torch.ones(logits.shape[:-1]).to(logits), atol=1e-3)
        remedy = "return logits, without (log_)softmax at the end" if softmax else "name its .body and .head"
        raise ConfigError(f"model {name}: its output is not {head} applied to features; {remedy}")


@torch.no_grad()
def dry_run(module: nn.Module, example: Inputs, training: bool = False) -> Any:
    """Run `module` on examples and return its outputs, in evaluation mode unless `training` is true."""
    was_training = module.training
    args, named = call_arguments(module.train(training), like(example, module))
    outputs = unwrapped(module(*args, **named))
    module.train(was_training)
    return outputs


def like(example: Inputs, module: nn.Module) -> Inputs:
    """Return the inputs on the module's device. Floating-point inputs get the module's precision."""
    weight = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))

    def moved(value: Tensor) -> Tensor:
        return value.to(weight.device, weight.dtype if value.is_floating_point() else value.dtype)

    return map_inputs(moved, example)


def made_up(spec: InputSpec) -> Inputs:
    """Return two dummy inputs, for modules that are checked without data."""
    found: dict[str, Tensor] = {}
    for field in spec.fields:
        shape = (2, *field.shape)
        if field.is_integer:
            found[field.name] = torch.arange(math.prod(shape)).reshape(shape) % min(field.levels)
        else:
            found[field.name] = torch.linspace(-1, 1, math.prod(shape)).reshape(shape)
    return found[""] if spec.is_single else found
