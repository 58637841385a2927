"""Users' own tables: types of columns, roles, missing values and splits, with files of a few rows."""

import csv
import gzip
import json
import logging
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fedloom
from fedloom.config.settings import make_settings
from fedloom.data import Federation, TableOptions, default_scheme, load, partition
from fedloom.data.dataset import validated
from fedloom.data.preprocess import Given
from fedloom.data.raw_targets import stored_examples
from fedloom.data.table_files import read_files
from fedloom.deploy.rows import Remote, read_own
from fedloom.errors import ConfigError, DataError
from fedloom.inputs import InputSpec
from fedloom.models.zoo import ZOO


@pytest.fixture
def table(tmp_path):
    """Return a function that writes text to a file and loads it."""

    def read(text, *, file="mine.csv", task=None, rows=None, encoding="utf-8", **options):
        (tmp_path / file).write_bytes(text.encode(encoding))
        return load("mine", tmp_path / file, task=task, rows=rows, table=TableOptions(**options))

    return read


def column(name, values, **more):
    """Return a table with one input column, and a label with two classes."""
    return f"{name},label\n" + "".join(f"{v},{'ab'[i % 2]}\n" for i, v in enumerate(values))


CATEGORIES = ["x", "y"] * 3


def test_numbers_and_categories(table, caplog):
    pool = table(
        "age,job,income\n30,nurse,low\n25,clerk,high\n41,nurse,low\n25,clerk,low\n1e2,nurse,high\n", label="income"
    )
    assert torch.equal(pool.inputs["numbers"], torch.tensor([[30.0], [25.0], [41.0], [25.0], [100.0]]))
    assert pool.inputs["categories"].tolist() == [[2], [1], [2], [1], [2]]
    assert [(f.name, f.kind, f.shape, f.levels) for f in pool.spec.fields] == [
        ("numbers", "number", (1,), ()),
        ("categories", "category", (1,), (2,)),
    ]
    assert pool.classes == ("high", "low")
    assert pool.labels.tolist() == [1, 0, 1, 1, 0]
    assert (pool.normalise, pool.n_train, pool.columns) == ("standard", 5, {})
    assert "mine.csv: 5 rows, 1 number, 1 category, label income (2 classes)" in caplog.text


def test_numbers_alone_are_one_tensor(table):
    pool = table("a,b,label\n1.5,2,x\n0,2,y\n-3,.5,x\n7,1,y\n")
    assert pool.images.dtype == torch.float32
    assert pool.images.tolist() == [[1.5, 2], [0, 2], [-3, 0.5], [7, 1]]
    assert pool.spec.is_single


def test_zip_codes_keep_their_zeros(table, caplog):
    pool = table(column("zip", ["01234", "10115"] * 3))
    assert pool.inputs["categories"].flatten().tolist() == [1, 2] * 3
    assert "column 'zip' has leading zeros (01234), so its values are used as categories" in caplog.text


def test_namibia_and_the_word_none_are_values(table):
    pool = table(column("country", ["NA", "DE", "None"] * 3))
    assert pool.spec.fields[0].levels == (3,)
    assert pool.inputs["categories"].flatten().tolist() == [2, 1, 3] * 3


def test_na_is_missing_among_numbers(table):
    with pytest.raises(DataError, match=r"mine\.csv, line 3, column 'v'.*1 missing values in all.*data\.missing=drop"):
        table(column("v", [1, "NA", 1, 5]))


def test_the_first_three_missing_values_are_named(table):
    text = "a,b,label\n1,,x\n,1,y\n2,?,x\n5,,y\n"
    with pytest.raises(DataError) as error:
        table(text)
    assert str(error.value) == (
        "mine.csv, line 2, column 'b'; mine.csv, line 3, column 'a'; mine.csv, line 4, column 'b': no value; 4 missing values in all; "
        "set data.missing=drop (rows) or fill, or data.drop=COLUMN"
    )


