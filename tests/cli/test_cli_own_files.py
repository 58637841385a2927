"""Runs on users' own tables and arrays."""

import json

import numpy as np
import pandas as pd
import pytest

import fedloom
from fedloom import data
from fedloom.errors import DataError
from fedloom.methods.registry import METHODS

ROWS = [
    (20 + i % 7 + i % 3 / 2, ("nurse", "clerk", "cook")[i % 3], "yes" if i % 3 == 1 else "no", f"h{i % 2}")
    for i in range(40)
]


@pytest.fixture
def patients(tmp_path):
    lines = ["age,job,ill,hospital", *(",".join(map(str, row)) for row in ROWS)]
    (tmp_path / "patients.csv").write_text("\n".join(lines) + "\n")
    return "data.path=patients.csv"


WORDS = ("data=mine", "model=table_mlp", "rounds=3", "engine=sequential", "method.lr=0.3")


def test_a_run_on_a_table_with_categories(cli, patients, tmp_path, caplog):
    done = cli(
        "run",
        *WORDS,
        patients,
        "data.label=ill",
        "data.drop=hospital",
        "clients=2",
        "partition=iid",
        "rounds=30",
        "out=done",
    )
    assert done.code == 0, done.err
    assert "patients.csv: 40 rows, 1 number, 1 category, label ill (2 classes)" in caplog.text
    summary = json.loads((tmp_path / "done" / "summary.json").read_text())
    assert summary["personal_accuracy"]["final"] == 1.0  # the job decides


def test_owners_come_from_a_column(cli, patients, tmp_path):
    owners = ("partition=natural", "partition.column=hospital", "out=done")
    done = cli("run", *WORDS, patients, "data.label=ill", *owners)
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "done" / "partition.json").read_text())["clients"] == ["h0", "h1"]


def test_a_partition_by_a_column_is_skewed_without_saying_so(cli, patients):
    done = cli(
        "run",
        *WORDS,
        patients,
        "data.label=ill",
        "partition.by=job",
        "partition.min_examples=2",
        "clients=2",
        "out=done",
    )
    assert done.code == 0, done.err


def test_regression_on_a_table(cli, patients, tmp_path):
    words = ("data.label=age", "data.task=regression", "clients=2", "partition=iid", "out=done")
    done = cli("run", *WORDS, patients, *words)
    assert done.code == 0, done.err
    assert "personal_rmse" in json.loads((tmp_path / "done" / "summary.json").read_text())


def test_predictions_for_rows_of_a_table(patients, tmp_path):
    pool = data.load("mine", tmp_path / "patients.csv", table=data.TableOptions(label="ill", drop=("hospital",)))
    words = {"clients": 2, "partition": "iid", "rounds": 30, "engine": "sequential", "out": tmp_path / "done"}
    run = fedloom.run(METHODS["fedavg"](lr=0.3), data=pool, model="table_mlp", **words)
    rows = pd.read_csv(tmp_path / "patients.csv").head(6)
    assert run.predict(0, rows).tolist() == ["no", "yes", "no"] * 2
    with pytest.raises(DataError, match="the columns do not form a table"):
        run.predict(0, {name: values[:6].numpy() for name, values in pool.inputs.items()})  # stored, not raw


def test_a_run_on_arrays(cli, tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "a.npz", x=rng.random((60, 4)), y=np.arange(60) % 2)
    done = cli(
        "run",
        "data=mine",
        "data.path=a.npz",
        "model=mlp",
        "rounds=1",
        "clients=2",
        "engine=sequential",
        "partition=iid",
    )
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("data.label=il", "data.label=il: patients.csv has no such column (did you mean 'ill'?)"),
        ("data.label=age", "patients.csv, label 'age' has 15 different numbers; set data.task=regression"),
        ("data.missing=keep", "data.missing=keep"),
        ("data.decimal=;", "data.decimal=;"),
        ("data.drop=ill", "column 'ill' is named more than once"),
        ("data.image_size=8", "data=mine has no image files"),
    ],
)
def test_mistakes_end_in_one_line(cli, patients, word, message):
    done = cli("run", *WORDS, patients, "data.label=ill", "clients=2", word)
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1


def test_a_file_needs_a_name_of_its_own(cli, patients):
    done = cli("run", patients)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "is a file, and data=digits is a known data set; use another name: data=mine" in done.err
