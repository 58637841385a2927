"""Split a user's module into a body, which outputs features, and a linear head, which outputs logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from fedloom.errors import ConfigError


def split(module: nn.Module, n_classes: int, name: str) -> tuple[nn.Module, nn.Linear]:
    """Split `module`, in place, into body and head.

    They are its own `.body` and `.head` if it has both. Otherwise the last nn.Linear with `n_classes` outputs is the head, and an
    Identity replaces it in the body.

    Raises:
        ConfigError: there is no such head.
    """
    body, head = getattr(module, "body", None), getattr(module, "head", None)
    if isinstance(body, nn.Module) and isinstance(head, nn.Module):
        if isinstance(head, nn.Linear) and head.out_features == n_classes:
            return body, head
        raise ConfigError(f"model {name}: its .head must be an nn.Linear with {n_classes} outputs, not {head}")
    path, last = _last_linear(module, n_classes, name)
    if not path:
        return nn.Identity(), last
    parent, _, child = path.rpartition(".")
    setattr(module.get_submodule(parent), child, nn.Identity())
    return module, last


def _last_linear(module: nn.Module, n_classes: int, name: str) -> tuple[str, nn.Linear]:
    for path, part in reversed(list(module.named_modules())):
        if isinstance(part, nn.Linear) and part.out_features == n_classes:
            return path, part
    raise ConfigError(
        f"model {name}: it has no nn.Linear with {n_classes} outputs as its head; name its .body and .head"
    )


def check_split(module: nn.Module, input_shape: Sequence[int], n_classes: int, name: str) -> None:
    """Raise ConfigError unless the head applied to the body's features gives the outputs of `module` (in evaluation mode)."""
    body, head = split(deepcopy(module), n_classes, name)
    try:
        logits, features = dry_run(module, input_shape), dry_run(body, input_shape)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"model {name} fails on inputs of shape (2, *{tuple(input_shape)}): {reason}") from error
    for what, given in ((name, logits), (f"{name}'s body", features)):
        if not isinstance(given, Tensor):
            raise ConfigError(f"model {what} returns a {type(given).__name__}; return one tensor, the logits alone")
    if logits.shape != (2, n_classes):
        raise ConfigError(
            f"model {name} returns shape {tuple(logits.shape)} for 2 examples; return logits (2, {n_classes})"
        )
    if features.shape != (2, head.in_features) or not torch.allclose(head(features), logits, rtol=1e-3, atol=1e-5):
        softmax = torch.allclose(logits.exp().sum(1), torch.ones(2).to(logits), atol=1e-3)
        remedy = "return logits, without (log_)softmax at the end" if softmax else "name its .body and .head"
        raise ConfigError(f"model {name}: its output is not {head} applied to features; {remedy}")


@torch.no_grad()
def dry_run(module: nn.Module, input_shape: Sequence[int]) -> Tensor:
    """Run `module` on two dummy inputs in evaluation mode and return its outputs."""
    was_training = module.training
    outputs: Tensor = module.eval()(made_up(module, input_shape))
    module.train(was_training)
    return outputs


def made_up(module: nn.Module, input_shape: Sequence[int]) -> Tensor:
    """Return two dummy inputs (2, *input_shape), on the module's device and in its dtype."""
    weight = next(module.parameters(), torch.empty(0))
    n = 2 * math.prod(input_shape)
    return torch.linspace(-1, 1, n, dtype=weight.dtype, device=weight.device).reshape(2, *input_shape)