def test_rows_with_missing_values_can_be_dropped(table, caplog):
    pool = table("a,label\n4,x\n,y\n2,x\nnan,y\n7,y\n2,x\n", missing="drop")
    assert pool.images.flatten().tolist() == [4, 2, 7, 2]
    assert pool.labels.tolist() == [0, 0, 1, 0]
    assert "2 rows with missing values are dropped" in caplog.text


def test_filled_numbers_have_the_training_mean_and_a_mark(table, tmp_path):
    (tmp_path / "test.csv").write_text("a,job,label\n,u,x\n100,v,y\n")
    pool = table("a,job,label\n4,u,x\n,v,y\n2,u,x\n0,?,y\n2,v,x\n", file="train.csv", missing="fill")
    assert pool.n_train == 5
    assert pool.inputs["numbers"].tolist() == [[4, 0], [2, 1], [2, 0], [0, 0], [2, 0], [2, 1], [100, 0]]
    assert pool.inputs["categories"].flatten().tolist() == [2, 3, 2, 1, 3, 2, 3]  # 1: missing
    assert pool.spec.fields[1].levels == (3,)


def test_further_missing_values(table):
    pool = table(column("v", [3, -9, 5, -9, 2, 2]), missing="drop", missing_values=("-9",))
    assert pool.images.flatten().tolist() == [3, 5, 2, 2]


def test_missing_labels_are_refused(table):
    with pytest.raises(DataError, match=r"line 3, column 'label'.*labels must be present; remove these rows"):
        table("v,label\n3,a\n1,\n2,b\n", missing="drop")


def test_an_integer_column_with_a_gap_keeps_its_values(table):
    pool = table("n,label\n16777215,a\n,b\n3,a\n1,b\n", missing="drop")
    assert pool.images.flatten().tolist() == [16777215, 3, 1]


@pytest.mark.parametrize(
    ("values", "numbers"),
    [
        (["true", "FALSE", "True"], [1, 0, 1]),
        (["no", "yes", "no"], [0, 1, 0]),
        ([0, 1, 1], [0, 1, 1]),
    ],
)
def test_truth_values_are_numbers(table, values, numbers):
    assert table(column("v", values * 2)).images.flatten().tolist() == numbers * 2


@pytest.mark.parametrize("day", ["2026-01-31", "2026-01-31T08:15:00Z", "2026-01-31 08:15"])
def test_dates_are_refused(table, day):
    with pytest.raises(DataError, match=rf"column 'day' has dates \({day}\).*data\.drop=day"):
        table(column("day", [day] * 6))
    assert table(
        "day,v,label\n2026-01-31,3,a\n2026-01-31,2,b\n2026-01-31,2,b\n2026-01-31,2,a\n", drop=("day",)
    ).input_shape == (1,)


def test_numbers_with_commas_need_a_decimal_sign(table):
    text = "v;label\n1,200;a\n3,5;b\n2;a\n1,25;b\n"
    with pytest.raises(DataError, match=r"column 'v' has numbers with commas \(1,200\); set data\.decimal="):
        table(text)
    assert table(text, decimal=",").images.flatten().tolist() == pytest.approx([1.2, 3.5, 2, 1.25])
    thousands = 'v,label\n"1,200.5",a\n"12,000",b\n7,a\n3,b\n'
    assert table(thousands, decimal=".").images.flatten().tolist() == [1200.5, 12000, 7, 3]


@pytest.mark.parametrize("values", [[1, 2, 3, 4], [10, 12, 20, 31], [2**24 + 1, 5, 2**25, 7]])
def test_identifiers_are_dropped_with_a_notice(table, caplog, values):
    text = "id,v,label\n" + "".join(f"{i},{v},{v}\n" for i, v in zip(values, "xyxy", strict=True))
    text = text.replace(",x,", ",0.5,").replace(",y,", ",1.5,")
    assert table(text).images.tolist() == [[0.5], [1.5], [0.5], [1.5]]
    assert "column 'id'" in caplog.text
    assert "like an identifier, and is dropped" in caplog.text
    assert table(text, columns=("id", "v")).images[:, 0].tolist() == [
        float(torch.tensor(v)) for v in map(float, values)
    ]


