"""Raw values of new examples become exactly the inputs of training: tables, images, arrays and targets."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from PIL import Image

from fedloom.data import Federation, TableOptions, TextOptions, from_arrays, load, partition
from fedloom.data.preprocess import Given, Preprocess
from fedloom.data.raw_targets import stored_examples
from fedloom.errors import DataError
from fedloom.inputs import named_tensors

numbers = st.one_of(
    st.floats(-1e6, 1e6, allow_nan=False).map(repr), st.integers(-999, 999).map(str), st.sampled_from(["", "?", "NA", "1e3", "+.5", " 7 "])
)  # fmt: skip
words = st.sampled_from(["nurse", "clerk", "NA", "None", "", "?", "Ünal", 'say "hi"', "a,b", " x "])
codes = st.sampled_from(["01", "02", "10", "NA", ""])
truths = st.sampled_from(["yes", "no", "", "?"])
notes = st.sampled_from(["", "good day", "Good,\nbad", "?", "ÜNAL &amp; 3rd", "a b c d e"])


def same(a, b):
    a, b = named_tensors(a), named_tensors(b)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name], b[name])


@given(st.lists(st.tuples(numbers, words, codes, truths, notes), min_size=40, max_size=60), st.booleans())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_training_file_becomes_the_training_inputs_bit_for_bit(tmp_path, rows, with_text):
    """Numbers, categories, missing values and texts: in predictions, and in a run with the same preprocess.json."""
    table = pd.DataFrame(rows, columns=["size", "job", "code", "smokes", "note"])
    table["label"] = ["a", "b"] * (len(rows) // 2) + ["a"] * (len(rows) % 2)
    file = tmp_path / "mine.csv"
    table.to_csv(file, index=False)
    columns = ("size", "job", "code", "smokes")
    options = TableOptions(missing="fill", columns=columns if with_text else (), drop=() if with_text else ("note",))
    texts = TextOptions(text=("note",), min_count=1) if with_text else None
    try:
        pool = load("mine", file, table=options, texts=texts)
    except DataError:  # such as a column with one value
        reject()
    data = Federation(pool, partition(pool, 2, scheme="iid", min_examples=2))
    preprocess = Preprocess.parse(data.preprocess.text(), "file")
    expected = data.rows(np.arange(len(rows)))[0]
    same(preprocess.encode(file), expected)
    same(preprocess.encode(table.iloc[:, ::-1]), expected)  # columns by name, in any order
    stored, targets = stored_examples(preprocess, file)
    same(stored, pool.inputs)
    assert torch.equal(targets, pool.targets)
    again = load("mine", file, given=Given(preprocess=preprocess, where="p.json"))
    data = Federation(again, partition(again, 2, scheme="iid", min_examples=2))
    same(data.rows(np.arange(len(rows)))[0], expected)
    assert torch.equal(again.targets, pool.targets)
    assert data.preprocess == preprocess


@pytest.fixture
def people(tmp_path):
    rows = "".join(
        f"{30 + i},{'nurse' if i % 3 else 'clerk'},{'yes' if i % 2 else 'no'},{'ab'[i % 2]}\n"
        for i in (5, 2, 7, 1, 9, 4)
    )
    (tmp_path / "people.csv").write_text("age,job,smokes,label\n" + rows)
    return load("people", tmp_path / "people.csv").preprocess()


def test_one_row_is_a_batch_of_one(people, caplog):
    found = people.stored({"job": "pilot", "age": 41, "smokes": True, "more": 1})
    assert found["numbers"].tolist() == [[41, 1]]
    assert found["categories"].tolist() == [[0]]
    assert "column 'job': 'pilot' did not occur in training" in caplog.text
    assert "columns more are not used" in caplog.text
    row = pd.DataFrame({"age": [1, 2], "smokes": ["No", "yes"], "job": ["nurse", None]}).iloc[0]
    assert people.stored(row)["categories"].tolist() == [[2]]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"age": 1, "smokes": "no"}, "the column 'job' is missing"),
        ({"age": "old", "smokes": "no", "job": "nurse"}, "row 0, column 'age': 'old' is not a finite number"),
        ({"age": None, "smokes": "no", "job": "nurse"}, "column 'age': no value; .* trained without any"),
        ({"age": np.inf, "smokes": "no", "job": "nurse"}, "column 'age': 'inf' is not a finite number"),
        ({"age": 1e39, "smokes": "no", "job": "nurse"}, "too large for float32"),
        ({"age": [1, 2], "smokes": ["no"], "job": ["nurse"]}, "do not form a table"),
        (np.zeros((2, 2)), "give a table with the columns of training"),
        (3, "are int; give a table"),
        ("absent.csv", r"the file absent\.csv does not exist"),
        (pd.DataFrame({"age": []}), "has no rows"),
    ],
)
def test_tables_that_do_not_fit_are_refused(people, raw, message):
    with pytest.raises(DataError, match=message):
        people.stored(raw)


def test_pictures(tmp_path, caplog):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 6, 3)).astype(np.uint8)
    pool = from_arrays(pixels, np.array([0, 1, 0, 1]), classes=["cat", "dog"])
    preprocess, expected = pool.preprocess(), pool.inputs
    files = []
    for i, picture in enumerate(pixels):
        (tmp_path / ["cat", "dog"][i % 2]).mkdir(exist_ok=True)
        files.append(tmp_path / ["cat", "dog"][i % 2] / f"{i}.png")
        Image.fromarray(picture).save(files[-1])
    caplog.clear()
    for raw in (
        pixels,
        files,
        [str(f) for f in files],
        list(pixels),
        [Image.open(f) for f in files],
        expected,
        pixels / 1.0,
    ):
        same(preprocess.stored(raw), expected)
    for raw in (pixels[0], files[0], Image.fromarray(pixels[0]), expected[0]):
        same(preprocess.stored(raw), expected[:1])
    assert not caplog.text
    inputs, targets = stored_examples(preprocess, tmp_path)
    same(inputs, expected[[0, 2, 1, 3]])
    assert targets.tolist() == [0, 0, 1, 1]
    grey = pixels[..., 0]
    same(preprocess.stored(grey[0]), expected[:1, :1].expand(1, 3, 6, 6))
    for raw, message in (
        (pixels[:, :5], "is 6 x 5 pixels, but the run's pictures are 6 x 6"),
        (pixels / 255, "multiply values from 0 to 1 by 255"),
        ([], "empty list"),
        (tmp_path / "absent.png", "cannot be read as a picture"),
        (__file__, "Pillow cannot read this image"),
        (np.zeros((2, 2, 2, 2, 2), np.uint8), "have shape"),
    ):
        with pytest.raises(DataError, match=message):
            preprocess.stored(raw)


def test_grey_pictures_and_sizes(caplog):
    grey = np.random.default_rng(0).integers(0, 256, (4, 6, 6)).astype(np.uint8)
    preprocess = from_arrays(grey, np.arange(4) % 2).preprocess()
    same(preprocess.stored(grey), torch.from_numpy(grey[:, None]))
    same(preprocess.stored(grey[1]), torch.from_numpy(grey[1:2, None]))
    caplog.clear()
    assert preprocess.stored(np.zeros((6, 6, 3), np.uint8)).shape == (1, 1, 6, 6)
    assert "has colours, but the run's pictures are grey" in caplog.text
    bigger = load("digits", image_size=12, rows=20).preprocess()
    assert bigger.stored(np.zeros((30, 20, 3), np.uint8)).shape == (1, 1, 12, 12)


def test_arrays(tmp_path):
    rng = np.random.default_rng(0)
    x, ids = rng.normal(size=(6, 2, 5)), rng.integers(0, 9, (6, 4))
    y = np.arange(6) % 2
    preprocess = from_arrays(x, y).preprocess()
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "x.npz", x=x, y=y)
    for raw in (x, torch.from_numpy(x), tmp_path / "x.npy", str(tmp_path / "x.npz")):
        same(preprocess.stored(raw), torch.from_numpy(x))
    same(preprocess.stored(x[2]), torch.from_numpy(x[2:3]))
    named = from_arrays({"x": x, "ids": ids}, y)
    same(named.preprocess().stored({"x": x, "ids": ids}), named.inputs)
    same(named.preprocess().stored({"x": x[0], "ids": ids[0]}), {k: v[:1] for k, v in named.inputs.items()})
    pair = from_arrays((x, ids), y)
    same(pair.preprocess().stored((x, ids)), pair.inputs)
    for made, raw, message in (
        (preprocess, x[:, :, :4], "as in training"),
        (preprocess, {"x": x}, "must be number"),
        (named.preprocess(), {"x": x, "ids": ids + 20}, "token values must be below 9"),
        (named.preprocess(), {"x": x}, "have the names x"),
        (named.preprocess(), {"x": x, "ids": ids[:2]}, "different numbers of examples"),
        (preprocess, tmp_path / "x.csv", "unknown kind of file"),
        (preprocess, [[1], [1, 2]], "cannot be converted"),
    ):
        with pytest.raises(DataError, match=message):
            made.encode(raw)


def test_float_images_with_channels_last():
    x = np.random.default_rng(0).random((4, 5, 6, 3)).astype(np.float32) * 3
    pool = from_arrays(x, np.arange(4) % 2)
    same(pool.preprocess().stored(x), pool.inputs)
    same(pool.preprocess().stored(x[0]), pool.inputs[:1])


def test_targets(people, tmp_path):
    other = tmp_path / "other.csv"
    other.write_text("label,age,job,smokes\nb,1,nurse,no\nA,2,nurse,yes\n")
    assert stored_examples(people, other)[1].tolist() == [1, 0]
    third = tmp_path / "third.csv"
    third.write_text(
        "age,job,label\n" + "".join(f"{v},nurse,{c}\n" for v, c in ((3, "a"), (1, "b"), (2, "a"), (5, "b")))
    )
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 3))
    plain = from_arrays(x, np.array([1.0, 2, 3, 4, 5, 6]), task="regression")
    same(stored_examples(plain.preprocess(), (x, [1, 2, 3, 4, 5, 6]))[1], plain.targets)
    swapped = from_arrays(x, np.array([6.0, 2, 3, 4, 5, 1]), task="regression")
    found = stored_examples(plain.preprocess(), swapped)[1]
    same(found[[5, 1, 2, 3, 4, 0]], plain.targets)
    labels = from_arrays(x, np.eye(3)[[0, 1, 2, 0, 1, 2]], task="multilabel")
    same(stored_examples(labels.preprocess(), (x, labels.targets))[1], labels.targets)
    for preprocess, data, message in (
        (
            people,
            {"age": [1], "job": ["nurse"], "smokes": ["no"], "label": ["c"]},
            "the label 'c' is not a class of the run",
        ),
        (people, {"age": [1], "job": ["nurse"], "smokes": ["no"]}, "the column 'label' is missing"),
        (plain.preprocess(), (x, [1, 2]), "6 inputs, but 2 targets"),
        (plain.preprocess(), (x, np.zeros((6, 2))), "2 targets per example"),
        (plain.preprocess(), (x, ["a"] * 6), "must be numbers"),
        (plain.preprocess(), x, "must be inputs and targets"),
        (people, load("people", third), "not prepared as in training"),
        (people, tmp_path, "folders named by class fit only pictures"),
    ):
        with pytest.raises(DataError, match=message):
            stored_examples(preprocess, data)
