"""Transforms of tensors before they are sent: half precision, int8, sending only the largest differences, and noise.

A transform encodes the floating-point tensors of the default precision in one part of an uplink or a downlink (by default `weights`).
Counters and other integers are sent unchanged. Sizes are measured after the transform. The receiver uses the decoded values. Methods and
engines do not depend on transforms (see `fedloom.wire.codec`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from fedloom.errors import ConfigError, WireError, suggest

if TYPE_CHECKING:  # torch is imported in functions, because settings and listings need only the names of transforms
    import torch
    from torch import Tensor

    from fedloom.rng import Stream

Flat = dict[str, "Tensor"]  # tensors of a part by path, with a leading /; a single tensor has the path ""
WEIGHTS, COUNTS, TOPK = "weights", "counts", "topk"


class Transform(Protocol):
    """A transform that encodes and decodes the tensors of a part."""

    @property
    def place(self) -> int:
        """The rank of the transform. The transforms in a chain must be in ascending order of their ranks."""

    def encode(self, values: Flat, rng: Stream) -> Flat:
        """Return the floating-point tensors `values` in encoded form. `rng` is the sender's stream."""

    def decode(self, sent: Flat, like: Flat) -> Flat:
        """Return the decoded tensors. `sent` may include tensors that were not encoded; `like` has the shapes of those that were."""


@dataclass(frozen=True)
class Gaussian:
    """Clip the difference to norm CLIP, and add normal noise with standard deviation NOISE x CLIP to each number: `gaussian:1.0:0.01`."""

    clip: float
    noise: float
    place = 0

    def encode(self, values: Flat, rng: Stream) -> Flat:
        """Return min(1, clip / ||v||) v + noise clip N(0, 1), where v is the vector of all `values`."""
        import torch

        norm = torch.stack([leaf.square().sum() for leaf in values.values()]).sum().sqrt()
        factor = (self.clip / norm).clamp(max=1.0)
        deviation = self.noise * self.clip
        return {path: leaf * factor + deviation * rng.normal(leaf.shape).to(leaf) for path, leaf in values.items()}

    def decode(self, sent: Flat, like: Flat) -> Flat:
        """Return `sent`, because noise is not removed."""
        return sent


@dataclass(frozen=True)
class TopK:
    """Send only the largest FRACTION of the differences, with their indices. The client keeps the others for later: `topk:0.1`."""

    fraction: float
    place = 1

    def n_sent(self, n: int) -> int:
        """Return how many of n numbers are sent, which is at least one."""
        return max(1, round(self.fraction * n))

    def encode(self, values: Flat, rng: Stream) -> Flat:
        """Return the `n_sent(n)` numbers with the largest magnitudes among all n `values`, and their indices in ascending order."""
        import torch

        vector = torch.cat([leaf.flatten() for leaf in values.values()])
        kept = vector.abs().topk(self.n_sent(len(vector))).indices.sort().values
        return {f"/{TOPK}/values": vector[kept], f"/{TOPK}/indices": kept.int()}

    def decode(self, sent: Flat, like: Flat) -> Flat:
        """Return the numbers that were sent, and zeros for all others."""
        import torch

        if not like:
            return sent
        if not {f"/{TOPK}/values", f"/{TOPK}/indices"} <= sent.keys():
            raise WireError("topk: the message lacks values or indices")
        values, places = sent[f"/{TOPK}/values"], sent[f"/{TOPK}/indices"].long()
        rest = {path: leaf for path, leaf in sent.items() if not path.startswith(f"/{TOPK}/")}
        sizes = [leaf.numel() for leaf in like.values()]
        n, k = sum(sizes), self.n_sent(sum(sizes))
        if not values.shape == places.shape == (k,) or not 0 <= int(places.min()) <= int(places.max()) < n:
            raise WireError(f"topk: the message must have {k} values, with indices from 0 to {n - 1}")
        pieces = torch.split(values.new_zeros(n).index_put((places,), values), sizes)
        return rest | {path: piece.view(leaf.shape) for (path, leaf), piece in zip(like.items(), pieces, strict=True)}


