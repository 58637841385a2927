"""Random streams, which give the same numbers everywhere, and different numbers for different keys."""

import subprocess
import sys

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedloom.rng import Stream, digest

PRINTED = """
from fedloom.rng import Stream
s = Stream(7, "masks", 3, 11)
print(s.integers(10**9, (3,)).tolist(), s.permutation(6).tolist(), float(s.uniform((1,)).double()), s.torch_seed())
"""
GOLDEN = "[795576138, 618496605, 960095807] [2, 4, 0, 5, 3, 1] 0.4514022767543793 7127670560291992012"


def test_other_processes_see_the_same_numbers(capsys):
    exec(PRINTED, {})  # here, where strings are hashed as this process does
    assert capsys.readouterr().out.strip() == GOLDEN
    done = subprocess.run(
        [sys.executable, "-c", PRINTED], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "1"}
    )
    assert done.stdout.strip() == GOLDEN


def test_a_stream_does_not_depend_on_draws_from_others():
    alone = Stream(0, "a", 1).normal((4,))
    parent = Stream(0)
    parent.normal((100,))
    Stream(0, "b", 1).normal((3,))
    assert torch.equal(parent.child("a", 1).normal((4,)), alone)


def test_a_child_does_not_move_its_parent():
    left, right = Stream(5), Stream(5)
    left.child("x").normal((10,))
    assert torch.equal(left.normal((3,)), right.normal((3,)))


key = st.lists(st.integers(-5, 5) | st.text("ab12", max_size=2), min_size=1, max_size=3).map(tuple)


@given(key, key)
def test_distinct_keys_give_distinct_streams(one, other):
    assert (digest(*one) == digest(*other)) == (one == other)


def test_the_boundaries_and_types_of_a_key_count():
    assert len({digest(*k) for k in [("a", "b"), ("ab",), ("a", "", "b"), (1,), ("1",), (1, 1), (11,)]}) == 7


def test_no_collisions_over_rounds_and_clients():
    assert len({digest(0, "train", number, i) for number in range(100) for i in range(200)}) == 20_000


def test_numpy_integers_are_integers():
    assert torch.equal(Stream(np.int64(3), "x").normal((2,)), Stream(3, "x").normal((2,)))


def test_both_precisions_see_the_same_numbers(float64):
    wide = Stream(1).normal((5,))
    assert wide.dtype == torch.float64
    torch.set_default_dtype(torch.float32)
    assert torch.equal(Stream(1).normal((5,)), wide.float())


def test_draws_have_their_shapes_and_ranges():
    stream = Stream(2)
    assert stream.normal(()).shape == ()
    uniform = stream.uniform((1000,))
    assert 0 <= uniform.min() < 0.05
    assert 0.95 < uniform.max() < 1
    assert set(stream.integers(3, (100,)).tolist()) == {0, 1, 2}
    assert sorted(stream.permutation(9).tolist()) == list(range(9))
    assert stream.permutation(9).dtype == torch.int64


def test_normal_numbers_are_standard():
    drawn = Stream(3).normal((20_000,)).double()
    assert abs(drawn.mean()) < 0.03
    assert abs(drawn.std() - 1) < 0.03
