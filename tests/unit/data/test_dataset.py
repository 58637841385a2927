"""Pools from a user's arrays."""

import numpy as np
import pytest
import torch

from fedloom.data import from_arrays
from fedloom.errors import DataError


def test_training_examples_come_first_and_facts_follow_from_the_arrays():
    x, y = np.zeros((4, 3, 8, 8), np.uint8), np.array([0, 2, 1, 2])
    pool = from_arrays(x, y, x[:1] + 7, torch.tensor([1]), columns={"writer": list("aabbc")})
    assert (pool.n_rows, pool.n_train, pool.n_classes, pool.input_shape) == (5, 4, 3, (3, 8, 8))
    assert pool.labels.tolist() == [0, 2, 1, 2, 1]
    assert pool.labels.dtype == torch.int64
    assert pool.images[4].eq(7).all()
    assert pool.classes == ("0", "1", "2")
    assert pool.columns["writer"][4] == "c"


def test_own_features_keep_their_type_and_read_only_arrays_are_fine():
    x = np.frombuffer(np.ones(6).tobytes()).reshape(3, 2)
    pool = from_arrays(x, np.array([0, 1, 0]), classes=["no", "yes", "unseen"])
    assert pool.images.dtype == torch.float64
    assert (pool.input_shape, pool.n_classes) == ((2,), 3)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": np.full((3, 2), np.nan)}, "NaN or infinite"),
        ({"x": np.full((3, 2), -1)}, "has the value -1"),
        ({"x": np.ones((3, 2), np.uint8)}, "kind='token' for token ids"),
        ({"x": np.zeros((3, 8, 8), np.uint8)}, r"\(N, C, H, W\)"),
        ({"x": np.zeros((3, 8, 8, 4), np.uint8)}, r"\(N, C, H, W\)"),
        ({"y": np.array([1, 2, 3])}, r"labels run from 1 to 3; subtract 1, or name all classes"),
        ({"x": np.zeros((0, 2))}, "it must be"),
        ({"x": np.array([["a"], ["b"], ["c"]])}, "cannot be converted to a tensor"),
        ({"x": np.ones((2, 2))}, "2 inputs and 3 labels"),
        ({"y": np.array([0.0, 1.0, 1.0])}, "integers from 0"),
        ({"y": np.array([0, -1, 1])}, "labels run from -1"),
        ({"classes": ["only"]}, "they must be 0 to 0"),
        ({"columns": {"writer": ["a"]}}, "column 'writer'"),
        ({"x_test": np.ones((1, 2))}, "must be given together"),
        ({"x_test": np.ones((1, 3)), "y_test": np.array([0])}, "must agree"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(changed, message):
    with pytest.raises(DataError, match=message):
        from_arrays(**({"x": np.ones((3, 2)), "y": np.array([0, 1, 1])} | changed))


def test_a_class_without_examples_is_logged_and_named_classes_may_be_empty(caplog):
    x = np.zeros((3, 2), np.float32)
    assert from_arrays(x, np.array([0, 3, 1])).n_classes == 4
    assert "no example has label 2; classes run from 0 to 3" in caplog.text
    caplog.clear()
    assert from_arrays(x, np.array([1, 2, 1]), classes=["none", "one", "two"]).n_classes == 3
    assert not caplog.text


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_channels_last_are_moved_first_and_logged(dtype, caplog):
    x = np.random.default_rng(0).integers(0, 256, (3, 8, 6, 3)).astype(dtype)
    pool = from_arrays(x, np.array([0, 1, 0]))
    assert pool.input_shape == (3, 8, 6)
    assert np.array_equal(pool.images.numpy(), x.transpose(0, 3, 1, 2))
    assert "from channels last to channels first" in caplog.text


def test_float_pixels_become_bytes_and_other_floats_stay(caplog):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 1, 8, 8)).astype(np.float64)
    pool = from_arrays(pixels, np.array([0, 1, 0]), pixels + 0.0, np.array([1, 1, 0]))
    assert pool.images.dtype == torch.uint8
    assert np.array_equal(pool.images[:3].numpy(), pixels)
    assert "converted to uint8" in caplog.text
    for other in (pixels / 255, pixels + 0.5, pixels * 2, pixels - 128):
        assert from_arrays(other, np.array([0, 1, 0])).images.dtype == torch.float64


@pytest.mark.parametrize("kind", ["array", "read-only", "tensor"])
@pytest.mark.parametrize("dtype", ["uint8", "float32", "float64"])
def test_a_pool_shares_no_memory_with_the_callers_arrays(kind, dtype):
    x = np.random.default_rng(0).integers(0, 200, (6, 1, 8, 8)).astype(dtype)
    x.flags.writeable = kind != "read-only"
    pool = from_arrays(torch.from_numpy(x) if kind == "tensor" else x, np.arange(6) % 2)
    before = pool.images.clone()
    if kind != "read-only":
        x += 1
    assert torch.equal(pool.images, before)
    pool.images.zero_()
    assert x.any()
