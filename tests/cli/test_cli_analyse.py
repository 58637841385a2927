"""`fedloom analyse`, and its results in the report."""

import json
from pathlib import Path

import pytest

PNG = b"\x89PNG"
SMALL = (
    "data.rows=160",
    "clients=3",
    "rounds=2",
    "model=mlp",
    "model.hidden=12",
    "engine=sequential",
    "partition.alpha=0.5",
)


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """Train the judge very briefly; its answers are tested elsewhere."""
    monkeypatch.setattr("fedloom.analysis.samples.CLASSIFIER_STEPS", 20)


def contents(folder):
    return {
        p.relative_to(folder): p.read_bytes()
        for p in Path(folder).rglob("*")
        if p.is_file() and "analysis" not in p.parts
    }


def test_one_run_with_every_part(cli):
    cli("run", "method=fedvtc", *SMALL, "width=8", "out=vtc", "--quiet")
    before = contents("vtc")
    done = cli("analyse", "vtc")
    assert done.code == 0
    assert contents("vtc") == before
    assert "Linear probes on features" in done.out
    assert "Generated images" in done.out
    assert "vtc: skipped sharpness: the method has no server model" in done.out
    found = json.loads(Path("vtc/analysis/analysis.json").read_text())
    assert found["pictures"].keys() == {"features-own.png", "features-same.png", "samples.png", "nearest.png"}
    assert all(Path("vtc/analysis", name).read_bytes().startswith(PNG) for name in found["pictures"])
    assert cli("report", "vtc", "--quiet").code == 0
    page = Path("vtc/report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert "Generated images" in page


def test_parts_are_replaced_one_by_one(cli):
    cli("run", "method=fedrir", *SMALL, "out=rir", "--quiet")
    assert cli("analyse", "rir", "--only", "features").code == 0
    first = json.loads(Path("rir/analysis/analysis.json").read_text())
    assert "samples" not in first
    assert cli("analyse", "rir", "--only", "samples", "--quiet").out == ""
    both = json.loads(Path("rir/analysis/analysis.json").read_text())
    assert both["features"] == first["features"]
    assert both["samples"]["rebuilt"]["ssim"]["n"] > 0
    assert {"features-own.png", "samples.png"} <= both["pictures"].keys()


def test_parts_that_need_classes_are_skipped_in_a_regression(cli):
    cli("run", "data=diabetes", "model=logistic", "clients=3", "rounds=1", "partition=iid", "out=numbers", "--quiet")
    done = cli("analyse", "numbers")
    assert done.code == 0
    assert "numbers: skipped features: needs classes, but data=diabetes is regression" in done.out
    assert "numbers: skipped samples: needs classes" in done.out
    assert json.loads(Path("numbers/analysis/analysis.json").read_text())["sharpness"]["loss"] > 0


def test_curves_of_a_comparison(cli):
    cli("compare", "method=fedavg,local,fedmr", *SMALL, "out=all", "--quiet")
    done = cli("analyse", "all", "--only", "sharpness")
    assert done.code == 0
    assert "local-seed0: skipped sharpness" in done.out
    assert Path("all/analysis-sharpness.png").read_bytes().startswith(PNG)
    assert cli("analyse", "all/fedavg-seed0", "all/fedmr-seed0", "--only", "sharpness", "out=two.svg").code == 0
    assert "<svg" in Path("two.svg").read_text()
    cli("report", "all", "--quiet")
    assert "Loss around the server" in Path("all/report.html").read_text()


def test_a_page_shows_only_pictures_of_the_analysis(cli):
    cli("run", "method=fedavg", *SMALL, "out=one", "--quiet")
    folder = Path("one/analysis")
    folder.mkdir()
    Path("one/secret.png").write_bytes(PNG + b"\r\n\x1a\nsecret")
    (folder / "text.png").write_text("no picture")
    listed = {name: {"title": "x", "note": ""} for name in ("../secret.png", "text.png", "gone.png")}
    (folder / "analysis.json").write_text(
        json.dumps({"pictures": listed, "features": "nonsense", "sharpness": {"curves": None}})
    )
    assert cli("report", "one", "--quiet").code == 0
    assert "data:image/png" not in Path("one/report.html").read_text()


def test_a_folder_that_takes_no_analysis_is_named(cli):
    cli("run", "method=fedavg", *SMALL, "out=one", "--quiet")
    Path("one/analysis").touch()
    done = cli("analyse", "one", "--only", "sharpness")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "one/analysis is not writable: File exists" in done.err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ((), "give the folder of a run"),
        (("nowhere",), "'nowhere' does not exist"),
        (("one", "--only", "sharpnes"), "unknown part 'sharpnes' (did you mean 'sharpness'?)"),
        (("one", "oud=x.png"), "unknown key 'oud' (did you mean 'out'?)"),
        (("one", "--onlly", "samples"), "has no option --onlly (did you mean '--only'?)"),
        (("one",), "this run has no checkpoint"),
    ],
)
def test_mistakes_end_in_one_line(cli, words, line):
    if "one" in words:
        cli("run", "method=fedavg", *SMALL, "checkpoint_every=0", "out=one", "--quiet")
    done = cli("analyse", *words)
    assert done.code == 2
    assert line in done.err
    assert done.err.count("\n") == 1
