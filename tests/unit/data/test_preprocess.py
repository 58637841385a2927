"""The description of the conversion of raw values to model inputs: its file, and the content that is refused when it is read."""

import json

import numpy as np
import pytest
import torch

from fedloom.data import Federation, TableOptions, from_arrays, load, partition
from fedloom.data.preprocess import PREPROCESS, Preprocess
from fedloom.errors import DataError

ROWS = "age,job,smokes,label\n30,nurse,yes,a\n,clerk,no,b\n41,,yes,a\n25,nurse,no,b\n28,clerk,yes,a\n33,nurse,no,b\n"


@pytest.fixture
def people(tmp_path):
    file = tmp_path / "people.csv"
    file.write_text(ROWS)
    return load("people", file, table=TableOptions(missing="fill", missing_values=("-9",)))


def federation(pool, **options):
    return Federation(pool, partition(pool, 1, scheme="iid", min_examples=2), **options)


def pools():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(12, 2, 5)), np.arange(12) % 3
    ids = rng.integers(0, 9, (12, 4))
    yield from_arrays(x, y, classes=["a", "b", "c"])
    yield from_arrays(rng.integers(0, 256, (12, 3, 4, 4)).astype(np.uint8), y)
    kinds = {"codes": "category", "x": "number"}
    yield from_arrays({"x": x[:, 0], "codes": ids % 3}, rng.normal(size=(12, 2)), task="regression", kind=kinds)
    yield from_arrays(ids, np.stack([y == 0, y == 1], 1), task="multilabel")
    yield from_arrays(ids[:, :-1], ids[:, 1:], task="language", vocabulary=11)


@pytest.mark.parametrize("which", range(5))
@pytest.mark.parametrize("normalise", [None, "standard"])
def test_the_file_reads_back_as_written_and_prepares_inputs_bit_for_bit(which, normalise):
    pool = list(pools())[which]
    if normalise and not pool.spec.kinds & {"picture", "number"}:
        normalise = None
    data = federation(pool, normalise=normalise)
    back = Preprocess.parse(data.preprocess.text(), "file")
    assert back == data.preprocess
    assert back.objective == pool.objective
    assert back.spec == pool.spec
    expected, found = data.rows(np.arange(12))[0], back.prepared(pool.inputs)
    pairs = [(expected, found)] if torch.is_tensor(expected) else [(expected[k], found[k]) for k in expected]
    for a, b in pairs:
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_tables_record_columns_levels_and_fill_values(people):
    numbers, categories = federation(people).preprocess.inputs
    assert [c.model_dump() for c in numbers.columns] == [
        {"name": "age", "words": (), "fill": pytest.approx(31.4), "marked": True},
        {"name": "smokes", "words": ("no", "yes"), "fill": 0.5, "marked": False},
    ]
    assert [(c.name, c.levels) for c in categories.columns] == [("job", ("", "clerk", "nurse"))]
    assert len(numbers.scale) == 3
    assert people.table.model_dump(exclude_none=True) == {
        "labels": ("label",), "others": ("label",), "missing_values": ("-9",),
    }  # fmt: skip


def test_each_client_can_have_its_own_scaling(people):
    part = people.preprocess().inputs[0]
    stacked = part.scaled((torch.arange(9.0).reshape(3, 3), torch.zeros(3, 3)), own=3)
    preprocess = people.preprocess().model_copy(update={"inputs": (stacked, *people.preprocess().inputs[1:])})
    preprocess = Preprocess.parse(preprocess.text(), "file")
    stored = {"numbers": torch.ones(1, 3), "categories": torch.ones(1, 1, dtype=torch.uint8)}
    assert preprocess.prepared(stored)["numbers"].tolist() == [[0, 1, 2]]
    assert preprocess.prepared(stored, 1)["numbers"].tolist() == [[6, 7, 8]]


def test_resizing_is_recorded():
    assert load("digits", image_size=12, rows=20).preprocess().inputs[0].resize
    assert not load("digits", rows=20).preprocess().inputs[0].resize


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format=9), "is not a preprocess.json of format 1"),
        (lambda c: c.update(more=1), "'more' is malformed"),
        (lambda c: c["inputs"].clear(), "'inputs' is malformed"),
        (lambda c: c["inputs"].append(c["inputs"][0]), "two inputs have the same name"),
        (lambda c: c["inputs"][0].update(shape=[9], scale=[1], shift=[0]), "has 3 columns for the shape"),
        (lambda c: c["inputs"][0].update(scale=[1, 2]), "has 2 scales"),
        (
            lambda c: c["inputs"][0]["columns"][0].update(fill="x"),
            r"'inputs\.0\.number\.columns\.0\.fill' is malformed",
        ),
        (lambda c: c["inputs"][0].update(shape=[2**40]), "is malformed"),
        (lambda c: c["inputs"][1].update(levels=[7]), "other numbers of levels than its columns"),
        (lambda c: c["objective"].update(task="guess"), "unknown task guess"),
        (lambda c: c["objective"].update(names=[1, 2]), "'objective"),
        (lambda c: c["objective"].update(extra=1), "unknown or missing keys"),
    ],
)
def test_malformed_files_are_refused_in_one_line(people, tmp_path, change, message):
    content = json.loads(federation(people).preprocess.text())
    change(content)
    (tmp_path / PREPROCESS).write_text(json.dumps(content))
    with pytest.raises(DataError, match=message) as refused:
        Preprocess.read(tmp_path / PREPROCESS)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is not a JSON file"), ("[1]", "is not a preprocess"), ("[" * 10**5, "is not a JSON")]
)
def test_files_of_another_kind_are_refused(tmp_path, text, message):
    (tmp_path / PREPROCESS).write_text(text)
    with pytest.raises(DataError, match=message):
        Preprocess.read(tmp_path / PREPROCESS)
    with pytest.raises(DataError, match="cannot be read"):
        Preprocess.read(tmp_path / "absent.json")
