"""Folders of images on the command line: runs, and every mistake in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

HEAD = "file_name,label\n"
PAIR = ("p/1.png", "p/2.png")
MISTAKES = {
    "no pictures": ((), {"p/cat/notes.pdf": "x"}, "", "data.path=p: has neither train.parquet nor pictures in folders"),
    "no classes": (PAIR, {}, "", "data.path=p: '1.png' is not of the form CLASS/PICTURE; move the pictures, or add metadata.csv"),
    "no classes in a split": (
        ("p/train/1.png", "p/test/2.png"), {}, "", "data.path=p: 'train/1.png' is not of the form CLASS/PICTURE",
    ),
    "mixed depths": (
        ("p/cat/1.png", "p/dog/home/2.png"), {}, "",
        "data.path=p: images are at different folder depths ('cat/1.png' and 'dog/home/2.png'); move them to the same depth, or",
    ),
    "a loose picture": (("p/cat/1.png", "p/2.png"), {}, "", "different folder depths ('2.png' and 'cat/1.png')"),
    "mixed depths in splits": (
        ("p/train/cat/1.png", "p/test/cat/x/2.png"), {}, "", "different folder depths ('train/cat/1.png' and 'test/cat/x/2.png')",
    ),
    "splits and classes": (
        ("p/train/cat/1.png", "p/test/cat/1.png", "p/extra/cat/2.png"), {}, "",
        "data.path=p: 'test' names a split, but 'extra' does not; use only splits there, or none",
    ),
    "splits and a loose picture": (
        ("p/train/cat/1.png", "p/2.png"), {}, "", "'train' names a split, but a picture without a folder does not",
    ),
    "no training pictures": (
        ("p/val/cat/1.png", "p/test/cat/1.png"), {}, "", "data.path=p: has no training pictures, only the splits test, valid",
    ),
    "a class in test alone": (
        ("p/train/cat/1.png", "p/test/dog/1.png", "p/test/emu/1.png"), {}, "",
        "data.path=p: class 'dog' (and 1 more) has no training pictures; add some, or remove the class from the test split",
    ),
    "no domains": (
        ("p/cat/1.png", "p/dog/2.png"), {}, "data.owner=folder",
        "data.owner=folder: data.path=p: 'cat/1.png' is not of the form DOMAIN/CLASS/PICTURE",
    ),
    "splits below domains": (
        ("p/web/train/cat/1.png", "p/web/test/cat/2.png"), {}, "data.owner=folder",
        "splits (test, train) lie below the domains; move them to the top",
    ),
    "no domains in metadata": (
        PAIR, {"p/metadata.csv": HEAD + "1.png,a\n2.png,b\n"}, "data.owner=folder", "data.path=p: '1.png' is not in a domain folder",
    ),
    "two domains": (
        ("p/web/1.png",), {"p/metadata.csv": "file_name,label,domain\nweb/1.png,a,x\n"}, "data.owner=folder",
        "data.owner=folder: the metadata already have a column 'domain'; remove data.owner",
    ),
    "an owner without pictures": ((), {}, "data=digits data.owner=folder", "data.owner=folder: data=digits is not a folder of pictures"),
    "an unknown owner": (PAIR, {}, "data.owner=who", "data.owner=who: must be one of folder"),
    "a known name": (
        ("p/cat/1.png",), {}, "data=digits data.path=p", "for your own files, use another name (data=mine), not data=digits",
    ),
    "no picture": ((), {"p/cat/1.png": "x"}, "", "p/cat/1.png: Pillow cannot read this image"),
    "sizes": (("p/cat/1.png", "p/cat/large.png"), {}, "", "images differ in size (4x4 and, in p/cat/large.png, 6x6); set one size"),
    "a task without targets": (
        ("p/cat/1.png",), {}, "data.task=regression", "data.task=regression: data.path=p needs metadata.csv or metadata.jsonl",
    ),
    "a picture that does not exist": (
        PAIR, {"p/metadata.csv": HEAD + "1.png,a\n3.png,b\n4.png,b\n"}, "",
        "p/metadata.csv lists '3.png' (and 1 more), which is not a picture in the folder",
    ),
    "a picture outside": (
        ("p/1.png", "2.png"), {"p/metadata.csv": HEAD + "1.png,a\n../2.png,b\n"}, "", "lists '../2.png', which is not a picture",
    ),
    "a picture twice": (PAIR, {"p/metadata.csv": HEAD + "1.png,a\n1.png,b\n"}, "", "p/metadata.csv, line 3 lists '1.png' a second time"),
    "no file names": (
        PAIR, {"p/metadata.csv": "file,label\n1.png,a\n"}, "", "line 2 has no column 'file_name'; its columns are file, label",
    ),
    "no label": (PAIR, {"p/metadata.csv": HEAD + "1.png,a\n2.png,\n"}, "", "p/metadata.csv: '2.png' has no value in column 'label'"),
    "no label column": (
        PAIR, {"p/metadata.csv": "file_name,age,who\n1.png,1,a\n"}, "",
        "no column of labels, such as label, labels, class, target, y; its columns are file_name, age, who",
    ),
    "names alone": (PAIR, {"p/metadata.csv": "file_name\n1.png\n"}, "", "its columns are file_name, and no others"),
    "no rows": (PAIR, {"p/metadata.csv": HEAD}, "", "p/metadata.csv has no rows"),
    "too many values": (PAIR, {"p/metadata.csv": HEAD + "1.png,a,b\n"}, "", "line 2 has 3 values for 2 columns"),
    "equal names": (PAIR, {"p/metadata.csv": "file_name,label,label\n1.png,a,b\n"}, "", "two columns have the same name"),
    "no UTF-8": (PAIR, {"p/metadata.csv": (HEAD + "1.png,\xe9\n").encode("latin-1")}, "", "cannot be read as UTF-8 text"),
    "no JSON": (PAIR, {"p/metadata.jsonl": '{"file_name": "1.png"\n'}, "", "p/metadata.jsonl, line 1: not JSON"),
    "no object": (PAIR, {"p/metadata.jsonl": "[1]\n"}, "", "line 1 must be a JSON object, such as"),
    "other columns": (
        PAIR, {"p/metadata.jsonl": '{"file_name": "1.png", "label": 1}\n{"file_name": "2.png", "age": 1}\n'}, "",
        "line 2: column 'age' is not in all rows; all rows need the same columns",
    ),
    "words for numbers": (
        PAIR, {"p/metadata.csv": HEAD + "1.png,1\n2.png,two\n"}, "data.task=regression", "column 'label' must have numbers",
    ),
    "no numbers": (
        PAIR, {"p/metadata.csv": "file_name,who\n1.png,ann\n"}, "data.task=regression", "p/metadata.csv: no column of numbers, such as",
    ),
    "a gap in numbers": (
        PAIR, {"p/metadata.csv": "file_name,age\n1.png,1\n2.png,\n"}, "data.task=regression", "'2.png' has no value in column 'age'",
    ),
    "numbers beyond 1": (
        PAIR, {"p/metadata.csv": HEAD + "1.png,1\n2.png,2\n"}, "data.task=multilabel", "targets must be 0 or 1",
    ),
    "ragged lists": (
        PAIR, {"p/metadata.jsonl": '{"file_name": "1.png", "label": [1, 0]}\n{"file_name": "2.png", "label": [1]}\n'},
        "data.task=multilabel", "column 'label' must have 0 and 1, or lists of 0 and 1",
    ),
    "numbers for classes": (
        PAIR, {"p/metadata.csv": HEAD + "1.png,1\n2.png,0.5\n"}, "",
        "column 'label' has numbers with fractions, not names of classes; set data.task=regression",
    ),
    "lists for classes": (
        PAIR, {"p/metadata.jsonl": '{"file_name": "1.png", "label": [1, 0]}\n'}, "",
        "column 'label' has lists, not names of classes; set data.task=multilabel",
    ),
    "a language": (PAIR, {}, "data.task=language", "data.task=language: needs texts; set data.text=COLUMN"),
}  # fmt: skip


def write(pictures, texts=()):
    for number, path in enumerate(map(Path, pictures)):
        path.parent.mkdir(parents=True, exist_ok=True)
        size = 6 if path.stem == "large" else 4
        Image.fromarray(np.full((size, size), number, np.uint8)).save(path)
    for path, text in dict(texts).items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(text if isinstance(text, bytes) else text.encode())


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_mistake_is_one_line(cli, mistake):
    pictures, texts, words, expected = MISTAKES[mistake]
    write(pictures, texts)
    given = words.split() if "data=" in words else ["data=mine", "data.path=p", *words.split()]
    done = cli("run", *given, "model=mlp", "rounds=1", "out=run", "--quiet")
    assert done.code == 2, done
    assert expected in done.err
    assert done.err.count("\n") == 1
    assert not Path("run").exists()


def test_a_run_on_domain_folders_has_one_client_per_domain(cli, caplog):
    write(f"p/{domain}/{c}/{i}.png" for domain in ("web", "shop", "studio") for c in ("mug", "bike") for i in range(8))
    done = cli(
        "run", "data=mine", "data.path=p", "data.owner=folder", "partition=natural", "model=mlp", "model.hidden=4", "rounds=1",
        "engine=sequential", "out=run",
    )  # fmt: skip
    assert done.code == 0, done
    assert "mine: 48 pictures in 2 classes and 3 domains" in caplog.messages
    assert '"shop"' in Path("run/partition.json").read_text()


def test_a_regression_on_pictures(cli, caplog):
    lines = [f"{i}.png,{i * 1.5},{'ab'[i % 2]}\n" for i in range(30)]
    write([f"p/{i}.png" for i in range(30)], {"p/metadata.csv": "file_name,age,who\n" + "".join(lines)})
    done = cli(
        "run", "data=mine", "data.path=p", "data.task=regression", "partition=natural", "model=mlp", "model.hidden=4", "rounds=1",
        "engine=sequential", "out=run",
    )  # fmt: skip
    assert done.code == 0, done
    assert "mine: 30 pictures with 1 target (age)" in caplog.messages
