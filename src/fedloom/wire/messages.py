"""Messages as bytes: the safetensors format, with a small header of our own in its metadata. Nothing is ever unpickled.

A message is a tree of tensors (an uplink or a downlink). Its branches are joined with `/` into safetensors names; the metadata holds the
format's version and the sender's fields, padded so that the length of a message depends on its structure alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import pairwise

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fedloom import tree
from fedloom.errors import WireError
from fedloom.tree import Tree

VERSION = "1"
MAX_DEPTH = 32  # branches above a tensor
FIELD_LENGTH = 10  # digits; every whole number in the header is padded to this


def encode(message: Tree, **fields: int) -> bytes:
    """The bytes of a message. A message without tensors is no message: 0 bytes."""
    flat = {path: leaf.detach().contiguous() for path, leaf in tree.flatten(message)}
    if not flat:
        return b""
    storage: dict[int, str] = {}
    for path, leaf in flat.items():  # safetensors refuses tensors that share memory
        if storage.setdefault(leaf.untyped_storage().data_ptr(), path) != path:
            flat[path] = leaf.clone()
    meta = {"fedloom": VERSION} | {name: f"{value:0{FIELD_LENGTH}d}" for name, value in sorted(fields.items())}
    return safetensors.torch.save(flat, meta)


def decode(data: bytes, expect: Tree | None = None) -> Tree:
    """The message in some bytes.

    Args:
        expect: a tree of the structure that the message must have (names, shapes, types).

    Raises:
        WireError: the bytes are no message, or not the expected one. Says what is wrong.
    """
    flat = _load(data) if data else {}
    if expect is not None:
        check_structure(tree.structure(flat), tree.structure(expect))
    return tree.unflatten(flat)


def _load(data: bytes) -> dict[str, Tensor]:
    """The tensors of a message by path."""
    try:
        flat: dict[str, Tensor] = safetensors.torch.load(data)
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise WireError(f"{len(data)} bytes that are not a safetensors message: {error}") from None
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    version = (header.get("__metadata__") or {}).get("fedloom")
    if version != VERSION:
        raise WireError(f"a message of version {version}; this is fedloom's wire format {VERSION}")
    check_depth(flat)
    for path, after in pairwise(sorted(name.split("/") for name in flat)):
        if after[: len(path)] == path:
            raise WireError(f"'{'/'.join(path)}' is both a tensor and a branch")
    return flat


def check_depth(paths: Iterable[str]) -> None:
    """Raise WireError for a path with more branches than any method's tree has."""
    deepest = max((path.count("/") for path in paths), default=0)
    if deepest > MAX_DEPTH:
        raise WireError(f"a tensor below {deepest} branches; at most {MAX_DEPTH} are allowed")


def check_structure(got: Mapping[str, object], want: Mapping[str, object]) -> None:
    """Raise WireError where a message's structure (see `tree.structure`) is not the wanted one; names the first such tensor."""
    if got == want:
        return
    for path in sorted(want.keys() - got.keys()):
        raise WireError(f"the message lacks '{path}'")
    for path, form in got.items():
        if path not in want:
            raise WireError(f"the message holds '{path}', which nobody asked for")
        if form != want[path]:
            raise WireError(f"'{path}' is {form}, expected {want[path]}")


class Meter:
    """Counts the bytes of messages without writing them: one real encoding per structure, remembered."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], dict[str, int]] = {}
        self._last: tuple[Tree, dict[str, int]] = {}, {}  # a downlink goes to many

    def sizes(self, message: Tree) -> dict[str, int]:
        """Bytes by kind: one entry per branch at the top (`weights`, `prototypes`, ...), and `header` for all that is not tensors."""
        if message is not self._last[0]:
            self._last = message, self._sizes(message)
        return dict(self._last[1])

    def _sizes(self, message: Tree) -> dict[str, int]:
        form = tree.structure(message)
        key = tuple(form.items())
        if key not in self._known:
            empty = {path: torch.empty(shape, dtype=dtype) for path, (shape, dtype) in form.items()}
            whole = len(encode(tree.unflatten(empty), **BLANK))
            kinds: dict[str, int] = {}
            for path, leaf in empty.items():
                kind = path.partition("/")[0]
                kinds[kind] = kinds.get(kind, 0) + leaf.numel() * leaf.element_size()
            self._known[key] = kinds | {"header": whole - sum(kinds.values())} if whole else {}
        return self._known[key]


BLANK = {"round": 0, "client": 0, "examples": 0}  # the fields that every message carries
