"""Messages as bytes: round trips, malicious bytes, and the meter."""

import contextlib
import json
import pickle
import struct

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedloom import tree
from fedloom.errors import WireError
from fedloom.wire.messages import Meter, decode, encode

TYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64,
)  # fmt: skip
GOOD = encode({"weights": {"params": {"w": torch.arange(6.0).view(2, 3)}, "buffers": {"n": torch.tensor(3)}}}, round=1)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_type_comes_back(dtype):
    message = {"a": {"full": torch.tensor([[0, 1], [1, 0]]).to(dtype), "empty": torch.zeros(0, 3).to(dtype)}}
    message["scalar"] = torch.ones(()).to(dtype)
    assert tree.equal(decode(encode(message), expect=message), message)


@given(st.lists(st.integers(0, 3), max_size=4), st.text(min_size=1, max_size=5).filter(lambda s: "/" not in s))
def test_every_shape_and_name_comes_back(shape, name):
    try:
        name.encode()
    except UnicodeEncodeError:
        return
    message = {name: {"w": torch.ones(shape)}}
    assert tree.equal(decode(encode(message, round=3, client=2, examples=10), expect=message), message)


def test_not_a_number_and_infinity_come_back():
    message = {"w": torch.tensor([float("nan"), float("inf"), -0.0])}
    assert tree.equal(decode(encode(message)), message)


def test_tensors_that_share_memory_come_back():
    base = torch.arange(12.0).view(3, 4)
    message = {"a": base, "again": base, "row": base[1], "turned": base.T, "wide": base[:1].expand(2, 4)}
    assert tree.equal(decode(encode(message)), message)


def test_a_message_without_tensors_has_no_bytes():
    assert encode({"weights": {"params": {}}}) == b""
    assert decode(b"") == {}


def test_decoded_tensors_are_writable():
    decode(GOOD)["weights"]["buffers"]["n"].add_(1)
    assert decode(GOOD)["weights"]["buffers"]["n"].item() == 3


def raw(header: object, body: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(shape: list[int], n: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, n]}


META = {"__metadata__": {"fedloom": "1"}}
HOSTILE = {
    "a pickle": pickle.dumps({"weights": [1, 2]}),
    "a torch file": pickle.dumps(torch.zeros(2)),
    "text": b"weights please",
    "a huge header": struct.pack("<Q", 2**63) + b"{}",
    "a header beyond the end": struct.pack("<Q", 100) + b"{}",
    "no header": struct.pack("<Q", 0),
    "a list": raw([]),
    "a number": raw({"a": 3}),
    "an unknown type": raw(META | {"a": entry([1], 4, "Q9")}, b"\0" * 4),
    "a type that torch lacks": raw(META | {"a": entry([8], 4, "F4")}, b"\0" * 4),
    "too few bytes": raw(META | {"a": entry([2], 8)}, b"\0" * 4),
    "too many bytes": raw(META | {"a": entry([1], 4)}, b"\0" * 8),
    "a negative size": raw(META | {"a": entry([-1], 4)}, b"\0" * 4),
    "an overflowing size": raw(META | {"a": entry([2**40, 2**40], 4)}, b"\0" * 4),
    "a size beyond torch": raw(META | {"a": entry([0, 2**63], 0)}),
    "another's safetensors": safetensors.torch.save({"a": torch.zeros(2)}),
    "another version": safetensors.torch.save({"a": torch.zeros(2)}, {"fedloom": "999"}),
    "no metadata": raw({"__metadata__": None, "a": entry([1], 4)}, b"\0" * 4),
    "a tensor that is a branch": safetensors.torch.save({"a": torch.ones(1), "a/b": torch.ones(2)}, {"fedloom": "1"}),
    "a branch that is a tensor": safetensors.torch.save({"a": torch.ones(2), "a/b": torch.ones(1)}, {"fedloom": "1"}),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_bytes_are_a_wire_error(what):
    with pytest.raises(WireError):
        decode(HOSTILE[what])


@pytest.mark.parametrize("n", range(1, len(GOOD), 7))
def test_truncated_bytes_are_a_wire_error(n):
    with pytest.raises(WireError):
        decode(GOOD[:n])


@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes_never_raise_anything_else(changes):
    data = bytearray(GOOD)
    for place, value in changes:
        data[place] = value
    with contextlib.suppress(WireError):
        assert tree.structure(decode(bytes(data), expect=decode(GOOD))) == tree.structure(decode(GOOD))


def test_deep_names_do_not_exhaust_the_stack():
    data = safetensors.torch.save({"a/" * 5000 + "a": torch.ones(1)}, {"fedloom": "1"})
    with pytest.raises(WireError, match="a tensor has 5000 branches above it; at most 32 are allowed"):
        decode(data, expect={"b": torch.ones(1)})


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"b": torch.zeros(2)}, "lacks 'a'"),
        ({"a": torch.zeros(2), "c": torch.zeros(1)}, "has an unexpected tensor 'c'"),
        ({"a": torch.zeros(3)}, r"'a' is \(\(3,\), torch.float32\), expected \(\(2,\), torch.float32\)"),
        ({"a": torch.zeros(2, dtype=torch.float16)}, "float16"),
        ({}, "lacks 'a'"),
    ],
)
def test_an_unexpected_message_is_named(message, words):
    with pytest.raises(WireError, match=words):
        decode(encode(message), expect={"a": torch.zeros(2)})


def test_the_meter_counts_what_encode_writes():
    message = {"weights": {"params": {"w": torch.zeros(3, 5)}}, "control": {"w": torch.zeros(7, dtype=torch.float64)}}
    sizes = Meter().sizes(message)
    assert sum(sizes.values()) == len(encode(message, round=12, client=345, examples=6789))
    assert (sizes["weights"], sizes["control"]) == (60, 56)
    assert Meter().sizes({"weights": {}}) == {}


def test_the_length_does_not_depend_on_the_numbers():
    lengths = {len(encode({"w": torch.full((2,), float(n))}, round=n, client=n, examples=n)) for n in (0, 7, 123456)}
    assert len(lengths) == 1


def test_the_meter_distinguishes_structures():
    meter = Meter()
    for shape, dtype in (((3,), torch.float32), ((3,), torch.float64), ((3, 1), torch.float32), ((4,), torch.float32)):
        message = {"w": torch.zeros(shape, dtype=dtype)}
        assert sum(meter.sizes(message).values()) == len(encode(message, round=0, client=0, examples=0))
    meter.sizes({"w": torch.zeros(3)})["w"] = 0
    assert meter.sizes({"w": torch.zeros(3)})["w"] == 12
