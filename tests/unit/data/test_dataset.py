"""Pools from a user's arrays."""

import numpy as np
import pytest
import torch

from fedloom.data import Federation, from_arrays, partition
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
        ({"x": np.ones((3, 2), np.uint8)}, "for token ids, set kind='token'"),
        ({"x": np.zeros((3, 2, 8, 8), np.uint8)}, r"\(N, C, H, W\)"),
        ({"x": np.zeros((3, 8, 8, 5), np.uint8)}, r"\(N, C, H, W\)"),
        ({"y": np.array([1, 2, 3])}, r"labels run from 1 to 3; subtract 1, or name all classes"),
        ({"x": np.zeros((0, 2))}, "it must be"),
        ({"x": np.array([["a"], ["b"], ["c"]])}, "holds text; convert"),
        ({"x": np.ones((2, 2))}, "2 inputs and 3 labels"),
        ({"y": np.array([0.5, 1.0, 1.0])}, "integers from 0"),
        ({"y": np.array([0, -1, 1])}, "labels run from -1"),
        ({"classes": ["only"]}, "they must be from 0 to 0"),
        ({"columns": {"writer": ["a"]}}, "column 'writer'"),
        ({"x_test": np.ones((1, 2))}, "must be given together"),
        ({"x_test": np.ones((1, 3)), "y_test": np.array([0])}, "must match"),
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


def test_float_images_from_0_to_1_are_scaled_like_bytes(caplog):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 4, 4)).astype(np.uint8)
    y = np.array([0, 1, 0, 1])
    pools = from_arrays(pixels, y), from_arrays((pixels / 255).astype(np.float32), y)
    assert "x holds images with values from 0 to 1; they are scaled to [-1, 1]" in caplog.text
    (a, _), (b, _) = (Federation(pool, partition(pool, 1, scheme="iid", min_examples=2)).train(0) for pool in pools)
    torch.testing.assert_close(a, b)
    assert from_arrays(pixels / 255 - 0.5, y).normalise is None
    assert from_arrays(pixels.reshape(4, -1) / 255, y).normalise is None


def test_tables_of_pandas_become_numbers_and_categories():
    import pandas as pd

    table = pd.DataFrame({
        "age": [30, 41, 52, 63, 74], "smokes": [True, False, True, False, True], "city": list("babab"),
        "size": pd.Categorical(list("SLSLL"), ["S", "M", "L"]), "weight": pd.array([1.5, 2, 3, 4, 5], "Float64"),
    })  # fmt: skip
    before = table.copy(deep=True)
    data = from_arrays(table[:4], [0, 1, 1, 0], table[4:], [1])
    pd.testing.assert_frame_equal(table, before)
    assert data.inputs["numbers"].tolist() == [[30, 1, 1.5], [41, 0, 2], [52, 1, 3], [63, 0, 4], [74, 1, 5]]
    assert data.inputs["categories"].tolist() == [[2, 1], [1, 3], [2, 1], [1, 3], [2, 3]]
    assert (data.spec.of("category").levels, data.normalise, data.n_train) == ((2, 3), "standard", 4)
    data.inputs["numbers"].zero_()
    assert table["age"].tolist() == [30, 41, 52, 63, 74]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"a": [1.0, np.nan, 2.0]}, r"x, row 1, column 'a': no value; 1 missing values in the column; fill or drop"),
        ({"a": ["x", "y", "z"]}, "column 'a' has 3 different values in 3 rows, which looks like free text.*; drop it"),
        ({"a": [1, "x", 2.5]}, "column 'a' has values of several types"),
        ({"a": np.array(["2020-01-01", "2021-01-01", "2022-01-01"], "M8[s]")}, "column 'a' has dates"),
        ({"a": [[1], [2], [3]]}, "column 'a' has type list"),
        ({}, r"x has shape \(0, 0\)"),
    ],
)
def test_columns_of_pandas_that_do_not_fit_are_refused(columns, message):
    import pandas as pd

    with pytest.raises(DataError, match=message) as refused:
        from_arrays(pd.DataFrame(columns), [0, 1, 1])
    assert "\n" not in str(refused.value)


def test_tables_for_training_and_test_have_the_same_columns():
    import pandas as pd

    table = pd.DataFrame({"a": [1.0, 2.0], "b": [1.0, 3.0]})
    with pytest.raises(DataError, match="x_test must have the same columns as x: a, b"):
        from_arrays(table, [0, 1], table[["b", "a"]], [0, 1])
    with pytest.raises(DataError, match="must both be tables"):
        from_arrays(table, [0, 1], table.to_numpy(), [0, 1])
    with pytest.raises(DataError, match=r"y_test has type .* they must match"):
        from_arrays(table, [0, 1], table, ["0", "1"])


