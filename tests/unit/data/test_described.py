"""Data that are read by an existing preprocess.json: equal inputs, and data that are errors."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fedloom.config.settings import make_settings
from fedloom.data import Federation, Partition, TableOptions, load
from fedloom.data.preprocess import Given, Preprocess
from fedloom.errors import ConfigError, DataError
from fedloom.experiment.build import make_dataset, make_preprocess
from fedloom.inputs import named_tensors

ROWS = [(30 + 7 * i % 40, ("clerk", "nurse")[i % 2], ("no", "yes")[i % 3 == 0], "abc"[i % 3]) for i in range(12)]
HEADER = "age,job,smokes,label\n"


def lines(rows):
    return "".join(",".join(map(str, row)) + "\n" for row in rows)


def described(file, **settings):
    """Return the description of how the file becomes inputs, as `fedloom preprocess` writes it."""
    made = make_preprocess(make_settings({"data": {"name": "mine", "path": str(file), **settings}}))
    return Given(preprocess=Preprocess.parse(made.text(), "file"), where="data.preprocess=p.json")


@pytest.fixture
def people(tmp_path):
    file = tmp_path / "people.csv"
    file.write_text(HEADER + lines(ROWS))
    return described(file)


def table(tmp_path, text, given, **options):
    (tmp_path / "new.csv").write_text(text)
    return load("mine", tmp_path / "new.csv", table=TableOptions(**options), given=given)


def federation(pool, **options):
    """Return one client that has all examples."""
    none = np.empty(0, np.int64)
    whole = Partition(train=(np.arange(pool.n_rows),), valid=(none,), test=(none,), common=none, scheme={})
    return Federation(pool, whole, **options)


def inputs_of(pool, **options):
    return named_tensors(federation(pool, **options).rows(np.arange(pool.n_rows))[0])


def test_few_rows_become_the_inputs_and_targets_that_they_were_among_all_rows(people, tmp_path):
    whole = load("mine", tmp_path / "people.csv")
    some = table(tmp_path, HEADER + lines(ROWS[2:4]), people)  # another mean, fewer levels and classes
    for name, expected in inputs_of(whole).items():
        assert torch.equal(inputs_of(some)[name], expected[2:4])
    assert torch.equal(some.targets, whole.targets[2:4])
    assert (some.objective, some.spec, some.table) == (whole.objective, whole.spec, whole.table)
    assert federation(some).preprocess == people.preprocess
    own = inputs_of(some, normalise="own")["numbers"]  # by the two rows
    assert own[:, 0].tolist() == pytest.approx([-1, 1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEADER + "30,pilot,no,a\n", r"new\.csv, line 2, column 'job': 'pilot' is not among the levels in data\.preprocess=p\.json "
         r"\(clerk, nurse\); correct it, or make a new preprocess\.json with it"),
        ("age,smokes,label\n30,no,a\n", "new.csv lacks the column 'job' of data.preprocess=p.json"),
        ("age,job,smokes,label,size\n30,nurse,no,a,1\n", r"has the column 'size', which is not in .* remove it \(data\.drop=size\)"),
        (HEADER + "30,nurse,no,a\n41,nurse,yes,d\n", r"new\.csv, line 3, column 'label': the label 'd' is not a class of the run"),
        (HEADER + "30,nurse,no,\n", r"line 2, column 'label': no label"),
        (HEADER + "30,nurse,no,a\n,nurse,yes,b\n?,,no,b\n", r"line 3, column 'age': no value; 3 missing values in all, and "
         r".* has none to fill in; set data\.missing=drop \(rows\), or make it with data\.missing=fill"),
        (HEADER + "old,nurse,no,a\n", "line 2, column 'age': 'old' is not a finite number"),
    ],
)  # fmt: skip
def test_values_that_do_not_fit_are_refused_with_their_place(people, tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        table(tmp_path, text, people)


def test_rows_can_be_dropped_and_columns_left_out(people, tmp_path):
    text = "age,job,smokes,label,size\n30,nurse,no,a,1\n,nurse,yes,b,2\n41,?,no,c,3\n35,clerk,no,c,3\n"
    pool = table(tmp_path, text, people, missing="drop", drop=("size",))
    assert pool.inputs["numbers"].tolist() == [[30, 0], [35, 0]]
    assert pool.targets.tolist() == [0, 2]


def test_unknown_levels_can_be_accepted(people, tmp_path, caplog):
    pool = table(tmp_path, HEADER + "30,pilot,no,a\n31,nurse,no,b\n", replace(people, accepts_unknown=True))
    assert pool.inputs["categories"].tolist() == [[0], [2]]
    assert "column 'job': 'pilot' did not occur in training; it counts as unknown" in caplog.text


def test_splits_and_owners_are_read_as_always(people, tmp_path):
    text = "split,client," + HEADER + "test,x,30,nurse,no,a\ntrain,y,31,clerk,no,b\ntrain,x,41,nurse,yes,c\n"
    pool = table(tmp_path, text, people)
    assert (pool.n_train, pool.columns["client"].tolist()) == (2, ["y", "x", "x"])
    assert pool.inputs["numbers"][:, 0].tolist() == [31, 41, 30]


def test_numbers_as_targets_keep_their_mean_and_deviation(tmp_path):
    file = tmp_path / "houses.csv"
    file.write_text("size,price\n" + lines((i % 5, 10 * (i % 5) + i) for i in range(20)))
    given = described(file, label="price", task="regression")
    whole = load("mine", file, task="regression", table=TableOptions(label="price"))
    (tmp_path / "new.csv").write_text("price,size\n" + lines([(22, 2)]))
    some = load("mine", tmp_path / "new.csv", given=given)
    assert torch.equal(some.targets, whole.targets[2:3])
    assert some.objective == whole.objective


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label": "job"}, r"data\.label=job: data\.preprocess=.*p\.json says how the data are read; remove data\.label"),
        ({"missing": "fill"}, r"data\.missing=fill: .* remove data\.missing"),
        ({"columns": "age"}, r"data\.columns=age: .* remove data\.columns"),
        ({"text": "job"}, r"data\.text=job: .* remove data\.text"),
        ({"task": "regression"}, r"data\.task=regression: .* remove data\.task"),
        ({"image_size": 8}, r"data\.image_size=8: .* remove data\.image_size"),
        ({"classes": "c,b,a"}, r"data\.classes=c,b,a: data\.preprocess=.* has the order of the classes"),
        ({"factor": "code"}, r"data\.factor=code: changes the images, so data\.preprocess does not fit"),
        ({"split": "job"}, "is not a split"),
        ({"split": "part"}, "data.split=part: people.csv has no such column"),
        ({"preprocess": "absent.json"}, r"absent\.json cannot be read"),
    ],
)  # fmt: skip
def test_options_that_the_file_answers_are_refused(people, tmp_path, settings, message):
    (tmp_path / "p.json").write_text(people.preprocess.text())
    values = {"name": "mine", "path": str(tmp_path / "people.csv"), "preprocess": str(tmp_path / "p.json"), **settings}
    with pytest.raises((DataError, ConfigError), match=message):
        make_dataset(make_settings({"data": values}))


def test_scaling_comes_from_the_file(people, tmp_path):
    pool = load("mine", tmp_path / "people.csv", given=people)
    with pytest.raises(DataError, match=r"data\.normalise=standard: .* remove data\.normalise, or use own"):
        inputs_of(pool, normalise="standard")
    owners = federation(pool, normalise="own").preprocess
    pool = load("mine", tmp_path / "people.csv", given=Given(preprocess=owners, where="p"))
    with pytest.raises(DataError, match="has a scaling for each client of another run"):
        inputs_of(pool)
    with pytest.raises(ConfigError, match=r"data\.normalise=own: each client computes its own scaling"):
        described(tmp_path / "people.csv", normalise="own")


def test_texts_keep_their_vocabulary_and_length(tmp_path):
    file = tmp_path / "reviews.csv"
    file.write_text("note,label\n" + lines([("good film", "a"), ("bad film", "b")] * 3))
    given = described(file, text="note", min_count=1)
    (tmp_path / "new.csv").write_text("label,note,more\n" + lines([("b", "zebra film film", 1), ("a", "good", 2)]))
    pool = load("mine", tmp_path / "new.csv", given=given)
    assert given.preprocess.coder.words == ("film", "bad", "good")
    assert pool.inputs.tolist() == [[1, 4], [6, 0]]
    assert pool.targets.tolist() == [1, 0]
    (tmp_path / "texts/b").mkdir(parents=True)
    (tmp_path / "texts/b/1.txt").write_text("bad")
    folder = load("mine", tmp_path / "texts", given=given)
    assert (folder.inputs.tolist(), folder.targets.tolist()) == ([[5, 0]], [1])
    (tmp_path / "new.csv").write_text("label,note\nb,bad\na,\n")
    with pytest.raises(DataError, match="line 3, column 'note': no text"):
        load("mine", tmp_path / "new.csv", given=given)


def test_blocks_of_text_keep_their_vocabulary_and_length(tmp_path):
    file = tmp_path / "posts.csv"
    file.write_text("client,post\n" + lines([("x", "a b c d e f"), ("y", "b c d e f a")] * 2))
    settings = {"text": "post", "task": "language", "tokens": "words", "min_count": 1, "length": 2}
    whole = make_dataset(make_settings({"data": {"name": "mine", "path": str(file), **settings}}))
    again = load("mine", file, given=described(file, **settings))
    assert torch.equal(again.inputs, whole.inputs)
    assert torch.equal(again.targets, whole.targets)
    assert (again.n_train, again.objective) == (whole.n_train, whole.objective)


def test_pictures_and_arrays(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLOOM_CACHE", str(tmp_path / "cache"))
    for folder, kinds, size in (("all", ("cat", "dog", "owl"), 6), ("some", ("dog",), 9), ("new", ("fox",), 6)):
        for n, kind in enumerate(kinds * 4):
            (tmp_path / folder / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((size, size), 20 * n, np.uint8)).save(tmp_path / folder / kind / f"{n}.png")
    given = described(tmp_path / "all", image_size=4)
    pool = load("mine", tmp_path / "some", given=given)
    assert (pool.input_shape, pool.targets.tolist(), pool.classes) == ((1, 4, 4), [1] * 4, ("cat", "dog", "owl"))
    assert inputs_of(pool)[""].min() == -1
    with pytest.raises(DataError, match="the label 'fox' is not a class of the run"):
        load("mine", tmp_path / "new", given=given)
    x = np.arange(12.0).reshape(6, 2)
    np.savez(tmp_path / "a.npz", x=x, y=np.array(["p", "q", "r"] * 2))
    np.savez(tmp_path / "b.npz", x=x[:3], y=np.array(["r", "r", "q"]))
    np.savez(tmp_path / "c.npz", x=x[:, :1], y=np.array(["p", "q", "r"] * 2))
    given = described(tmp_path / "a.npz", normalise="standard")
    pool = load("mine", tmp_path / "b.npz", given=given)
    assert pool.targets.tolist() == [2, 2, 1]
    expected = torch.from_numpy(((x - x.mean(0)) / x.std(0))[:3]).float()
    assert torch.allclose(inputs_of(pool)[""], expected, atol=1e-6)
    for file, message in (
        ("c.npz", r"data=mine: inputs are number \(1,\), but those of .* are number \(2,\)"),
        ("some", r"inputs are picture \(1, 9, 9\), but"),
    ):
        with pytest.raises(DataError, match=message):
            load("mine", tmp_path / file, given=given)


def test_a_table_is_no_picture(tmp_path, people):
    pool = load("digits", rows=20)
    given = Given(preprocess=pool.preprocess(), where="p.json")
    with pytest.raises(DataError, match=r"people\.csv is a table, but the inputs of p\.json are picture"):
        load("mine", tmp_path / "people.csv", given=given)
    content = json.loads(people.preprocess.text())
    assert content["data"] == "mine"
