"""Limits of messages, so that a small junk message cannot cost the decoder much time or memory.

Each list, text and table in a header has its own limit, and validation of a list stops at its first fault. A table (a JSON object) with
many faults is validated to its end. Therefore, the number of commas, and thus of elements, is limited before validation.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, NamedTuple, TypeVar

from pydantic import FailFast, Field

KIB = 2**10
MAX_HEADER = 4096 * KIB  # number of bytes, for every request
MEMBERS = 4096  # maximum number of clients in one message
PHASES = 64
COMMAS = 16_384  # number of elements of any message, in addition to those of its clients
COMMAS_PER_CLIENT = 512
TENSOR_HEADER = 512  # bytes of the safetensors header per tensor; a path has at most 256 characters

T = TypeVar("T")
Whole = Annotated[int, Field(ge=0, lt=2**31)]  # small enough that table columns and sums do not overflow
Name = Annotated[str, Field(max_length=128)]
Path = Annotated[str, Field(max_length=256)]
Counts = Annotated[list[Whole], FailFast(), Field(max_length=100_000)]  # number of examples by class
Sums = Annotated[
    list[Annotated[int, Field(gt=-(2**62), lt=2**62)]], FailFast(), Field(max_length=100_000)
]  # the sums of a score
Config = Annotated[str, Field(max_length=256 * KIB)]
MAX_DESCRIPTION = 1024 * KIB  # maximum number of characters of a preprocess.json, enough for about 50,000 words
Description = Annotated[str, Field(max_length=MAX_DESCRIPTION)]


class Limits(NamedTuple):
    """The largest header that is decoded."""

    n_bytes: int
    commas: int


def limits(members: int = 1, paths: Collection[str] = (), n_counts: int = 0) -> Limits:
    """Return the limits of a message about `members` clients.

    Args:
        paths: paths of the tensors that each client may send or receive.
        n_counts: number of the numbers of examples by class in the whole message.
    """
    n_bytes = 256 * KIB + members * (16 * KIB + sum(map(len, paths)) + 4 * len(paths)) + 12 * n_counts
    return Limits(min(n_bytes, MAX_HEADER), COMMAS + members * (COMMAS_PER_CLIENT + len(paths)) + n_counts)


def request_limits(members: int) -> Limits:
    """Return the limits of a request to a node with `members` clients. The node does not know the paths of the model's tensors yet."""
    return Limits(MAX_HEADER, limits(members).commas + 100_000 + 2_000 * members)


ONE_CLIENT = limits()
