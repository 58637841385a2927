"""Messages as bytes, in safetensors format with a small header in the metadata. Nothing is ever unpickled.

A message is a tree of tensors (an uplink or a downlink). Safetensors names are the paths of tensors, joined with `/`. The metadata contain
the version of the format and the sender's fields. They are padded, so that the length of a message depends only on its structure.
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
MAX_DEPTH = 32  # maximum number of branches above a tensor
FIELD_LENGTH = 10  # number of digits of each integer in the header, padded with zeros


def encode(message: Tree, **fields: int) -> bytes:
    """Return a message as bytes. A message without tensors is encoded as 0 bytes."""
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
    """Return the message that bytes encode.

    Args:
        expect: a tree with the required structure (names, shapes, types).

    Raises:
        WireError: the bytes are not a message, or the message does not have the expected structure. The error states the reason.
    """
    flat = _load(data) if data else {}
    if expect is not None:
        check_structure(tree.structure(flat), tree.structure(expect))
    return tree.unflatten(flat)


def _load(data: bytes) -> dict[str, Tensor]:
    """Return the tensors of a message by path."""
    try:
        flat: dict[str, Tensor] = safetensors.torch.load(data)
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise WireError(f"{len(data)} bytes are not a safetensors message: {error}") from None
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    version = (header.get("__metadata__") or {}).get("fedloom")
    if version != VERSION:
        raise WireError(f"the message has version {version}, but this fedloom needs version {VERSION}")
    check_depth(flat)
    for path, after in pairwise(sorted(name.split("/") for name in flat)):
        if after[: len(path)] == path:
            raise WireError(f"'{'/'.join(path)}' is both a tensor and a branch")
    return flat


def check_depth(paths: Iterable[str]) -> None:
    """Raise WireError for a path with more than `MAX_DEPTH` branches."""
    deepest = max((path.count("/") for path in paths), default=0)
    if deepest > MAX_DEPTH:
        raise WireError(f"a tensor has {deepest} branches above it; at most {MAX_DEPTH} are allowed")


def check_structure(got: Mapping[str, object], want: Mapping[str, object]) -> None:
    """Raise WireError if a message does not have the expected structure (see `tree.structure`). The error names the first wrong tensor."""
    if got == want:
        return
    for path in sorted(want.keys() - got.keys()):
        raise WireError(f"the message lacks '{path}'")
    for path, form in got.items():
        if path not in want:
            raise WireError(f"the message has an unexpected tensor '{path}'")
        if form != want[path]:
            raise WireError(f"'{path}' is {form}, expected {want[path]}")


class Meter:
    """Measures the size of messages. Each structure is encoded once, and its size is cached."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], dict[str, int]] = {}
        self._last: tuple[Tree, dict[str, int]] = {}, {}  # many clients receive the same downlink

    def sizes(self, message: Tree) -> dict[str, int]:
        """Return the number of bytes by kind.

        There is one entry per top-level branch (`weights`, `prototypes`, ...), and `header` for everything except tensors.
        """
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


BLANK = {"round": 0, "client": 0, "examples": 0}  # fields of every message
