"""`fedloom preprocess`: the contents of the file, and a run that uses it."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fedloom
from fedloom.cli import main

RUN = ["rounds=1", "clients=2", "partition=iid", "engine=sequential", "--quiet", "data=people"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [
        f"p{i},{'' if i == 3 else 20 + 7 * i % 40},{'nurse' if i % 3 else 'clerk'},{'yes' if i % 2 else 'no'},"
        f"{'good' if i % 2 else 'bad'} day,{'low' if i % 2 else 'high'}"
        for i in range(40)
    ]
    (tmp_path / "people.csv").write_text("name,age,job,smokes,note,income\n" + "\n".join(rows) + "\n")
    return tmp_path


def run(capsys, *words):
    capsys.readouterr()
    code = main(list(words))
    return (code, *capsys.readouterr())


def test_a_run_with_the_file_is_the_run_without_it(place, capsys):
    options = ["data.label=income", "data.missing=fill", "data.drop=name,note"]
    code, out, _ = run(capsys, "preprocess", "people.csv", "data=people", *options, "out=people.json")
    assert code == 0
    assert out.splitlines() == [
        "task        classification of income: high, low",
        "numbers     age: mean 39.462, standard deviation 11.541; missing values become 39.462, and a further column marks them",
        "            smokes (no is 0, yes is 1): mean 0.5, standard deviation 0.5; missing values become 0.5",
        "categories  job: 2 levels (clerk, nurse)",
        "not used    name, note",
        "file        people.json",
    ]
    common = [*RUN, "model=table_mlp", "data.path=people.csv"]
    assert run(capsys, "run", *common, *options, "out=a")[0] == 0
    assert run(capsys, "run", *common, "data.preprocess=people.json", "out=b")[0] == 0
    assert (place / "a/preprocess.json").read_bytes() == (place / "people.json").read_bytes()
    assert (place / "b/preprocess.json").read_bytes() == (place / "people.json").read_bytes()
    a, b = (json.loads((place / name / "metrics.jsonl").read_text()) for name in "ab")
    assert {k: v for k, v in a.items() if "seconds" not in k} == {k: v for k, v in b.items() if "seconds" not in k}
    capsys.readouterr()
    assert main(["run", "--resume", "b", "rounds=2", "--quiet"]) == 0


def test_texts_pictures_and_arrays_are_told_in_lines(place, capsys):
    words = ["people.csv", "data.text=note", "data.label=income", "data.columns=age", "data.missing=fill"]
    code, out, err = run(capsys, "preprocess", *words, "out=text.json")
    assert code == 0, err
    assert "text        the first 2 words of note, in lower case; 7 different, such as day, bad, good" in out
    assert json.loads((place / "text.json").read_text())["inputs"][1]["name"] == "text"
    for i in range(8):
        (place / "shapes" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((9, 9), 20 * i, np.uint8)).save(place / "shapes" / "ab"[i % 2] / f"{i}.png")
    code, out, err = run(capsys, "preprocess", "shapes", "data.image_size=8")
    assert (code, out.splitlines()) == (
        0,
        ["task        classification: a, b", "images      1 x 8 x 8, from -1 to 1", "file        preprocess.json"],
    )
    np.savez(place / "x.npz", x=np.ones((4, 2, 5)), y=np.arange(4.0) / 4)
    code, out, err = run(capsys, "preprocess", "x.npz", "data.task=regression", "out=x.json")
    assert code == 0, err
    assert "            target: mean 0.375, standard deviation 0.27951" in out
    assert "numbers     2 x 5, unchanged" in out


def test_text_with_numbers_and_categories_needs_a_model_of_your_own(place, capsys):
    words = ["run", *RUN, "data.path=people.csv", "data.text=note", "data.columns=age,job", "data.label=income"]
    words += ["data.missing=fill", "data.min_count=1"]
    code, _, err = run(capsys, *words, "model=text_mean", "out=a")
    assert (code, err.count("model=text_mean")) == (2, 1)
    assert "use a model of your own whose forward takes numbers, categories, text" in err.replace("\n", " ")
    page = (Path(__file__).parents[2] / "docs/data.md").read_text(encoding="utf-8")
    (code_of_page,) = re.findall(r"```python\n(class Both.*?)```", page, re.DOTALL)
    (place / "both.py").write_text(f"import torch\n\n{code_of_page}")
    assert run(capsys, *words, "model=both.py:Both", "out=b")[0] == 0
    code, out, err = run(capsys, "predict", "b", "people.csv", "client=server")
    assert (code, len(out.splitlines())) == (0, 41), err
    assert fedloom.open("b").score("server", "people.csv")["accuracy"] >= 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give one file or folder, such as people.csv"),
        (["people.csv", "other.csv"], "give one file or folder, such as people.csv, not 2"),
        (["absent.csv"], "absent.csv: no such file or folder"),
        (["people.csv", "rounds=3"], "fedloom preprocess has no key 'rounds'"),
        (["people.csv", "data.preprocess=x"], "fedloom preprocess has no key 'data.preprocess'"),
        (["people.csv", "data.path=x"], "fedloom preprocess has no key 'data.path'"),
        (["people.csv", "data.label=wage"], "data.label=wage: people.csv has no such column"),
        (["people.csv", "data.label=income"], "looks like free text"),
        (["people.csv", "data.normalise=own"], "data.normalise=own: each client computes its own scaling"),
        (["people.csv", "out=people.csv"], "the file exists; choose another name"),
        (["people.csv", "out=no/people.json"], "folder no does not exist"),
    ],
)
def test_mistakes_end_with_one_line(place, capsys, words, message):
    code, out, err = run(capsys, "preprocess", *words)
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert sorted(file.name for file in place.iterdir()) == ["people.csv"]