def test_labels_that_look_like_numbers_are_refused(caplog):
    x = np.zeros((60, 2), np.float32)
    with pytest.raises(DataError, match=r"y has 60 different values .* set task='regression', or name the classes"):
        from_arrays(x, np.arange(60))
    with pytest.raises(DataError, match=r"up to 1,970 in 60 examples, which is too many for classes"):
        from_arrays(x, np.repeat([0, 1970], 30))
    assert from_arrays(x, np.arange(60), classes=[f"c{i}" for i in range(60)]).n_classes == 60
    assert from_arrays(x, np.array([b"no", b"yes"] * 30)).classes == ("no", "yes")
    assert from_arrays(x, torch.zeros(60, dtype=torch.bfloat16), task="regression").objective.mean == (0.0,)


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
    assert "negative values; it is used as numbers" in caplog.text


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        (["a b", None, "d"], [0, 1, 0], {}, r"x has texts, but also None; give a text for every example"),
        (
            np.array([[1.0, True], [2.0, False]], object),
            [0, 1],
            {},
            r"x holds text or other objects; .*\.astype\(float\)",
        ),
        ([[1, 2], [3]], [0, 1], {}, "x has rows of different lengths; pad token ids with 0"),
        (np.ones((2, 1)), [["hot"], []], {"task": "multilabel"}, "y has rows of different lengths"),
        (np.ones((2, 1)), ["1.5", "2"], {"task": "regression"}, "y holds text"),
        (np.ones((2, 1)), np.array(["2020", "2021"], "M8[Y]"), {"task": "regression"}, "y holds dates"),
        (np.ones(2), [0, 1], {}, r"x has shape \(2,\).* reshape it to \(N, 1\)"),
        (np.ones((2, 1), complex), [0, 1], {}, "x is .* complex128; split it into real and imaginary numbers"),
        (np.ones((2, 1)), [0, 1], {"loss": "huber"}, "loss=huber: applies only to task=regression"),
        (np.ones((2, 1)), [0, 1], {"task": "regression", "delta": 2.0}, "delta=2: applies only to loss=huber"),
        (
            np.ones((2, 1)),
            [0, 1],
            {"task": "regression", "classes": "price"},
            r"classes='price': must be a list .*\['price'\]",
        ),
        (
            np.ones((2, 1)),
            [0, 1],
            {"vocabulary": 3},
            r"vocabulary=3: needs token inputs, but the inputs are number \(1,\)",
        ),
        ([[1, 6], [2, 3]], [0, 1], {"vocabulary": 3}, "vocabulary=3: too small for token 6; set at least 7"),
        (
            [[1, 2], [2, 1]],
            [[2, 5], [1, 0]],
            {"task": "language", "vocabulary": 3},
            "too small for token 5; set at least 6",
        ),
        (
            [[1, 2], [2, 1]],
            [[2, 5], [1, 0]],
            {"vocabulary": 0, "task": "language"},
            "vocabulary=0: must be an integer of at least 1",
        ),
        (
            [[1, 2, 1], [2, 1, 1]],
            [[2, 1], [1, 1]],
            {"task": "language"},
            r"x has shape \(2, 3\) and y \(2, 2\); .*one next token per",
        ),
    ],
)
def test_arrays_that_do_not_fit_are_refused_with_the_remedy(x, y, options, message):
    with pytest.raises(DataError, match=message) as refused:
        from_arrays(x, y, **options)
    assert "\n" not in str(refused.value)


def test_labels_of_a_multilabel_task_may_be_floats():
    pool = from_arrays(np.ones((2, 1)), np.array([[0.0, 1.0], [1.0, 1.0]]), task="multilabel")
    assert pool.targets.tolist() == [[0, 1], [1, 1]]
    with pytest.raises(DataError, match=r"must be .N, L. of 0 and 1"):
        from_arrays(np.ones((2, 1)), np.array([[0.5, 1.0], [1.0, 1.0]]), task="multilabel")


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
    with pytest.raises(DataError, match=r"kind has the unknown input 'idz' .did you mean 'ids'"):
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
    with pytest.raises(DataError, match="needs classes, but the task is regression"):
        _ = data.labels


def test_targets_take_the_names_of_their_columns():
    import pandas as pd

    x, table = np.zeros((3, 2), np.float32), pd.DataFrame({"rent": [1.0, 2.0, 3.0], "size": [3.0, 1.0, 2.0]})
    assert from_arrays(x, table, task="regression").classes == ("rent", "size")
    assert from_arrays(x, table["rent"], task="regression").classes == ("rent",)
    assert from_arrays(x, table, task="regression", classes=["a", "b"]).classes == ("a", "b")
