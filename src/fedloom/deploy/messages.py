"""What the server and a node say to each other: a JSON header that is validated, and trees of tensors in our wire format.

An envelope is `fedloom1`, the header's length (8 bytes, little-endian), the header, and the parts, one after another, in safetensors; their
lengths are in the header. Nothing is ever unpickled; whatever does not fit is refused with a `WireError` that says why.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from fedloom import tree
from fedloom.engines.base import Score, ScoreRequest
from fedloom.errors import WireError
from fedloom.ranges import Positive
from fedloom.tree import Tree
from fedloom.wire.messages import check_depth, decode, encode

MAGIC = b"fedloom1"
MAX_HEADER = 64 * 2**20  # bytes
EMPTY = "/"  # ends the path of a branch without tensors

MAX_ROWS = 10_000_000  # of one node; the server keeps a label for each
MAX_LOGS = 100  # of one turn; each becomes a column, and a plot
Whole = Annotated[int, Field(ge=0, lt=2**31)]  # no number that a table or a sum cannot hold
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
# `phase.log`; the run's own numbers have no point in their names
LogName = Annotated[str, Field(pattern=r"^[^.]+\..")]
Counts = Annotated[list[Whole], Field(max_length=1_000_000)]
MAX_WORDS = 1000  # characters of a line that a person reads


def _readable(words: str) -> str:
    """The words as one line of bounded length that does nothing to a terminal."""
    return "".join(c if c.isprintable() else " " for c in words[:MAX_WORDS])


Words = Annotated[str, AfterValidator(_readable)]
Notes = Annotated[list[Words], Field(max_length=10_000)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Part(_Strict):
    """A tree in the envelope: its bytes, and the paths of its leaves (and of its empty branches) in order."""

    name: str
    n_bytes: Annotated[int, Field(ge=0)]
    paths: list[str]


class Assignment(_Strict):
    """A client that is asked: its place in the cohort, the round in which its state must have been committed last, and what to keep.

    `base` and `keep` are round numbers plus one; 0 is the initial state.
    """

    client: Whole
    slot: Whole
    base: Whole
    keep: Whole


class Question(_Strict):
    """A `ScoreRequest` as part of a message."""

    name: str
    rows: Literal["test", "valid", "common"]
    fitted: bool

    def request(self) -> ScoreRequest:
        """The request."""
        return ScoreRequest(self.name, self.rows, self.fitted)


class Call(_Strict):
    """What every request says: which run, its settings as TOML, the classes' names, the shape of an input, and how long to work at most."""

    run: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    config: str
    classes: list[str]
    input_shape: list[int]
    deadline_s: Positive


class Hello(_Strict):
    """Asks a node who it is."""

    kind: Literal["hello"] = "hello"
    call: Call


class TrainMessage(_Strict):
    """Asks clients to take their turns. Parts: `common`, and `each-<slot>` where members are sent trees of their own."""

    kind: Literal["train"] = "train"
    call: Call
    number: Whole
    members: list[Assignment]


class ScoreMessage(_Strict):
    """Asks for scores of clients. Part: `common`."""

    kind: Literal["score"] = "score"
    call: Call
    number: Whole
    members: list[Assignment]
    questions: list[Question]


class Present(_Strict):
    """Who a node is: its clients, and for rows of its own how many of each class there are, by split ("train", "valid", "test")."""

    kind: Literal["present"] = "present"
    clients: list[Whole]
    own_rows: bool
    counts: dict[str, dict[str, Counts]]  # by client (as text) and split


class Turned(_Strict):
    """A client's turn: done (its uplink is the part named by its slot), or failed, and why."""

    client: Whole
    slot: Whole
    examples: Annotated[Whole, Field(le=MAX_ROWS)] = 0
    steps: dict[str, Whole] = {}
    logs: Annotated[dict[LogName, float], Field(max_length=MAX_LOGS)] = {}
    phase_seconds: dict[str, Seconds] = {}
    seconds: Seconds = 0.0
    diverged: Words = ""
    failure: Words = ""


class Trained(_Strict):
    """What came of a `TrainRequest`."""

    kind: Literal["trained"] = "trained"
    turns: list[Turned]
    notes: Notes = []


