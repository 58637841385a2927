"""Messages between the server and a node: a validated JSON header, and trees of tensors in fedloom's wire format.

An envelope consists of `fedloom2`, the length of the header (8 bytes, little-endian), the header, and the parts in safetensors format,
whose lengths are in the header. Nothing is ever unpickled. Any invalid content raises a `WireError` that states the reason.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field, TypeAdapter, ValidationError

from fedloom import tree
from fedloom.deploy.limits import (
    MAX_HEADER,
    MEMBERS,
    ONE_CLIENT,
    PHASES,
    TENSOR_HEADER,
    Config,
    Counts,
    Description,
    Limits,
    Name,
    Path,
    Sums,
    Whole,
)
from fedloom.engines.base import ScoreRequest
from fedloom.errors import ConfigError, WireError
from fedloom.objectives import Objective, Score
from fedloom.ranges import Positive
from fedloom.tree import Tree
from fedloom.wire.messages import check_depth, decode, encode

MAGIC = b"fedloom2"
EMPTY = "/"  # suffix of the path of a branch without tensors

MAX_ROWS = 10_000_000  # maximum number of rows per node; the server keeps a label for each
MAX_LOGS = 100  # maximum number of logs per client update; each becomes a column and a plot
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
# The form is `phase.log`; names of the run's own metrics contain no dot. Tables and pages show the names, so markup is not allowed.
LogName = Annotated[str, Field(pattern=r"^[^.<>&]+\.[^<>&]+$", max_length=128)]
MAX_WORDS = 1000  # maximum length of a line of text, in characters


def _readable(words: str) -> str:
    """Return text as one line of limited length without control characters."""
    return "".join(c if c.isprintable() else " " for c in words[:MAX_WORDS])


Words = Annotated[str, AfterValidator(_readable)]
MAX_NOTES = 100
Notes = Annotated[list[Words], FailFast(), Field(max_length=MAX_NOTES)]
MAX_FAULTS = 100  # maximum number of listed faults, because listing faults costs more than finding them


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Part(_Strict):
    """A tree in the envelope: its size in bytes, and the paths of its leaves and empty branches in order."""

    name: Name
    n_bytes: Annotated[int, Field(ge=0)]
    paths: Annotated[list[Path], FailFast(), Field(max_length=10_000)]


class Assignment(_Strict):
    """A requested client: its position in the cohort, the state from which it starts, and the oldest state to keep.

    `base` is one plus the round of the state from which the client starts, and `keep` is one plus the round of the oldest state to keep.
    The initial state is 0.
    """

    client: Whole
    slot: Whole
    base: Whole
    keep: Whole


class Question(_Strict):
    """A `ScoreRequest` as part of a message."""

    name: Name
    rows: Literal["test", "valid", "common"]
    fitted: bool

    def request(self) -> ScoreRequest:
        """Return the `ScoreRequest`."""
        return ScoreRequest(self.name, self.rows, self.fitted)


class Call(_Strict):
    """The part that all requests share: the run, its settings as TOML, its inputs and learning task (the text of a preprocess.json), and
    the time limit."""

    run: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    config: Config
    preprocess: Description
    deadline_s: Positive


class Hello(_Strict):
    """A request for a node's clients and data."""

    kind: Literal["hello"] = "hello"
    call: Call


class TrainMessage(_Strict):
    """A request for local updates of clients. Its parts are `common`, and `each-<slot>` for members that receive their own trees."""

    kind: Literal["train"] = "train"
    call: Call
    number: Whole
    members: Annotated[list[Assignment], FailFast(), Field(max_length=MEMBERS)]


class ScoreMessage(_Strict):
    """A request for scores of clients. Its part is `common`."""

    kind: Literal["score"] = "score"
    call: Call
    number: Whole
    members: Annotated[list[Assignment], FailFast(), Field(max_length=MEMBERS)]
    questions: Annotated[list[Question], FailFast(), Field(max_length=8)]


class Present(_Strict):
    """A node's clients.

    For nodes with their own data, it also contains the number of examples by split ("train", "valid", "test"): one number per class, or a
    single number if the task has no classes.
    """

    kind: Literal["present"] = "present"
    clients: Annotated[list[Whole], FailFast(), Field(max_length=MEMBERS)]
    own_rows: bool
    # By client (as text) and split.
    counts: Annotated[dict[Name, Annotated[dict[Name, Counts], Field(max_length=3)]], Field(max_length=MEMBERS)]


class Turned(_Strict):
    """A client's local update. It is either completed, with the uplink in the part named by its slot, or failed, with a reason."""

    client: Whole
    slot: Whole
    examples: Annotated[Whole, Field(le=MAX_ROWS)] = 0
    steps: Annotated[dict[Name, Whole], Field(max_length=PHASES)] = {}
    logs: Annotated[dict[LogName, float], Field(max_length=MAX_LOGS)] = {}
    phase_seconds: Annotated[dict[Name, Seconds], Field(max_length=PHASES)] = {}
    seconds: Seconds = 0.0
    diverged: Words = ""
    failure: Words = ""


class Trained(_Strict):
    """The answer to a `TrainMessage`."""

    kind: Literal["trained"] = "trained"
    turns: Annotated[list[Turned], FailFast(), Field(max_length=MEMBERS)]
    notes: Notes = []


