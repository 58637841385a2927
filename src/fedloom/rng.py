"""Random streams: one independent generator per (seed, purpose, round, client, ...), which is the same in every process.

A stream is a Philox generator that is keyed with a 128-bit BLAKE2b hash of the stream's key. Its numbers therefore do not depend on the
engine, on interruptions, or on the order in which clients are visited. The round number is sufficient to resume a run. (Alternatives do
not work: torch's CPU generator uses only 32 bits of a seed, `zlib.crc32` has collisions at 10,000 clients x 1,000 rounds, and `hash()`
differs between processes.)
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
    """Return a 128-bit number that depends on every part of `key` and on the boundaries between the parts."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


class _Key128(ISeedSequence):
    """A key for a Philox generator. `Philox(key=...)` gives the same numbers, but also reads system entropy, which is not needed."""

    def __init__(self, key: int) -> None:
        self._key = key

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        """Return the two words that a Philox generator requests."""
        return np.array([self._key & (2**64 - 1), self._key >> 64], dtype=np.uint64)


class Stream:
    """A random stream that returns torch tensors. `Stream(seed, "masks", round, client)` gives the same numbers everywhere.

    Numbers are drawn in float64 on the CPU and cast to the default dtype, so float32 and float64 runs use the same numbers.
    """

    def __init__(self, *key: Key) -> None:
        self.key = tuple(part if isinstance(part, str) else int(part) for part in key)

    @functools.cached_property
    def numpy(self) -> np.random.Generator:
        """The generator. It is created at the first draw, because most streams only have children."""
        return np.random.Generator(np.random.Philox(_Key128(digest(*self.key))))  # type: ignore[arg-type]

    def child(self, *key: Key) -> Stream:
        """Return an independent stream derived from this one's key. Draws from either do not affect the other."""
        return Stream(*self.key, *key)

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Draw standard normal numbers."""
        return torch.as_tensor(self.numpy.standard_normal(tuple(shape)), dtype=torch.get_default_dtype())

    def uniform(self, shape: Sequence[int]) -> Tensor:
        """Draw uniform numbers in [0, 1)."""
        return torch.as_tensor(self.numpy.random(tuple(shape)), dtype=torch.get_default_dtype())

    def integers(self, high: int, shape: Sequence[int]) -> Tensor:
        """Draw integers from 0 to `high` - 1, int64."""
        return torch.as_tensor(self.numpy.integers(0, high, tuple(shape)))

    def permutation(self, n: int) -> Tensor:
        """Draw a uniform permutation of 0 .. n - 1, int64."""
        return torch.as_tensor(self.numpy.permutation(n))

    def torch_seed(self) -> int:
        """Return a 63-bit seed for torch's own generators (initial weights, modules with Dropout)."""
        return digest(*self.key, "torch") & (2**63 - 1)