def test_free_text_is_refused(table):
    with pytest.raises(DataError, match=r"column 'note' has 4 different values in 4 rows.*free text.*data\.drop=note"):
        table(column("note", ["fine", "so so", "bad", "?!"]))


def test_an_empty_column_is_dropped_with_a_notice(table, caplog):
    assert table("v,none,label\n3,,a\n1,,b\n2,?,a\n2,,b\n").input_shape == (1,)
    assert "column 'none' is empty and is dropped" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b,\n1,2,\n", r"mine\.csv, line 1: column 3 has no name"),
        ("a,b\n1,2\n1,2,\n", r"mine\.csv, line 3 has 3 fields, but the header has 2 names; remove a ','"),
        ("a,b\n1,2\n\n1\n", r"mine\.csv, line 4 has 1 fields"),
        ("a,a,b\n1,2,3\n", "2 columns are called 'a'; rename all but one"),
        ("1,2\n3,4\n", "has numbers instead of column names"),
        ("", "is empty"),
        ("a,label\n", "has no rows"),
        ('a,label\n"1,x\n', "cannot be read as a table|has 1 fields"),
        ("a,b\n1,2\n3,4\n", r"no column is called label.*set data\.label to one of its columns: a, b"),
        ("target,y,v\n1,2,3\n", "target and y could all be labels"),
        ("label\na\nb\n", "no input columns are left"),
        ("v,label\n1,a\n3,a\n", "has only one value, 'a'"),
        ("v,label\n3,a\n1,b\n5,c\n", "3 different values in 3 rows, which is too many for classes"),
        ("v,label\n3,1e400\n1,2\n", "too large for float64"),
        ("v,label\n1e39,a\n1.5,b\n3,a\n2,b\n", "too large for float32"),
    ],
)
def test_refusals(table, text, message):
    with pytest.raises(DataError, match=message) as error:
        table(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("mark", [";", "\t", "|"])
def test_other_separators(table, mark):
    text = 'v,job,label\n1,"a,b",x\n3,c,y\n2,"a,b",x\n2,c,y\n1,c,x\n'.replace(",", mark)
    pool = table(text)
    assert pool.inputs["numbers"].flatten().tolist() == [1, 3, 2, 2, 1]
    assert pool.spec.fields[1].levels == (2,)


def test_tab_separated_and_compressed_files(tmp_path):
    text = "v, w\tlabel\n1\ta\n3\tb\n2\ta\n2\tb\n"
    (tmp_path / "mine.tsv").write_text(text)
    with gzip.open(tmp_path / "mine.tsv.gz", "wt") as file:
        file.write(text)
    for name in ("mine.tsv", "mine.tsv.gz"):
        assert load("mine", tmp_path / name).images.flatten().tolist() == [1, 3, 2, 2]
    (tmp_path / "bad.csv.gz").write_text(text)
    with pytest.raises(DataError, match=r"bad\.csv\.gz cannot be read as a table"):
        load("mine", tmp_path / "bad.csv.gz")


def test_quotes_blank_lines_and_spaces_keep_line_numbers(table):
    text = '\ufeffv , job, label\n1,"two\nlines",x\n\n3, c ,y\n,c,x\n2,"two\nlines",x\n4,"two\nlines",y\n'
    with pytest.raises(DataError, match=r"mine\.csv, line 6, column 'v'"):
        table(text)
    pool = table(text, missing="drop", columns=("v",))
    assert pool.images.flatten().tolist() == [1, 3, 2, 4]


def test_latin_1_must_be_asked_for(table):
    text = column("city", ["Köln", "Bonn"] * 3)
    with pytest.raises(DataError, match=r"mine\.csv, line 2 is not encoded as utf-8-sig; .*data\.encoding=latin-1"):
        table(text, encoding="latin-1")


def test_latin_1(tmp_path):
    (tmp_path / "m.csv").write_bytes("v,label\n1,Köln\n4,Bonn\n2,Köln\n3,Bonn\n".encode("latin-1"))
    assert load("mine", tmp_path / "m.csv", table=TableOptions(encoding="latin-1")).classes == ("Bonn", "Köln")
    with pytest.raises(DataError, match=r"data\.encoding=latin1x: unknown encoding"):
        load("mine", tmp_path / "m.csv", table=TableOptions(encoding="latin1x"))


def test_numbered_classes_are_in_numeric_order(table):
    pool = table(
        "v,label\n"
        + "".join(f"{v},{c}\n" for v, c in zip([3, 1, 2, 2, 5, 4, 1, 3], [9, 10, 2, 9, 10, 2, 9, 2], strict=True))
    )
    assert pool.classes == ("2", "9", "10")
    assert pool.labels.tolist() == [1, 2, 0, 1, 2, 0, 1, 0]


def test_classes_in_a_chosen_order(tmp_path, caplog):
    file = tmp_path / "sizes.csv"
    file.write_text("x,label\n" + "".join(f"{i % 3}.5,{['high', 'low', 'middle'][i % 3]}\n" for i in range(9)))
    pool = fedloom.load_data(file, classes="low,middle,huge,high")
    assert (pool.classes, pool.labels[:3].tolist()) == (("low", "middle", "huge", "high"), [3, 0, 1])
    assert "no example has the class huge" in caplog.text
    for options, message in (
        ({"classes": "low,high"}, r"data\.classes=low,high: does not name 'middle', which is a class of data=mine"),
        ({"classes": "low,low,high,middle"}, "a name occurs twice"),
        ({"classes": "a,b", "label": "x", "task": "regression"}, "has the task regression, not classes"),
    ):
        with pytest.raises(DataError, match=message):
            fedloom.load_data(file, **options)
    with pytest.raises(DataError, match=r"nor metadata\.csv with pictures; to read sizes\.csv, set data\.path="):
        load("mine", tmp_path)


def test_many_numbers_need_a_task(table):
    text = "v,price\n" + "".join(f"{i % 3},{i}.5\n" for i in range(4))
    with pytest.raises(DataError, match=r"label 'price' has 4 different numbers; set data\.task=regression"):
        table(text, label="price")
    pool = table(text, label="price", task="regression")
    assert pool.objective.task == "regression"
    assert pool.classes == ("price",)
    assert pool.objective.mean == (2.0,)
    with pytest.raises(DataError, match=r"not integers; set data.task=regression"):
        table(text, label="price", task="classification")


def test_several_labels(table):
    text = "v,red,blue\n3,0,1\n1,1,1\n2,yes,0\n".replace("yes", "1")
    pool = table(text, label="red, blue")
    assert pool.objective.task == "multilabel"
    assert pool.targets.tolist() == [[0, 1], [1, 1], [1, 0]]
    assert pool.classes == ("red", "blue")
    assert table(text, label="red,blue", task="regression").targets.shape == (3, 2)
    with pytest.raises(DataError, match="has one label column"):
        table(text, label="red,blue", task="classification")
    with pytest.raises(DataError, match=r"not all 0 and 1; set data\.task=regression"):
        table(text, label="v,blue")
    with pytest.raises(DataError, match="needs columns of 0 and 1"):
        table(text, label="v,blue", task="multilabel")
    with pytest.raises(DataError, match="needs numbers, but has 'a'"):
        table(column("v", [3, 1, 2, 2]), task="regression")


def test_truth_values_as_labels(table):
    assert table("v,label\n3,Yes\n1,No\n2,Yes\n2,No\n").classes == ("No", "Yes")


@pytest.mark.parametrize("key", ["label", "columns", "drop", "split", "owner", "by"])
def test_unknown_columns_are_named(table, key):
    value = ("agee",) if key in ("columns", "drop") else "agee"
    with pytest.raises(DataError, match=r"=agee: mine\.csv has no such column \(did you mean 'age'\?\)"):
        table("age,label\n3,a\n1,b\n", **{key: value})


def test_a_column_has_one_role(table):
    with pytest.raises(DataError, match="column 'v' is named more than once"):
        table("v,w,label\n3,1,a\n1,2,b\n", drop=("v",), columns=("v",))


SPLIT = "v,fold,label\n3,test,a\n1,train,b\n2,valid,a\n2,Train,a\n5,train,b\n"


def test_a_split_column_orders_the_rows(table, caplog):
    pool = table(SPLIT, split="fold")
    assert (pool.n_train, pool.images.flatten().tolist()) == (4, [1, 2, 2, 5, 3])
    assert "1 validation rows are used as training examples" in caplog.text
    assert "5 rows (4 train + 1 test)" in caplog.text
    named = table(SPLIT.replace("fold", "split").replace("valid", "train"))
    assert (named.n_train, named.input_shape) == (4, (1,))
    alone = table(SPLIT.replace("test", "train"), split="fold")
    assert (alone.n_train, alone.images.flatten().tolist()) == (4, [3, 1, 2, 5, 2])
    with pytest.raises(DataError, match="line 3, column 'fold': 'train1' is not a split"):
        table(SPLIT.replace("1,train", "1,train1"), split="fold")
    with pytest.raises(DataError, match="line 4, column 'fold' has no value"):
        table(SPLIT.replace("valid", ""), split="fold")
    with pytest.raises(DataError, match="has no training rows"):
        table("v,s,label\n1,test,a\n2,test,b\n", split="s")


def test_owners_are_a_column_and_no_input(table, caplog):
    pool = table("v,client,job,label\n3,7,x,a\n1,8,y,b\n2,7,x,b\n2,8,y,a\n5,7,y,b\n", by="job")
    assert pool.columns["client"].tolist() == ["7", "8", "7", "8", "7"]
    assert pool.columns["job"].tolist() == ["x", "y", "x", "y", "y"]
    assert pool.inputs["numbers"].shape == (5, 1)
    assert "owner client (2)" in caplog.text
    with pytest.raises(DataError, match="line 3, column 'site' has no value"):
        table("v,site,label\n3,k,a\n1,,b\n2,k,a\n3,k,b\n", owner="site")


def test_a_folder_of_text_tables(table, tmp_path):
    (tmp_path / "test.csv").write_text("label,v\nb,9\n")
    train = "v,label\n3,a\n1,b\n2,a\n"
    for pool in (table(train, file="train.csv"), load("mine", tmp_path)):
        assert (pool.n_train, pool.images.flatten().tolist(), pool.labels.tolist()) == (3, [3, 1, 2, 9], [0, 1, 0, 1])
    with pytest.raises(DataError, match="already has a test file"):
        load("mine", tmp_path, table=TableOptions(split="v"))
    (tmp_path / "test.csv").write_text("v\n9\n")
    with pytest.raises(DataError, match=r"test\.csv: column 'label' is missing, but train\.csv has it"):
        load("mine", tmp_path)
    (tmp_path / "test.csv").write_text("v,w,label\n9,1,a\n")
    with pytest.raises(DataError, match=r"test\.csv: column 'w' is not in train\.csv"):
        load("mine", tmp_path)
    (tmp_path / "train.tsv").write_text(train)
    with pytest.raises(DataError, match=r"has both train\.csv and train\.tsv"):
        load("mine", tmp_path)


def test_rows_selects_training_rows(table):
    text = column("v", [i % 5 + 0.5 for i in range(12)])
    few, more = (table(text, rows=n).images.flatten().tolist() for n in (4, 8))
    assert (len(few), len(more)) == (4, 8)
    with pytest.raises(DataError, match=r"data\.rows=13"):
        table(text, rows=13)


def write(file, **columns):
    pq.write_table(pa.table(columns), file)
    return file


def test_parquet_keeps_its_types(tmp_path):
    file = write(
        tmp_path / "mine.parquet",
        number=pa.array([3, 1, 2, 2, 5, 4], pa.int32()),
        code=pa.array(["1", "2"] * 3),
        size=pa.array(["small", "large"] * 3).dictionary_encode(),
        flag=pa.array([True, False, True, True, False, False]),
        label=pa.array([0, 1] * 3),
    )
    pool = load("mine", file)
    assert pool.inputs["numbers"].tolist() == [[3, 1], [1, 0], [2, 1], [2, 1], [5, 0], [4, 0]]
    assert pool.inputs["categories"].tolist() == [[1, 1], [2, 2]] * 3  # "small" is first in the dictionary
    assert pool.classes == ("0", "1")
    file.rename(tmp_path / "train.parquet")
    assert load("mine", tmp_path).inputs["numbers"].equal(pool.inputs["numbers"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (pa.array([None, 2, 1, 1]), "mine.parquet, row 1, column 'v': no value"),
        (pa.array([1.0, float("nan"), 1, 1]), "row 2, column 'v'"),
        (pa.array(["a", None, "a", "a"]), "row 2, column 'v'"),
        (pa.array([1.0, float("inf"), 1, 1]), "column 'v' has infinite values"),
        (pa.array([1, 2, 3, 4], pa.timestamp("s")), "column 'v' has dates"),
        (pa.array([1, 2, 3, 4], pa.date32()), "column 'v' has dates"),
        (pa.array([[1]] * 4), "column 'v' has type list"),
    ],
)
def test_parquet_refusals(tmp_path, values, message):
    file = write(tmp_path / "mine.parquet", v=values, label=pa.array(["a", "b", "a", "b"]))
    with pytest.raises(DataError, match=message):
        load("mine", file)


def test_class_numbers_have_the_names_that_the_datasets_library_stores(tmp_path):
    """Labels and owners have names; inputs remain numbers, so that new rows with numbers are valid. -1 is a missing label."""

    def write(labels):
        columns = {"age": [31.0, 25.0, 44.0, 27.0], "ward": [0, 1, 0, 1], "client": [1, 0, 1, 0], "label": labels}
        features = {
            name: {"names": names, "_type": "ClassLabel"}
            for name, names in {
                "ward": ["w", "x"],
                "client": ["ann", "bob"],
                "label": ["well", "ill", "unsure"],
            }.items()
        }
        table = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        pq.write_table(table, tmp_path / "people.parquet")
        return load("mine", tmp_path / "people.parquet")

    pool = write([1, 0, 1, 0])
    assert (pool.classes, pool.labels.tolist()) == (("well", "ill", "unsure"), [1, 0, 1, 0])
    assert pool.columns["client"].tolist() == ["bob", "ann", "bob", "ann"]
    assert pool.inputs.tolist() == [[31, 0], [25, 1], [44, 0], [27, 1]]
    assert stored_examples(pool.preprocess(), tmp_path / "people.parquet")[1].tolist() == [1, 0, 1, 0]
    with pytest.raises(DataError, match=r"people\.parquet, row 4, column 'label': no value"):
        write([1, 0, 1, -1])
    assert write([1, 7, 7, 1]).classes == ("1", "7")  # the metadata do not match the values


def test_parquet_with_pictures_is_read_as_before(tmp_path, write_parquet, grey):
    pictures = grey(3)
    file = write_parquet(tmp_path / "mine.parquet", pictures, [0, 1, 1])
    assert load("mine", file).input_shape == (1, 8, 8)
    with pytest.raises(DataError, match=r"data\.label=label: applies only to tables"):
        load("mine", file, table=TableOptions(label="label"))


def test_options_and_files_that_do_not_fit(tmp_path):
    (tmp_path / "mine.csv").write_text(column("v", [3, 1, 2, 2]))
    with pytest.raises(DataError, match=r"data\.drop=a,b: applies only to tables"):
        load("digits", table=TableOptions(drop=("a", "b")))
    with pytest.raises(DataError, match="image_size=8: data=mine has no image files"):
        load("mine", tmp_path / "mine.csv", image_size=8)
    with pytest.raises(DataError, match="is a file, and data=digits is a known data set; use another name"):
        load("digits", tmp_path / "mine.csv")
    with pytest.raises(DataError, match="no blocks of text"):
        load("mine", tmp_path / "mine.csv", task="language")
    (tmp_path / "mine.xlsx").write_text("")
    with pytest.raises(DataError, match=r"unknown kind of file; use \.csv"):
        load("mine", tmp_path / "mine.xlsx")
    with pytest.raises(DataError, match=r"none\.csv: file does not exist"):
        load("mine", tmp_path / "none.csv")


def test_the_inputs_of_a_federation_are_standardised(table):
    pool = table(column("v", [3.5, 1, 2, 2, 7, 9, 1, 1]))
    federation = Federation(pool, partition(pool, 1, scheme="iid", min_examples=2, seed=0))
    x = federation.rows(np.arange(8))[0]
    assert x.mean().item() == pytest.approx(0, abs=1e-6)
    assert x.std(correction=0).item() == pytest.approx(1, abs=1e-6)


def test_a_clean_table_logs_one_line(table, caplog):
    with caplog.at_level(logging.INFO):
        table(column("v", [3, 1, 2, 2]))
    assert len(caplog.records) == 1


@given(
    st.lists(st.tuples(st.text("ab ,;\"'\n\\#é1", max_size=4), st.text('ab,"\n ', max_size=4)), min_size=1, max_size=5)
)
def test_text_is_read_as_it_was_written(tmp_path_factory, cells):
    file = tmp_path_factory.mktemp("text") / "t.csv"
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, quoting=csv.QUOTE_ALL, lineterminator="\n")
        writer.writerows([("x", "y"), *cells])
    raw = read_files([file], [], None)
    assert raw.frame.to_numpy().tolist() == [[x.strip(), y.strip()] for x, y in cells]
    assert raw.lines.tolist() == [2 + sum("".join(c).count("\n") + 1 for c in cells[:i]) for i in range(len(cells))]


