"""What becomes of tensors between method and wire: half precision, int8, the largest differences only, noise.

A transform works on one named part of an uplink or a downlink, `weights` unless another is named, and there on the floating-point
tensors of the default precision; counters and whole numbers travel as they are. What it makes is what travels and what is counted, and
what the other end makes of that is what the other end works with; neither the method nor the engine knows of it (`fedloom.wire.codec`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from fedloom.errors import ConfigError, WireError, suggest

if TYPE_CHECKING:  # functions import torch themselves: settings and listings need the names of transforms alone
    import torch
    from torch import Tensor

    from fedloom.rng import Stream

Flat = dict[
    str, "Tensor"
]  # the tensors of a part by path, with a / in front; a part that is one tensor has the path ""
WEIGHTS, COUNTS, TOPK = "weights", "counts", "topk"


class Transform(Protocol):
    """One step from the tensors of a part to what travels, and back."""

    @property
    def place(self) -> int:
        """Its place in a chain: every step comes before those of a higher place."""

    def encode(self, values: Flat, rng: Stream) -> Flat:
        """What travels in place of the floating tensors `values`; `rng` is the sender's."""

    def decode(self, sent: Flat, like: Flat) -> Flat:
        """What the receiver makes of `sent`, which may also hold tensors that were not encoded; `like`: the forms of those that were."""


@dataclass(frozen=True)
class Gaussian:
    """Clip the difference to the length CLIP and add normal noise of deviation NOISE x CLIP to each of its numbers: `gaussian:1.0:0.01`."""

    clip: float
    noise: float
    place = 0

    def encode(self, values: Flat, rng: Stream) -> Flat:
        """`values` is taken as one vector: min(1, clip / ||v||) v + noise clip N(0, 1)."""
        import torch

        norm = torch.stack([leaf.square().sum() for leaf in values.values()]).sum().sqrt()
        factor = (self.clip / norm).clamp(max=1.0)
        deviation = self.noise * self.clip
        return {path: leaf * factor + deviation * rng.normal(leaf.shape).to(leaf) for path, leaf in values.items()}

    def decode(self, sent: Flat, like: Flat) -> Flat:
        """Noise is there to stay."""
        return sent


@dataclass(frozen=True)
class TopK:
    """Send the part FRACTION of the differences that are largest, with their places; the others wait at the client: `topk:0.1`."""

    fraction: float
    place = 1

    def n_sent(self, n: int) -> int:
        """How many of n numbers are sent: at least one."""
        return max(1, round(self.fraction * n))

    def encode(self, values: Flat, rng: Stream) -> Flat:
        """`values` is taken as one vector of n numbers; its `n_sent(n)` largest in magnitude, and their places, ascending."""
        import torch

        vector = torch.cat([leaf.flatten() for leaf in values.values()])
        kept = vector.abs().topk(self.n_sent(len(vector))).indices.sort().values
        return {f"/{TOPK}/values": vector[kept], f"/{TOPK}/indices": kept.int()}

    def decode(self, sent: Flat, like: Flat) -> Flat:
        """Zeros where nothing was sent."""
        import torch

        if not like:
            return sent
        if not {f"/{TOPK}/values", f"/{TOPK}/indices"} <= sent.keys():
            raise WireError("topk: the message lacks its numbers or their places")
        values, places = sent[f"/{TOPK}/values"], sent[f"/{TOPK}/indices"].long()
        rest = {path: leaf for path, leaf in sent.items() if not path.startswith(f"/{TOPK}/")}
        sizes = [leaf.numel() for leaf in like.values()]
        n, k = sum(sizes), self.n_sent(sum(sizes))
        if not values.shape == places.shape == (k,) or not 0 <= int(places.min()) <= int(places.max()) < n:
            raise WireError(f"topk: needs {k} numbers and their places from 0 to {n - 1}")
        pieces = torch.split(values.new_zeros(n).index_put((places,), values), sizes)
        return rest | {path: piece.view(leaf.shape) for (path, leaf), piece in zip(like.items(), pieces, strict=True)}


@dataclass(frozen=True)
class Half:
    """Numbers of 16 bits: fp16 has 11 significant bits and ends at 65504, bf16 has 8 and the range of fp32."""

    dtype: torch.dtype
    place = 2

    def encode(self, values: Flat, rng: Stream) -> Flat:
        """Rounded to the nearest.

        Raises:
            ConfigError: a finite number is too large for fp16.
        """
        import torch

        sent = {path: leaf.to(self.dtype) if leaf.is_floating_point() else leaf for path, leaf in values.items()}
        for path, leaf in sent.items():
            if leaf.dtype is torch.float16 and bool((leaf.isinf() & values[path].isfinite()).any()):
                raise ConfigError(
                    f"fp16: '{path[1:]}' has a number beyond 65504, which half precision cannot hold; use bf16"
                )
        return sent

    def decode(self, sent: Flat, like: Flat) -> Flat:
        """In the default precision."""
        import torch

        wide = torch.get_default_dtype()
        return {path: leaf.to(wide) if leaf.dtype is self.dtype else leaf for path, leaf in sent.items()}


