"""`fedloom report`: tables and figures as files, by suffix; nothing is overwritten."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture
def run(tiny):
    assert tiny("run", "out=run", "--quiet").code == 0
    Path("run/report.html").unlink()
    return tiny.__closure__[0].cell_contents


def test_files_by_suffix_instead_of_the_page(run):
    for kind in ("csv", "md", "tex", "json"):
        done = run("report", "run", f"out=new/t.{kind}", f"clients=c.{kind}", "--quiet")
        assert (done.code, done.err) == (0, "")
        assert done.out == f"table   new/t.{kind}\nclients c.{kind}\n"
        assert Path(f"new/t.{kind}").read_text()
    assert run("report", "run", "out=run/page.html", "--quiet").code == 0
    assert len(json.loads(Path("c.json").read_text())["clients"]) == 4
    (row,) = json.loads(Path("new/t.json").read_text())["methods"]
    assert row["steps"] > 0
    assert (row["optimizer"], row["local_epochs"]) == (
        "sgd",
        1,
    )  # defaults of the method, which the settings do not contain
    assert "Defaults of the method" in Path("run/page.html").read_text()
    assert not Path("run/report.html").exists()
    for kind, start in (("svg", b"<?xml"), ("pdf", b"%PDF"), ("png", b"\x89PNG")):
        done = run("report", "run", f"plot=p.{kind}", "--quiet")
        assert (done.code, done.err) == (0, "")
        written = sorted(file.name for file in Path().glob(f"p*.{kind}"))
        assert sorted(done.out.removeprefix("plot    ").strip().split(", ")) == written
        assert {f"p.{kind}", f"p-uplink-and-downlink.{kind}", f"p-training-examples.{kind}"} < set(written)
        assert len(written) == Path("run/page.html").read_text().count("<figure")
        assert all(Path(name).read_bytes().startswith(start) for name in written)
    Path("q-uplink-and-downlink.svg").touch()
    mistakes = {
        "out=t.xlsx": "out=t.xlsx: must end in one of .html, .htm, .csv, .json, .md, .tex",
        "clients=c.html": "clients=c.html: must end in one of .csv, .json, .md, .tex",
        "plot=p.jpg": "plot=p.jpg: must end in one of .svg, .pdf, .png",
        "out=c.csv": "out=c.csv: cannot be written: the file exists; choose another name",
        "plot=p.png": "plot=p.png: cannot be written: the file exists; choose another name",
        "plot=q.svg": "plot=q-uplink-and-downlink.svg: cannot be written: the file exists; choose another name",
        "clients=none/c.csv": "clients=none/c.csv: cannot be written: folder none does not exist",
        "out=a.csv out=b.csv": "out=b.csv: out is given twice",
        "out=a.csv clients=./a.csv": "clients=./a.csv: is the same file as out",
        "out=a.csv network=4g --quiet": "only the page, the figures and the printed tables show times",
    }
    for words, message in mistakes.items():
        done = run("report", "run", *words.split())
        assert done.code == 2, words
        assert message in done.err
        assert done.err.count("\n") == 1
    assert not Path("a.csv").exists()
    assert not Path("q.svg").exists()