def test_carriage_returns_alone_are_refused(table):
    with pytest.raises(DataError, match=r"line 1: ends in a carriage return without a line feed"):
        table("v,label\r1,a\r2,b\r")
    assert table("v,label\r\n3,a\r\n1,b\r\n2,a\r\n2,b\r\n").input_shape == (1,)


def test_nodes_scale_their_own_images_by_themselves(tmp_path, write_parquet, grey):
    """`data.normalise=own` on a node gives the same inputs as the same client has in a simulation."""
    pictures, labels = grey(8, 4), [0, 1] * 4
    write_parquet(tmp_path / "train.parquet", pictures[:6], labels[:6])
    write_parquet(tmp_path / "test.parquet", pictures[6:], labels[6:])
    given = Given(preprocess=load("mine", tmp_path).preprocess(), where="the server's preprocess.json")
    settings = make_settings({"data": {"name": "mine", "normalise": "own"}, "clients": 3})
    data = read_own(tmp_path, [1], settings, given)
    x = np.stack(pictures) / 255
    expected = ((x - x[:6].mean()) / x[:6].std())[:, None].astype(np.float32)
    torch.testing.assert_close(data.train(1)[0], torch.from_numpy(expected[:6]))
    torch.testing.assert_close(data.test(1)[0], torch.from_numpy(expected[6:]))
    server = Remote(replace(data.dataset, n_train=6), {1: {"train": [3, 3], "valid": [0, 0], "test": [1, 1]}}, settings)
    torch.testing.assert_close(server.common()[0], data.test(1)[0])
    with pytest.raises(ConfigError, match="on devices use own, half or none"):
        read_own(tmp_path, [1], make_settings({"data": {"name": "mine", "normalise": "standard"}, "clients": 3}), given)


def test_a_column_called_client_names_the_owners(table):
    pool = table("v,client,job,label\n" + "3,7,x,a\n1,8,y,b\n2,7,x,b\n2,8,y,a\n" * 4, by="job")
    assert default_scheme(pool) == "natural"
    assert partition(pool, None, scheme="natural", min_examples=2).owners == ("7", "8")


def test_the_highest_category_has_an_embedding(table):
    pool = table("job,label\n" + "x,a\ny,b\nz,a\n" * 4)
    body = ZOO["table_mlp"](pool.spec, hidden1=4, hidden2=3)
    assert body(categories=pool.inputs["categories"].long()).shape == (12, 3)
    levels = replace(pool, spec=InputSpec((replace(pool.spec.fields[0], levels=(2,)),)))
    with pytest.raises(DataError, match="category values must be from 0 to 2"):
        validated(levels)
