"""`fedloom compare` and `fedloom report`."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fedloom import config
from fedloom.cli.running import DEMO
from fedloom.config.parsing import read_toml
from fedloom.tools.compare import plan

STUDY = """
seed = [0, 1]
rounds = 2
model = "mlp"
clients = 4
engine = "sequential"
method = ["fedavg", "strong"]
[data]
rows = 200
[variant.strong]
method = "fedprox"
mu = 2.0
[variant.unused]
method = "local"
"""


def test_all_combinations_in_one_folder(tiny):
    done = tiny("compare", "method=local,fedavg", "seed=0,1", "out=both")
    assert done.code == 0
    names = {file.name for file in Path("both").iterdir()}
    assert names == {
        "compare.toml", "report.html", "local-seed0", "local-seed1", "fedavg-seed0", "fedavg-seed1"
    }  # fmt: skip
    assert "Difference to fedavg" in done.out
    assert done.err.startswith("methods  local, fedavg\nseeds    0, 1\nruns     4 of 2 rounds each\n")
    assert "folder   both\n" in done.err
    assert (
        "[1/4] local, seed 0: data digits, 149 training examples; clients 4, all in a round; steps about 16" in done.err
    )
    assert "[4/4] fedavg, seed 1: round 2/2" in done.err  # the rounds of this run
    HTMLParser().feed(Path("both/report.html").read_text())


def test_runs_of_a_seed_share_partition_and_start(tiny):
    tiny("compare", "method=fedavg,fedprox", "fedprox.mu=0", "seed=0,1", "out=both", "--quiet")
    summaries = [json.loads(file.read_text()) for file in sorted(Path("both").glob("*/summary.json"))]
    fedavg0, fedavg1, fedprox0, fedprox1 = summaries
    assert fedavg0["partition"] == fedprox0["partition"] != fedavg1["partition"]
    assert fedavg0["server_accuracy"] == fedprox0["server_accuracy"]
    assert fedavg1["server_accuracy"] == fedprox1["server_accuracy"]


def test_a_study_with_variants(cli):
    Path("study.toml").write_text(STUDY)
    done = cli("compare", "study.toml", "out=study")
    assert done.code == 0
    assert "strong" in done.out
    assert "unused" not in done.out
    assert "mu = 2.0" in Path("study/strong-seed1/config.toml").read_text()


def test_json_is_a_list_of_summaries(tiny):
    done = tiny("compare", "method=local,fedavg", "out=both", "--json")
    assert [summary["method"] for summary in json.loads(done.out)] == ["local", "fedavg"]


def test_resume_keeps_what_is_finished(tiny, cli):
    tiny("compare", "method=local,fedavg", "out=both", "--quiet")
    kept = Path("both/local-seed0/summary.json").stat().st_mtime_ns
    shutil.rmtree("both/fedavg-seed0")
    done = cli("compare", "--resume", "both")
    assert done.code == 0
    assert Path("both/local-seed0/summary.json").stat().st_mtime_ns == kept
    assert Path("both/fedavg-seed0/summary.json").exists()


def test_report_of_a_comparison(tiny, cli):
    tiny("compare", "method=local,fedavg", "out=both", "--quiet")
    Path("both/report.html").unlink()
    done = cli("report", "both", "baseline=local")
    assert done.code == 0
    assert "Difference to local" in done.out
    assert done.out.endswith("report  both/report.html\n")
    assert (
        cli("report", "both/local-seed0", "both/fedavg-seed0", "out=page.html", "--quiet").out == "report  page.html\n"
    )
    assert "local" in Path("page.html").read_text()
    assert cli("report", "both", "baseline=fedmr").code == 2


SHORT = 'rounds = 2\nclients = 4\nmodel = {name = "mlp", hidden = 8}\ndata.rows = 200\n'
"""The settings of `tiny` in a file, because the reading is omitted if arguments change the results."""


def two_files():
    Path("one.toml").write_text(
        f'{SHORT}method = ["local", "fedavg"]\ntitle = "Alone or together"\nreading = "Together is better."\n'
    )
    Path("two.toml").write_text(
        f'''{SHORT}method = ["fedavg", "fedprox"]\nseed = [0, 1]\nreading = """Both\nare alike."""\n'''
    )


def test_several_files_are_several_comparisons_in_one_report(cli):
    two_files()
    done = cli("compare", "one.toml", "two.toml", "out=all", "engine=sequential")
    assert done.code == 0, done.err
    order = [
        done.out.index(text)
        for text in ("Alone or together", "local", "Together is better.", "fedprox", "Both are alike.")
    ]
    assert order == sorted(order)
    assert done.out.endswith("folder  all\nreport  all/report.html\n")
    assert {path.name for path in Path("all").iterdir()} == {"one", "two", "report.html"}
    assert {path.name for path in Path("all/two").glob("*seed*")} == {
        f"{method}-seed{seed}" for method in ("fedavg", "fedprox") for seed in (0, 1)
    }
    page = Path("all/report.html").read_text()
    assert page.index("Alone or together") < page.index("Together is better.") < page.index("Both are alike.")
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_a_reading_is_left_out_if_arguments_change_the_results(cli):
    two_files()
    done = cli("compare", "one.toml", "seed=1", "out=one")
    assert "Together is better." not in done.out
    assert "comment in the config file is not shown, because the command line changes its settings: seed=1." in done.out


def test_the_demo_has_three_comparisons_of_its_own(cli):
    folder = Path(config.__file__).parent / "demo"
    for name in DEMO:
        comparison = plan(read_toml(folder / f"{name}.toml"))
        assert comparison.seeds == (0, 1, 2)
        assert comparison.title
        assert comparison.reading
        assert len(comparison.jobs(Path())) >= 12
    assert {path.stem for path in folder.iterdir()} == set(DEMO)
    assert cli("demo", "own.toml").err == (
        "fedloom: error: 'own.toml': fedloom demo has its own config files; expected key=value, such as seed=0\n"
    )
    assert cli("demo", "rounds=0").err.startswith("fedloom: error: rounds=0")


@pytest.mark.slow
def test_the_demo_writes_one_report_of_three_comparisons(cli):
    done = cli("demo", "rounds=1", "seed=0", "out=demo")
    assert done.code == 0, done.err
    assert {path.name for path in Path("demo").iterdir()} == {*DEMO, "report.html"}


def test_several_comparisons_are_resumed_together(cli):
    two_files()
    cli("compare", "one.toml", "two.toml", "out=all", "engine=sequential", "--quiet")
    kept = Path("all/one/local-seed0/summary.json").stat().st_mtime_ns
    shutil.rmtree("all/two/fedprox-seed1")
    done = cli("compare", "--resume", "all")
    assert done.code == 0
    assert "Together is better." in done.out
    assert Path("all/two/fedprox-seed1/summary.json").exists()
    assert Path("all/one/local-seed0/summary.json").stat().st_mtime_ns == kept


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("one.toml", "bad.toml"), "unknown key 'tilte' (did you mean 'title'?)"),
        (("one.toml", "number.toml"), "reading=7: must be text"),
        (("one.toml", "more/one.toml"), "'one': two config files have this name"),
        (("one.toml", "none.toml"), "none.toml"),
        (("one.toml", "two.toml", "out=there"), "out=there: already exists and is not an empty folder"),
    ],
)
def test_mistakes_in_one_of_several_files_leave_nothing_behind(tiny, words, message):
    two_files()
    Path("bad.toml").write_text('method = ["local", "fedavg"]\ntilte = "x"\n')
    Path("number.toml").write_text('method = ["local", "fedavg"]\nreading = 7\n')
    Path("more").mkdir()
    Path("more/one.toml").write_text('method = "local"\n')
    Path("there").mkdir()
    Path("there/mine.txt").touch()
    done = tiny("compare", *words)
    assert done.code == 2
    assert message in done.err
    assert not Path("runs").exists()
    assert [path.name for path in Path("there").iterdir()] == ["mine.txt"]