class Counted(_Strict):
    """A score on its way: per class, rows predicted rightly, and rows."""

    right: Counts
    rows: Counts

    def score(self, most: npt.NDArray[np.int64]) -> Score:
        """The score; raises WireError where the counts cannot be: more than `most` rows of a class, or more right than there are."""
        right, rows = np.array(self.right, np.int64), np.array(self.rows, np.int64)
        if not right.shape == rows.shape == most.shape or (right > rows).any() or (rows > most).any():
            raise WireError("scores that cannot be")
        return Score(right, rows)


class Scored(_Strict):
    """The answer to a `ScoreMessage`: scores by client (as text) and name."""

    kind: Literal["scored"] = "scored"
    scores: dict[str, dict[str, Counted]]
    notes: Notes = []


class NodeFailure(_Strict):
    """A node could do nothing of what was asked."""

    kind: Literal["failed"] = "failed"
    reason: Words


Header = Annotated[
    Hello | TrainMessage | ScoreMessage | Present | Trained | Scored | NodeFailure, Field(discriminator="kind")
]


class Letter(NamedTuple):
    """An opened envelope."""

    header: Any  # one of the models above
    trees: Mapping[str, bytes]  # encoded
    paths: Mapping[str, Sequence[str]]

    def tree(self, name: str) -> Tree:
        """A part as a tree, its leaves and empty branches in the order in which they were sent. Raises WireError where there is none."""
        if name not in self.trees:
            raise WireError(f"the message has no part '{name}'")
        return _in_order(dict(tree.flatten(decode(self.trees[name]))), self.paths[name])


def seal(header: BaseModel, trees: Mapping[str, Tree]) -> bytes:
    """An envelope."""
    encoded = {name: encode(value) for name, value in trees.items()}
    parts = [{"name": name, "n_bytes": len(data), "paths": list(_paths(trees[name]))} for name, data in encoded.items()]
    text = json.dumps({"header": header.model_dump(mode="python"), "parts": parts}).encode()
    return b"".join([MAGIC, len(text).to_bytes(8, "little"), text, *encoded.values()])


def open_envelope(data: bytes) -> Letter:
    """The letter in an envelope.

    Raises:
        WireError: says what is wrong with the bytes.
    """
    if data[: len(MAGIC)] != MAGIC:
        raise WireError(f"{len(data)} bytes that are no fedloom message")
    start = len(MAGIC) + 8
    length = int.from_bytes(data[len(MAGIC) : start], "little")
    if length > min(MAX_HEADER, len(data) - start):
        raise WireError(f"a message of {len(data)} bytes that was cut off in its header")
    try:
        content = _CONTENT.validate_json(data[start : start + length])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise WireError(f"a header that is not understood: {where}: {first['msg']}") from None
    return Letter(content.header, *_cut(content.parts, data, start + length))


class _Content(_Strict):
    header: Header
    parts: list[Part]


_CONTENT = TypeAdapter(_Content)


def _cut(parts: Sequence[Part], data: bytes, start: int) -> tuple[dict[str, bytes], dict[str, list[str]]]:
    if sum(part.n_bytes for part in parts) != len(data) - start:
        raise WireError(f"a message of {len(data)} bytes that was cut off, or holds more than it says")
    trees: dict[str, bytes] = {}
    for part in parts:
        trees[part.name] = data[start : start + part.n_bytes]
        start += part.n_bytes
    if len(trees) != len(parts):
        raise WireError("a message with two parts of one name")
    return trees, {part.name: part.paths for part in parts}


def _paths(value: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, child in value.items():
        if not isinstance(child, dict):
            yield prefix + key
        elif child:
            yield from _paths(child, f"{prefix}{key}/")
        else:
            yield prefix + key + EMPTY


def _in_order(leaves: Mapping[str, Any], paths: Sequence[str]) -> Tree:
    if {path for path in paths if not path.endswith(EMPTY)} != leaves.keys():
        raise WireError("a part that does not hold what its header says")
    check_depth(paths)
    made: Tree = {}
    for path in paths:
        *branches, last = path.removesuffix(EMPTY).split("/")
        node = made
        for branch in branches:
            node = node.setdefault(branch, {})
            if not isinstance(node, dict):
                raise WireError(f"'{path}' lies below a tensor")
        node[last] = {} if path.endswith(EMPTY) else leaves[path]
    return made
