"""Random streams: one independent generator per (seed, purpose, round, client, ...), the same in every process.

A stream is a Philox generator keyed with 128 bits of BLAKE2b over its key, so that nothing depends on the order in which
clients are visited, on the engine, or on an interruption: a run resumes with nothing but its round number.
(torch's CPU generator keeps 32 bits of a seed, `zlib.crc32` collides at 10,000 clients x 1,000 rounds, and `hash()` differs
between processes; none of them would do.)
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.random.bit_generator import ISeedSequence
from torch import Tensor

Key = str | int


def digest(*key: Key) -> int:
    """128 bits that depend on every part of `key` and on the boundaries between the parts."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


class _Key128(ISeedSequence):
    """Hands a key to a generator. `Philox(key=...)` gives the same numbers, but asks the system for entropy that nobody uses."""

    def __init__(self, key: int) -> None:
        self._key = key

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        """The two words that a Philox generator asks for."""
        return np.array([self._key & (2**64 - 1), self._key >> 64], dtype=np.uint64)


class Stream:
    """A random stream that hands out torch tensors. `Stream(seed, "masks", round, client)` is reproducible anywhere.

    Draws happen in float64 on the CPU and are then cast to the default dtype, so runs in float32 and float64 see the same numbers.
    """

    def __init__(self, *key: Key) -> None:
        self.key = tuple(part if isinstance(part, str) else int(part) for part in key)

    @functools.cached_property
    def numpy(self) -> np.random.Generator:
        """The generator, made at the first draw: most streams only have children."""
        return np.random.Generator(np.random.Philox(_Key128(digest(*self.key))))  # type: ignore[arg-type]

    def child(self, *key: Key) -> Stream:
        """An independent stream below this one; drawing from this one does not move it."""
        return Stream(*self.key, *key)

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers."""
        return torch.as_tensor(self.numpy.standard_normal(tuple(shape)), dtype=torch.get_default_dtype())

    def uniform(self, shape: Sequence[int]) -> Tensor:
        """Uniform numbers in [0, 1)."""
        return torch.as_tensor(self.numpy.random(tuple(shape)), dtype=torch.get_default_dtype())

    def integers(self, high: int, shape: Sequence[int]) -> Tensor:
        """Integers from 0 to `high` - 1, int64."""
        return torch.as_tensor(self.numpy.integers(0, high, tuple(shape)))

    def permutation(self, n: int) -> Tensor:
        """A uniform permutation of 0 .. n - 1, int64."""
        return torch.as_tensor(self.numpy.permutation(n))

    def torch_seed(self) -> int:
        """A 63-bit seed for torch's own generators (initial weights, modules with Dropout)."""
        return digest(*self.key, "torch") & (2**63 - 1)
