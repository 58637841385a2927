"""Pools from one's own arrays."""

import numpy as np
import pytest
import torch

from fedloom.data import from_arrays
from fedloom.errors import DataError


def test_training_rows_come_first_and_facts_follow_from_the_arrays():
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
        ({"x": np.ones((3, 2), np.int64)}, r"\(3, 2\) int64"),
        ({"x": np.zeros((3, 8, 8), np.uint8)}, r"\(N, C, H, W\)"),
        ({"x": np.zeros((3, 8, 8, 3), np.uint8)}, r"\(N, C, H, W\)"),
        ({"x": np.zeros((0, 2))}, "there must be some"),
        ({"x": np.array([["a"], ["b"], ["c"]])}, "cannot become a tensor"),
        ({"x": np.ones((2, 2))}, "2 rows of inputs and 3 labels"),
        ({"y": np.array([0.0, 1.0, 1.0])}, "integers from 0"),
        ({"y": np.array([0, -1, 1])}, "labels run from -1"),
        ({"classes": ["only"]}, "allowed is 0 to 0"),
        ({"columns": {"writer": ["a"]}}, "column 'writer'"),
        ({"x_test": np.ones((1, 2))}, "come together"),
        ({"x_test": np.ones((1, 3)), "y_test": np.array([0])}, "must agree"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(changed, message):
    with pytest.raises(DataError, match=message):
        from_arrays(**({"x": np.ones((3, 2)), "y": np.array([0, 1, 1])} | changed))