class SentScore(_Strict):
    """A score in a message: its integer sums, by name."""

    sums: Annotated[dict[Name, Sums], Field(max_length=8)]

    def score(self, objective: Objective, most: Score) -> Score:
        """Return the score.

        Raises:
            WireError: sums are missing, have the wrong length, or are impossible for at most `most["rows"]` examples.
        """
        if {name: len(values) for name, values in self.sums.items()} != objective.shapes():
            raise WireError("its scores do not have the sums of this learning task")
        score = Score({name: np.array(values, np.int64) for name, values in self.sums.items()})
        negative = any(
            (values < 0).any() for name, values in score.sums.items() if name != "t"
        )  # targets may be negative
        reason = "a negative sum" if negative else objective.excess(score, most)
        if reason:
            raise WireError(f"its scores have impossible counts: {reason}")
        return score


class Scored(_Strict):
    """The answer to a `ScoreMessage`, with scores by client (as text) and name."""

    kind: Literal["scored"] = "scored"
    scores: Annotated[dict[Name, Annotated[dict[Name, SentScore], Field(max_length=8)]], Field(max_length=MEMBERS)]
    notes: Notes = []


class NodeFailure(_Strict):
    """The answer of a node that could not carry out a request."""

    kind: Literal["failed"] = "failed"
    reason: Words


Header = Annotated[
    Hello | TrainMessage | ScoreMessage | Present | Trained | Scored | NodeFailure, Field(discriminator="kind")
]


class Letter(NamedTuple):
    """A decoded envelope."""

    header: Any  # one of the models above
    trees: Mapping[str, memoryview]  # encoded trees, which are copied only when they are decoded
    paths: Mapping[str, Sequence[str]]

    def tree(self, name: str) -> Tree:
        """Return a part as a tree, with leaves and empty branches in the order in which they were sent.

        Raise WireError if there is no such part.
        """
        if name not in self.trees:
            raise WireError(f"the message has no part '{name}'")
        data, paths = self.trees[name], self.paths[name]
        if int.from_bytes(data[:8], "little") > TENSOR_HEADER * (len(paths) + 2):
            raise WireError(f"part '{_readable(name)}' has a longer list of tensors than its header states")
        return _in_order(dict(tree.flatten(decode(bytes(data)))), paths)


def seal(header: BaseModel, trees: Mapping[str, Tree]) -> bytes:
    """Return a header and trees as an envelope. Raise ConfigError if the header exceeds the limit for all messages."""
    encoded = {name: encode(value) for name, value in trees.items()}
    parts = [{"name": name, "n_bytes": len(data), "paths": list(_paths(trees[name]))} for name, data in encoded.items()]
    text = json.dumps({"header": header.model_dump(mode="python"), "parts": parts}).encode()
    if len(text) > MAX_HEADER:
        raise ConfigError(
            f"the header of a message has {len(text)} bytes, but at most {MAX_HEADER} are allowed; assign fewer clients to each node"
        )
    return b"".join([MAGIC, len(text).to_bytes(8, "little"), text, *encoded.values()])


def open_envelope(data: bytes, allowed: Limits = ONE_CLIENT) -> Letter:
    """Return the content of an envelope whose header is within the limits `allowed`.

    Raises:
        WireError: the bytes are not a valid message; the error states the reason.
    """
    if data[: len(MAGIC)] != MAGIC:
        raise WireError(f"{len(data)} bytes are not a fedloom message")
    start = len(MAGIC) + 8
    length = int.from_bytes(data[len(MAGIC) : start], "little")
    if length > len(data) - start:
        raise WireError(f"the message of {len(data)} bytes is cut off in its header")
    if length > allowed.n_bytes:
        raise WireError(f"the header has {length} bytes; at most {allowed.n_bytes} are allowed")
    header = data[start : start + length]
    if (n := header.count(b",")) > allowed.commas:
        raise WireError(f"the header has more than {n} elements; at most {allowed.commas} are allowed")
    try:
        content = _CONTENT.validate_json(header)
    except ValidationError as error:
        raise WireError(f"the header is not valid: {_first_fault(error)}") from None
    return Letter(content.header, *_cut(content.parts, memoryview(data)[start + length :]))


def _first_fault(error: ValidationError) -> str:
    if error.error_count() > MAX_FAULTS:
        return f"more than {MAX_FAULTS} faults"
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    return f"{_readable('.'.join(map(str, first['loc'])))[:200]}: {first['msg']}"


class _Content(_Strict):
    header: Header
    parts: Annotated[list[Part], FailFast(), Field(max_length=MEMBERS + 4)]


_CONTENT = TypeAdapter(_Content)


def _cut(parts: Sequence[Part], data: memoryview) -> tuple[dict[str, memoryview], dict[str, list[str]]]:
    if sum(part.n_bytes for part in parts) != len(data):
        raise WireError("the message is cut off, or longer than its header states")
    trees: dict[str, memoryview] = {}
    for part in parts:
        trees[part.name], data = data[: part.n_bytes], data[part.n_bytes :]
    if len(trees) != len(parts):
        raise WireError("the message has two parts of the same name")
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
        raise WireError("a part does not have the tensors that its header lists")
    check_depth(paths)
    made: Tree = {}
    for path in paths:
        *branches, last = path.removesuffix(EMPTY).split("/")
        node = made
        for branch in branches:
            node = node.setdefault(branch, {})
            if not isinstance(node, dict):
                raise WireError(f"'{path}' is inside a tensor")
        node[last] = {} if path.endswith(EMPTY) else leaves[path]
    return made