@dataclass(frozen=True)
class Half:
    """Send 16-bit numbers. fp16 has 11 significant bits and a maximum of 65504; bf16 has 8 significant bits and the range of fp32."""

    dtype: torch.dtype
    place = 2

    def encode(self, values: Flat, rng: Stream) -> Flat:
        """Return the nearest 16-bit numbers.

        Raises:
            ConfigError: a finite number is too large for fp16.
        """
        import torch

        sent = {path: leaf.to(self.dtype) if leaf.is_floating_point() else leaf for path, leaf in values.items()}
        for path, leaf in sent.items():
            if leaf.dtype is torch.float16 and bool((leaf.isinf() & values[path].isfinite()).any()):
                raise ConfigError(
                    f"fp16: '{path[1:]}' has a number above 65504, the maximum of half precision; use bf16"
                )
        return sent

    def decode(self, sent: Flat, like: Flat) -> Flat:
        """Return the numbers in the default precision."""
        import torch

        wide = torch.get_default_dtype()
        return {path: leaf.to(wide) if leaf.dtype is self.dtype else leaf for path, leaf in sent.items()}


@dataclass(frozen=True)
class Int8:
    """Send each number as scale q, where q is an integer from -127 to 127 and scale = max|x| / 127 of the tensor.

    The error is at most scale/2.
    """

    place = 2

    def encode(self, values: Flat, rng: Stream) -> Flat:
        """Return q (int8) and scale (fp32) for each floating-point tensor."""
        import torch

        sent: Flat = {}
        for path, leaf in values.items():
            if not leaf.is_floating_point():
                sent[path] = leaf
                continue
            scale = (leaf.abs().amax() / 127).float() if leaf.numel() else leaf.new_zeros((), dtype=torch.float32)
            steps = leaf / scale.to(leaf).clamp(min=torch.finfo(torch.float32).tiny)
            sent |= {f"{path}/int8": steps.round().clamp(-127, 127).to(torch.int8), f"{path}/scale": scale}
        return sent

    def decode(self, sent: Flat, like: Flat) -> Flat:
        """Return scale q, in the default precision."""
        import torch

        wide, values = torch.get_default_dtype(), dict[str, "Tensor"]()
        for path, leaf in sent.items():
            owner, _, last = path.rpartition("/")
            if last == "int8" and leaf.dtype is torch.int8 and f"{owner}/scale" in sent:
                values[owner] = leaf.to(wide) * sent[f"{owner}/scale"].to(wide)
            elif not (last == "scale" and f"{owner}/int8" in sent):
                values[path] = leaf
        return values


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A transform that can be named in the settings."""

    make: Callable[..., Transform]
    summary: str
    example: str
    numbers: tuple[str, ...] = ()  # parameters after the name, separated by colons
    ways: tuple[str, ...] = ("uplink", "downlink")


def _half(name: str) -> Half:
    import torch

    return Half(getattr(torch, name))


TRANSFORMS: Mapping[str, Kind] = {
    "fp16": Kind(
        make=lambda: _half("float16"), summary="half precision: 11 significant bits, up to 65504", example="fp16"
    ),
    "bf16": Kind(
        make=lambda: _half("bfloat16"), summary="bfloat16: 8 significant bits, the range of fp32", example="bf16"
    ),
    "int8": Kind(make=Int8, summary="8-bit integers and one scale per tensor, rounded to the nearest", example="int8"),
    "topk": Kind(
        make=TopK,
        summary="only the largest FRACTION of the differences; the others are added to the next uplink",
        example="topk:0.1",
        numbers=("FRACTION",),
        ways=("uplink",),
    ),
    "gaussian": Kind(
        make=Gaussian,
        summary="differences clipped to norm CLIP, plus normal noise of standard deviation NOISE x CLIP, which follows from the seed",
        example="gaussian:1.0:0.01",
        numbers=("CLIP", "NOISE"),
        ways=("uplink",),
    ),
}


class Chain(NamedTuple):
    """The transforms of one part, in order."""

    steps: tuple[Transform, ...]

    @property
    def on_differences(self) -> bool:
        """Whether the chain can be applied only to differences."""
        return any(isinstance(step, TopK | Gaussian) for step in self.steps)

    @property
    def remembers(self) -> bool:
        """Whether the sender keeps unsent values."""
        return any(isinstance(step, TopK) for step in self.steps)

    def encode(self, values: Flat, unsent: Flat, rng: Stream) -> tuple[Flat, Flat]:
        """Return the encoded `values`, and the values that are still unsent (none, unless the chain keeps them)."""
        sent, due = values, values
        for step in self.steps:
            if isinstance(step, TopK):
                sent = due = {path: leaf + unsent[path] for path, leaf in sent.items()}
            sent = step.encode(sent, rng)
        if not self.remembers:
            return sent, {}
        arrived = self.decode(sent, due)
        return sent, {path: leaf - arrived[path] for path, leaf in due.items()}

    def decode(self, sent: Flat, like: Flat) -> Flat:
        """Return the decoded tensors of `sent`."""
        for step in reversed(self.steps):
            sent = step.decode(sent, like)
        return sent


Chains = Mapping[str, Chain]  # by part


def parse(words: Sequence[str], way: str) -> Chains:
    """Return the transforms of `uplink` or `downlink` messages, written `[PART/]NAME[:NUMBER...]`, such as `topk:0.1` or `control/fp16`.

    Raises:
        ValueError: a word is not a transform; the message states the allowed values.
    """
    chains: dict[str, tuple[Transform, ...]] = {}
    for word in words:
        part, _, named = word.rpartition("/")
        part, step = part or WEIGHTS, _step(named, way)
        before = chains.get(part, ())
        if part == COUNTS:
            raise ValueError(f"'{word}': counts cannot be transformed, because they must stay exact")
        if part != WEIGHTS and not isinstance(step, Half | Int8):
            raise ValueError(f"'{word}': {named.partition(':')[0]} works only on differences of weights")
        if before and before[-1].place >= step.place:
            raise ValueError("the order must be gaussian, topk, then one of fp16, bf16, int8; each at most once")
        chains[part] = (*before, step)
    return {part: Chain(steps) for part, steps in chains.items()}


def _step(word: str, way: str) -> Transform:
    name, *texts = word.split(":")
    if name not in TRANSFORMS:
        raise ValueError(f"unknown transform '{name}'{suggest(name, TRANSFORMS)}")
    kind = TRANSFORMS[name]
    if way not in kind.ways:
        raise ValueError(f"{name} works only on differences in uplinks; use uplink={word}")
    form = ":".join([name, *kind.numbers])
    try:
        numbers = [float(text) for text in texts]
    except ValueError:
        numbers = []
    if len(numbers) != len(kind.numbers) or not all(map(math.isfinite, numbers)):
        raise ValueError(f"'{word}' is not of the form {form}" + (f", such as {kind.example}" if kind.numbers else ""))
    if name == "topk" and not 0 < numbers[0] <= 1:
        raise ValueError(f"the FRACTION of {form} must be above 0 and at most 1")
    if name == "gaussian" and not (numbers[0] > 0 and numbers[1] >= 0):
        raise ValueError(f"in {form}, CLIP must be above 0 and NOISE at least 0")
    return kind.make(*numbers)


def is_coded(path: str, values: Collection[str]) -> bool:
    """Return whether a tensor of an encoded part represents one or all of the tensors named in `values`."""
    return path.startswith(f"{TOPK}/") or path.rpartition("/")[0] in values
