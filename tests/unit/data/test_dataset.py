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
        ({"x": np.ones((3, 2), np.uint8)}, "kind='token' for token ids"),
        ({"x": np.zeros((3, 2, 8, 8), np.uint8)}, r"\(N, C, H, W\)"),
        ({"x": np.zeros((3, 8, 8, 5), np.uint8)}, r"\(N, C, H, W\)"),
        ({"y": np.array([1, 2, 3])}, r"labels run from 1 to 3; subtract 1, or name all classes"),
        ({"x": np.zeros((0, 2))}, "it must be"),
        ({"x": np.array([["a"], ["b"], ["c"]])}, "cannot be converted to a tensor"),
        ({"x": np.ones((2, 2))}, "2 inputs and 3 labels"),
        ({"y": np.array([0.5, 1.0, 1.0])}, "integers from 0"),
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


def test_integers_are_tokens_unless_some_are_negative(caplog):
    y = np.array([0, 1, 1])
    tokens = from_arrays(np.array([[1, 300], [2, 0], [3, 4]]), y)
    assert tokens.images.dtype == torch.int16  # the smallest type
    assert (tokens.spec.fields[0].kind, tokens.spec.fields[0].levels) == ("token", (301,))
    assert from_arrays(np.ones((3, 2), np.uint8), y, kind="token", vocabulary=9).spec.fields[0].levels == (9,)
    assert from_arrays(np.ones((3, 2), np.int64), y, kind="number").images.dtype == torch.float32
    numbers = from_arrays(np.array([[1, -3], [2, 0], [3, 4]]), y)
    assert (numbers.images.dtype, numbers.spec.fields[0].kind) == (torch.float32, "number")
    assert "negative values; used as numbers" in caplog.text


def test_labels_may_be_names_booleans_columns_or_whole_floats(caplog):
    x = np.zeros((3, 2), np.float32)
    assert from_arrays(x, ["b", "a", "b"]).classes == ("a", "b")
    assert from_arrays(x, ["b", "a", "b"], classes=["b", "a"]).labels.tolist() == [0, 1, 0]
    assert from_arrays(x, np.array([True, False, True])).classes == ("False", "True")
    assert from_arrays(x, np.array([[0], [1], [1]])).labels.tolist() == [0, 1, 1]
    assert from_arrays(x, np.array([0.0, 1.0, 1.0])).labels.dtype == torch.int64
    assert "y holds integers as (3,) float64; used as class labels" in caplog.text
    with pytest.raises(DataError, match="label 'c' is not one of the classes"):
        from_arrays(x, ["b", "c", "b"], classes=["b", "a"])


def test_several_inputs_keep_their_names_and_tables_are_taken():
    import pandas as pd

    y = np.array([0, 1, 1])
    data = from_arrays({"ids": np.array([[1], [2], [3]]), "age": np.array([[0.5], [1.5], [2.5]])}, y)
    assert {field.name: field.kind for field in data.spec.fields} == {"ids": "token", "age": "number"}
    assert list(from_arrays((np.zeros((3, 1)), np.ones((3, 2))), y).inputs) == ["0", "1"]
    table = from_arrays(pd.DataFrame({"a": [1.0, 2.0, 3.0], "b": [4.0, 5.0, 6.0]}), pd.Series([0, 1, 0]))
    assert table.images.tolist() == [[1, 4], [2, 5], [3, 6]]
    with pytest.raises(DataError, match=r"kind names input 'idz' .did you mean 'ids'"):
        from_arrays({"ids": np.array([[1], [2], [3]])}, y, kind={"idz": "token"})
    with pytest.raises(DataError, match="x and x_test must have the same inputs"):
        from_arrays({"ids": np.ones((3, 1))}, y, {"id": np.ones((1, 1))}, y[:1])


@pytest.mark.parametrize(
    ("task", "y", "message"),
    [
        ("regression", [1.0, np.nan, 2.0], "NaN or infinite"),
        ("regression", np.zeros((3, 2, 2)), "must be .N,. or .N, M."),
        ("multilabel", [[0, 2], [1, 0], [0, 0]], "targets must be 0 or 1"),
        ("multilabel", [0, 1, 0], "they must be .N, L. of 0 and 1"),
        ("language", [0, 1, 0], "they must be .N, T. integers"),
        ("clustering", [[0, 1]] * 3, "task=clustering: unknown"),
    ],
)
def test_targets_that_do_not_fit_their_task_are_refused(task, y, message):
    with pytest.raises(DataError, match=message):
        from_arrays(np.zeros((3, 2), np.float32), np.array(y), task=task)


def test_a_regression_is_standardised_by_its_training_targets():
    x = np.zeros((4, 2), np.float32)
    data = from_arrays(x[:2], [1.0, 3.0], x[2:], [5.0, 2.0], task="regression", classes=["age"])
    assert (data.objective.mean, data.objective.std, data.classes) == ((2.0,), (1.0,), ("age",))
    assert data.targets[:, 0].tolist() == [-1, 1, 3, 0]
    assert "1 targets; 2 train + 2 test" in repr(data)
    with pytest.raises(DataError, match="needs classes, and the task is regression"):
        _ = data.labels