@dataclass(frozen=True)
class Int8:
    """Whole numbers q from -127 to 127 for scale q, scale = max|x| / 127 of the tensor, rounded to the nearest: off by scale/2 at most."""

    place = 2

    def encode(self, values: Flat, rng: Stream) -> Flat:
        """q (int8) and scale (fp32) in place of every floating tensor."""
        import torch

        sent: Flat = {}
        for path, leaf in values.items():
            if not leaf.is_floating_point():
                sent[path] = leaf
                continue
            scale = (leaf.abs().amax() / 127).float() if leaf.numel() else torch.zeros(())
            steps = leaf / scale.to(leaf).clamp(min=torch.finfo(torch.float32).tiny)
            sent |= {f"{path}/int8": steps.round().clamp(-127, 127).to(torch.int8), f"{path}/scale": scale}
        return sent

    def decode(self, sent: Flat, like: Flat) -> Flat:
        """scale q, in the default precision."""
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
    numbers: tuple[str, ...] = ()  # what follows the name, joined by colons
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
    "int8": Kind(
        make=Int8, summary="8-bit whole numbers and one scale per tensor, rounded to the nearest", example="int8"
    ),
    "topk": Kind(
        make=TopK,
        summary="only the part FRACTION of the differences, the largest; the rest is added to the next uplink",
        example="topk:0.1",
        numbers=("FRACTION",),
        ways=("uplink",),
    ),
    "gaussian": Kind(
        make=Gaussian,
        summary="differences clipped to the length CLIP, plus normal noise of deviation NOISE x CLIP",
        example="gaussian:1.0:0.01",
        numbers=("CLIP", "NOISE"),
        ways=("uplink",),
    ),
}


class Chain(NamedTuple):
    """Transforms of one part, one after another."""

    steps: tuple[Transform, ...]

    @property
    def on_differences(self) -> bool:
        """Whether it makes sense for differences alone."""
        return any(isinstance(step, TopK | Gaussian) for step in self.steps)

    @property
    def remembers(self) -> bool:
        """Whether the sender keeps what was not sent."""
        return any(isinstance(step, TopK) for step in self.steps)

    def encode(self, values: Flat, unsent: Flat, rng: Stream) -> tuple[Flat, Flat]:
        """What travels, and what then is still unsent (nothing, unless the chain remembers)."""
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
        """What arrives."""
        for step in reversed(self.steps):
            sent = step.decode(sent, like)
        return sent


Chains = Mapping[str, Chain]  # by part


def parse(words: Sequence[str], way: str) -> Chains:
    """The transforms of `uplink` or `downlink` messages from words `[PART/]NAME[:NUMBER...]`, such as `topk:0.1` or `control/fp16`.

    Raises:
        ValueError: says what is wrong and what is allowed.
    """
    chains: dict[str, tuple[Transform, ...]] = {}
    for word in words:
        part, _, named = word.rpartition("/")
        part, step = part or WEIGHTS, _step(named, way)
        before = chains.get(part, ())
        if part == COUNTS:
            raise ValueError(f"'{word}': counts must arrive as they are, for they say which other numbers there are")
        if part != WEIGHTS and not isinstance(step, Half | Int8):
            raise ValueError(f"'{word}': {named.partition(':')[0]} works on differences of weights alone")
        if before and before[-1].place >= step.place:
            raise ValueError("the order is gaussian, topk, and one of fp16, bf16, int8; each at most once")
        chains[part] = (*before, step)
    return {part: Chain(steps) for part, steps in chains.items()}


def _step(word: str, way: str) -> Transform:
    name, *texts = word.split(":")
    if name not in TRANSFORMS:
        raise ValueError(f"no transform is called '{name}'{suggest(name, TRANSFORMS)}")
    kind = TRANSFORMS[name]
    if way not in kind.ways:
        raise ValueError(
            f"{name} works on what clients send, as a difference from what they received; use uplink={word}"
        )
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
    """Whether a tensor of a part as it travels stands for one or all of the tensors `values`."""
    return path.startswith(f"{TOPK}/") or path.rpartition("/")[0] in values
