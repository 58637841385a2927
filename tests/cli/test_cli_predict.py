"""`fedloom predict`: new files, a client's model, and predictions as CSV."""

import csv
import io

import numpy as np
import pytest
from PIL import Image

from fedloom.cli import main


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return two short runs, one on a table and one on images."""
    place = tmp_path_factory.mktemp("predict")
    rows = [
        f"{20 + 7 * i % 40},{'nurse' if i % 3 else 'clerk'},{i % 5 + i / 8},{'low' if i % 2 else 'high'}"
        for i in range(60)
    ]
    (place / "people.csv").write_text("age,job,hours,income\n" + "\n".join(rows) + "\n")
    common = ["rounds=1", "clients=2", "partition=iid", "model=table_mlp", "engine=sequential", "--quiet"]
    table = ["run", "data=mine", f"data.path={place / 'people.csv'}", *common]
    assert main([*table, "data.label=income", f"out={place / 'table'}"]) == 0
    assert main([*table, "data.label=hours", "data.task=regression", "method=local", f"out={place / 'hours'}"]) == 0
    pictures = [
        "run",
        "rounds=1",
        "clients=2",
        "data.rows=60",
        "partition=iid",
        "model=mlp",
        "engine=sequential",
        "--quiet",
    ]
    assert main([*pictures, f"out={place / 'pictures'}"]) == 0
    for i in range(2):
        Image.fromarray(np.full((8, 8), 90 * i, np.uint8)).save(place / f"{i}.png")
    return place


def predicted(capsys, *words):
    capsys.readouterr()
    code = main(["predict", *map(str, words)])
    out, err = capsys.readouterr()
    return code, list(csv.DictReader(io.StringIO(out))), err


def test_tables_and_pictures(runs, capsys):
    code, rows, _ = predicted(capsys, runs / "table", runs / "people.csv", "client=1")
    assert (code, len(rows)) == (0, 60)
    assert set(rows[0]) == {"row", "prediction", "probability"}
    assert rows[59]["row"] == "60"
    assert all(r["prediction"] in ("low", "high") and 0.5 <= float(r["probability"]) <= 1 for r in rows)
    code, again, _ = predicted(capsys, runs / "table", runs / "people.csv", "--client", "1")
    assert again == rows
    code, rows, _ = predicted(capsys, runs / "pictures", runs / "0.png", runs / "1.png", "client=server")
    assert [r["file"] for r in rows] == [str(runs / "0.png"), str(runs / "1.png")]
    assert set(rows[0]) == {"file", "prediction", "probability"}
    code, rows, _ = predicted(capsys, runs / "hours", runs / "people.csv", runs / "people.csv", "client=0")
    assert set(rows[0]) == {"file", "row", "prediction"}
    assert len(rows) == 120
    assert -20 < float(rows[0]["prediction"]) < 30


def test_owners_with_numbers_as_names_come_first(runs, capsys, caplog, tmp_path):
    """The persons of `har` are 01 to 30, so client=02 is not client 2."""
    rows = [f"{i % 7},{'ab'[i % 2]},{'02' if i < 20 else '07'}" for i in range(40)]
    (tmp_path / "steps.csv").write_text("x,label,client\n" + "\n".join(rows) + "\n")
    words = [
        "data=mine",
        f"data.path={tmp_path / 'steps.csv'}",
        "model=table_mlp",
        "rounds=1",
        "method=local",
        "--quiet",
    ]
    assert main(["run", *words, f"out={tmp_path / 'run'}"]) == 0
    found = {
        c: predicted(capsys, tmp_path / "run", tmp_path / "steps.csv", f"client={c}")[1] for c in ("02", "07", "0", "1")
    }
    assert found["02"] == found["0"] != found["07"] == found["1"]
    assert "client=02: taken as the name of an owner, whose client has the number 0" in caplog.text
    _, _, err = predicted(capsys, tmp_path / "run", tmp_path / "steps.csv", "client=2")
    assert "client=2: must be from 0 to 1, or a name, such as 02" in err


def test_predictions_go_to_a_new_file(runs, capsys):
    target = runs / "said.csv"
    code, rows, _ = predicted(capsys, runs / "table", runs / "people.csv", "client=0", f"out={target}")
    assert (code, rows) == (0, [])
    assert len(target.read_text().splitlines()) == 61
    code, _, err = predicted(capsys, runs / "table", runs / "people.csv", "client=0", f"out={target}")
    assert code == 2
    assert "the file exists" in err


@pytest.mark.parametrize(
    ("run", "words", "message"),
    [
        ("table", [], "give the folder of a run and files"),
        ("table", ["people.csv"], "client: set whose model predicts: client=0 to 1, or client=server"),
        ("table", ["people.csv", "client=2"], "client=2: must be from 0 to 1"),
        ("table", ["people.csv", "client=ann"], "client=ann: no such client"),
        ("table", ["people.csv", "client="], "client=: must not be empty"),
        ("table", ["people.csv", "client=0", "--client", "0"], "remove one of them"),
        ("table", ["people.csv", "client=0", "client=1"], "is given twice"),
        ("table", ["people.csv", "clients=0"], "no key 'clients' (did you mean 'client'?)"),
        ("table", ["people.csv", "client=0", "adapt=no"], "adapt=no: must be true or false"),
        ("table", ["absent.csv", "client=0"], "absent.csv does not exist"),
        ("table", ["0.png", "client=0"], "0.png"),
        ("pictures", ["people.csv", "client=0"], "people.csv: Pillow cannot read this image"),
        ("hours", ["people.csv", "client=server"], "Local has no server model"),
        ("elsewhere", ["people.csv", "client=0"], "is not a run folder"),
    ],
)  # fmt: skip
def test_mistakes_end_with_one_line(runs, capsys, run, words, message):
    named = [str(runs / word) if word.endswith((".csv", ".png")) else word for word in words]
    code, rows, err = predicted(capsys, runs / run, *named)
    assert (code, rows) == (2, [])
    assert message in err
    assert err.count("\n") == 1
