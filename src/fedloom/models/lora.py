"""Low-rank adapters (LoRA; Hu et al., ICLR 2022) for the linear layers of a body, and pretrained weights for the body.

Adapters are torch parametrisations (`torch.nn.utils.parametrize`). The class of an adapted layer is a subclass of its original class, so
code that reads `layer.weight` still works, such as torch's fast path for transformer encoders. Parametrised modules cannot be pickled.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fedloom.errors import ConfigError

PREFIXES = ("", "body.", "model.", "model.body.", "nets.model.body.")
"""Possible prefixes of the names of a body's tensors in a file of a body, of a whole model, or of `fedloom export`."""
SHOWN = 3
OPTIONS = ("weights", "lora", "lora_alpha", "lora_freeze_a")
"""Options of every model (see `Base`)."""

M = TypeVar("M", bound=nn.Module)


class LowRank(nn.Module):
    """Maps a weight (out, in) to `weight + alpha / rank * b @ a`. `a` (rank, in) is random, and `b` (out, rank) is initially zero."""

    def __init__(self, weight: Tensor, rank: int, alpha: float, *, freeze_a: bool = False) -> None:
        super().__init__()
        n_out, n_in = weight.shape
        self.scale = alpha / rank
        self.a = nn.Parameter(weight.new_empty(rank, n_in), requires_grad=not freeze_a)
        self.b = nn.Parameter(weight.new_zeros(n_out, rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the adapted weight."""
        return weight + self.scale * (self.b @ self.a)


@dataclass(frozen=True, kw_only=True)
class Base:
    """The preparation of every new body, which loads pretrained weights, freezes the body and adds adapters.

    Attributes:
        weights: a safetensors file with the body's weights. If None, the body keeps the weights with which it is built.
        lora: rank of the adapters. If 0, no adapters are added, and the body is trained as usual.
        alpha: adapters are multiplied by alpha / rank. If None, alpha is twice the rank.
        freeze_a: whether `a` keeps its initial value, which is the same for all clients (FFA-LoRA; Sun et al., ICLR 2024).
    """

    weights: str | None = None
    lora: int = 0
    alpha: float | None = None
    freeze_a: bool = False

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Base:
        """Return the base that a model's options describe (see `OPTIONS`). Raise ConfigError for an invalid value."""
        lora, file, alpha = (options.get(key) for key in ("lora", "weights", "lora_alpha"))
        frozen = options.get("lora_freeze_a", False)
        if lora is not None and (type(lora) is not int or lora < 1):
            raise ConfigError(f"model.lora={lora!r}: must be an integer of at least 1, the rank of the adapters")
        if file is not None and not (isinstance(file, str | Path) and str(file)):
            raise ConfigError(f"model.weights={file!r}: must be the name of a safetensors file")
        if alpha is not None and (type(alpha) not in (int, float) or not 0 < alpha < math.inf):
            raise ConfigError(f"model.lora_alpha={alpha!r}: must be a number above 0")
        if type(frozen) is not bool:
            raise ConfigError(f"model.lora_freeze_a={frozen!r}: must be true or false")
        idle = [key for key in ("lora_alpha", "lora_freeze_a") if key in options]
        if idle and lora is None:
            raise ConfigError(
                f"model.{idle[0]}={options[idle[0]]}: has no effect without adapters; set model.lora=RANK"
            )
        return cls(weights=None if file is None else str(file), lora=lora or 0, alpha=alpha, freeze_a=frozen)

    def prepared(self, body: M) -> M:
        """Return the body with the pretrained weights and the adapters. The body is changed in place."""
        if self.weights is not None:
            load_base(body, self.weights)
        if not self.lora:
            return body
        alpha = 2 * self.lora if self.alpha is None else self.alpha
        return with_adapters(body, self.lora, alpha, freeze_a=self.freeze_a)

    def check(self, build: Callable[[], nn.Module], name: str) -> None:
        """Raise ConfigError if the bodies of `build` do not fit, or if adapters would be added to a random body."""
        if self == NO_BASE:
            return
        bases = []
        with torch.random.fork_rng(devices=[]):
            for seed in (0, 1):
                torch.manual_seed(seed)
                bases.append(_base(build()))
        if not self.lora:
            return
        random = [key for key, tensor in bases[0].items() if not torch.equal(tensor, bases[1][key])]
        if random:
            raise ConfigError(
                f"model.lora={self.lora}: '{random[0]}' of {name} is random and would stay random, because only adapters"
                " are trained; set model.weights=FILE.safetensors, or use a model with pretrained weights"
            )


NO_BASE = Base()
"""No preparation: bodies stay as they are built."""


def with_adapters(body: M, rank: int, alpha: float, *, freeze_a: bool = False) -> M:
    """Freeze the body and add an adapter to each nn.Linear in it, in place. The adapters do not change its initial outputs.

    Raises:
        ConfigError: the body has no nn.Linear.
    """
    layers = [part for part in body.modules() if isinstance(part, nn.Linear)]
    if not layers:
        raise ConfigError(
            f"model.lora={rank}: the model's body has no nn.Linear to adapt; choose another model, or add adapters yourself"
        )
    body.requires_grad_(False)
    for layer in layers:
        adapter = LowRank(layer.weight, rank, alpha, freeze_a=freeze_a)
        parametrize.register_parametrization(layer, "weight", adapter)
    return body


def merge_adapters(module: M) -> M:
    """Return a copy in which adapters are merged into the weights, so that its tensors have the same names as without adapters.

    `remove_parametrizations` is not used, because it changes the class of a layer, which copies share with the original.
    """
    copied = copy.deepcopy(module)
    for layer in list(copied.modules()):
        if not parametrize.is_parametrized(layer):
            continue
        lists = cast(Mapping[str, nn.Module], layer.parametrizations)
        if not any(isinstance(part, LowRank) for each in lists.values() for part in each.children()):
            continue
        weights = {name: getattr(layer, name).detach() for name in lists}
        layer.__class__ = parametrize.type_before_parametrizations(layer)
        del layer.parametrizations
        for name, weight in weights.items():
            layer.register_parameter(name, nn.Parameter(weight, requires_grad=False))
    return copied


def load_base(body: nn.Module, file: str | Path) -> None:
    """Copy the weights and buffers in a safetensors file into the body. Other tensors in the file, such as the head's, are ignored.

    Raises:
        ConfigError: the file cannot be read, lacks a tensor of the body, or contains one with another shape.
    """
    stored = _read(file)
    wanted = {name: tensor for name, tensor in body.state_dict().items() if isinstance(tensor, Tensor)}
    prefix = max(PREFIXES, key=lambda each: sum(each + name in stored for name in wanted))
    missing = [name for name in wanted if prefix + name not in stored]
    if missing:
        kept = sorted(stored)
        raise ConfigError(
            f"model.weights={file}: {_some(missing)} of the model's body not found; the file contains {_some(kept)}"
        )
    for name, tensor in wanted.items():
        if stored[prefix + name].shape != tensor.shape:
            found = tuple(stored[prefix + name].shape)
            raise ConfigError(
                f"model.weights={file}: '{name}' has shape {found}, but the model needs {tuple(tensor.shape)}"
            )
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(stored[prefix + name])


def _read(file: str | Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(file)
    except FileNotFoundError:
        raise ConfigError(f"model.weights={file}: there is no such file") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise ConfigError(f"model.weights={file}: cannot be read as a safetensors file: {error}") from None


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"


def _base(body: nn.Module) -> dict[str, Tensor]:
    """Return a body's frozen parameters, except those of adapters, under the names that they have without adapters."""
    adapters = {id(p) for part in body.modules() if isinstance(part, LowRank) for p in part.parameters()}
    return {
        name.replace(".parametrizations.weight.original", ".weight"): p
        for name, p in body.named_parameters()
        if not p.requires_grad and id(p) not in adapters
    }
