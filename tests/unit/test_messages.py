"""Messages of devices: content that is refused before it costs time or memory, and content that must be accepted."""

import json
import time

import pytest
import torch

from fedloom import tree
from fedloom.deploy.limits import MAX_HEADER, Limits, limits
from fedloom.deploy.messages import NodeFailure, Trained, Turned, open_envelope, seal
from fedloom.errors import ConfigError, WireError

MIB = 2**20
ONE = b'{"client":0,"slot":0},'
JUNK = {
    "empty turns": lambda n: b'{"header":{"kind":"trained","turns":[' + b"{}," * (n // 3) + b'{}]},"parts":[]}',
    "valid turns": lambda n: b'{"header":{"kind":"trained","turns":[' + ONE * (n // 22) + ONE[:-1] + b']},"parts":[]}',
    "numbers as parts": lambda n: b'{"header":{"kind":"trained","turns":[]},"parts":[' + b"1," * (n // 2) + b"1]}",
    "unknown keys": lambda n: b'{"header":{"kind":"trained","turns":[]' + keys(n) + b'},"parts":[]}',
    "texts as counts": lambda n: (
        b'{"header":{"kind":"scored","scores":{"0":{"a":{"sums":{"right":['
        + b'"",' * (n // 3)
        + b'1],"rows":[]}}}}},"parts":[]}'
    ),
    "numbers as notes": lambda n: (
        b'{"header":{"kind":"trained","turns":[],"notes":[' + b"1," * (n // 2) + b'1]},"parts":[]}'
    ),
    "many phases": lambda n: (
        b'{"header":{"kind":"trained","turns":[{"client":0,"slot":0,"steps":{"a":1' + keys(n) + b'}}]},"parts":[]}'
    ),
    "many paths": lambda n: (
        b'{"header":{"kind":"trained","turns":[]},"parts":[{"name":"0","n_bytes":0,"paths":['
        + b'"a",' * (n // 4)
        + b'"a"]}]}'
    ),
    "a long number": lambda n: b'{"header":{"kind":"trained","turns":[{"client":' + b"1" * n + b'}]},"parts":[]}',
}


def keys(n):
    return b"".join(b',"%x":1' % i for i in range(n // 10))


def envelope(header: bytes, body: bytes = b"") -> bytes:
    """Return an envelope with the same first bytes as those of `seal`."""
    return seal(NodeFailure(reason=""), {})[:8] + len(header).to_bytes(8, "little") + header + body


@pytest.mark.parametrize("kind", JUNK)
@pytest.mark.parametrize(
    ("size", "allowed"),
    [(MIB, limits()), (5 * MIB, limits(members=4096)), (MIB, Limits(MIB * 2, limits().commas)), (MIB, Limits(MIB * 2, MIB))],
    ids=["one client", "4096 clients", "large header", "many elements"],
)  # fmt: skip
def test_junk_is_refused_at_once(kind, size, allowed):
    """Without limits, 1 MiB of these took up to 4.3 s and 990 MiB. The last case relies only on the limits of fields."""
    data = envelope(JUNK[kind](size))
    started = time.process_time()
    with pytest.raises(WireError, match=r"the header (has|is not valid)"):
        open_envelope(data, allowed)
    assert time.process_time() - started < 0.3


def test_each_limit_names_what_it_allows():
    with pytest.raises(WireError, match=r"the header has 1048615 bytes; at most 278528 are allowed"):
        open_envelope(envelope(JUNK["numbers as parts"](MIB)[: MIB + 39]))
    with pytest.raises(WireError, match=r"the header has more than 20\d\d\d elements; at most 16896 are allowed"):
        open_envelope(envelope(JUNK["numbers as parts"](40_000)))
    with pytest.raises(WireError, match="more than 100 faults"):
        open_envelope(envelope(JUNK["unknown keys"](10_000)))
    with pytest.raises(WireError, match=r"scores\.0\.a\.sums\.right\.0: Input should be a valid integer"):
        open_envelope(envelope(JUNK["texts as counts"](30_000)))


def test_text_of_the_sender_in_an_error_is_printable_and_short():
    name = json.dumps("\x1b[31m" + "x" * 5000).encode()
    header = b'{"header":{"kind":"trained","turns":[{"client":0,"slot":0,"logs":{' + name + b':1.0}}]},"parts":[]}'
    with pytest.raises(WireError) as caught:
        open_envelope(envelope(header))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_a_tensor_list_must_not_be_longer_than_the_header_states():
    junk = b'{"a":{}' + b"".join(b',"%x":{}' % i for i in range(100_000)) + b"}"
    body = len(junk).to_bytes(8, "little") + junk
    parts = [{"name": "0", "n_bytes": len(body), "paths": ["a"]}]
    header = json.dumps({"header": {"kind": "trained", "turns": []}, "parts": parts}).encode()
    letter = open_envelope(envelope(header, body))
    started = time.process_time()
    with pytest.raises(WireError, match="longer list of tensors"):
        letter.tree("0")
    assert time.process_time() - started < 0.1


def test_a_large_honest_answer_passes():
    """The answer is for a hundred clients of one node, with the tensors of a deep network."""
    paths = [f"model.body.layers.{k}.convolution.weight" for k in range(400)]
    sent = {"weights": {"params": {path: torch.ones(1) for path in paths}, "buffers": {}}}
    steps = {f"phase{k}": 5 for k in range(20)}
    turns = [
        Turned(client=i, slot=i, examples=9, steps=steps, logs={f"a.{k}": 0.1 for k in range(100)}) for i in range(100)
    ]
    data = seal(Trained(turns=turns, notes=["a note"] * 100), {str(i): sent for i in range(100)})
    letter = open_envelope(data, limits(100, [f"weights/params/{path}" for path in paths]))
    assert letter.header.turns == turns
    assert tree.equal(letter.tree("99"), sent)


def test_a_message_that_no_one_may_open_is_not_sent():
    turns = [Turned(client=i, slot=i, failure="x" * 1000) for i in range(4096)] * 2
    with pytest.raises(ConfigError, match=rf"at most {MAX_HEADER} are allowed; assign fewer clients to each node"):
        seal(Trained.model_construct(turns=turns, notes=[]), {})
