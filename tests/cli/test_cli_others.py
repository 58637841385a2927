"""`fedloom` without arguments, `list`, `partition` and `check`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fedloom import tree
from fedloom.config.parsing import read_toml
from fedloom.config.settings import make_method
from fedloom.methods.registry import METHODS, load_object
from fedloom.models import ZOO
from fedloom.tools.check import check_method
from fedloom.tools.compare import plan

CONFIGS = Path(__file__).parents[2] / "configs"
COMMANDS = ("run", "compare", "report", "analyse", "list", "partition", "check")


@pytest.mark.parametrize("words", [(), ("--help",), ("help",)])
def test_overview_names_every_command(cli, words):
    done = cli(*words)
    assert done.code == 0
    assert all(f"\n  {command} " in done.out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(cli, command):
    done = cli(command, "--help")
    assert done.code == 0
    assert done.out.count(f"  fedloom {command} ") >= 2


def test_list_methods(cli):
    shown = cli("list", "methods").out
    assert all(name in shown for name in METHODS)
    fedrir = next(m for m in json.loads(cli("list", "methods", "--json").out) if m["name"] == "fedrir")
    assert fedrir["sent"] == ["gfe"]
    assert fedrir["venue"] == "WWW 2025"
    assert fedrir["hyper_parameters"]["mask_ratio"]["default"] == 0.6


def test_one_method_in_full(cli):
    done = cli("list", "methods", "fedmr")
    assert "method.unit" in done.out
    assert "layer | tensor | block | segment" in done.out
    assert "Sent: A whole model" in done.out


def test_list_datasets_says_what_is_found(cli, monkeypatch):
    Path("store/mnist").mkdir(parents=True)
    Path("store/mnist/train.parquet").touch()
    monkeypatch.setenv("FEDLOOM_DATA", "store")
    found = {d["name"]: d["found"] for d in json.loads(cli("list", "datasets", "--json").out)}
    assert found["digits"] == "embedded"
    assert found["mnist"] == "store/mnist"
    assert found["cifar10"] is None


def test_list_models_and_engines(cli):
    models = {m["name"]: m for m in json.loads(cli("list", "models", "--json").out)}
    assert models.keys() == ZOO.keys()
    assert models["mlp"]["options"] == {"hidden": 200}
    assert models["table_mlp"]["inputs"] == ["category", "number"]
    assert "hidden=200" in cli("list", "models", "mlp").out
    engines = {e["name"] for e in json.loads(cli("list", "engines", "--json").out)}
    assert {"auto", "sequential", "debug", "bytes"} <= engines


def test_partition_shows_saves_and_draws(cli):
    done = cli("partition", "clients=4", "data.rows=200", "out=p.json", "plot=p.png")
    assert done.code == 0
    saved = json.loads(Path("p.json").read_text())
    assert saved["hash"] in done.out
    assert len(saved["train"]) == 4
    assert Path("p.png").read_bytes().startswith(b"\x89PNG")
    again = cli("partition", "partition=file", "partition.path=p.json", "data.rows=200")
    assert saved["hash"] in again.out


def test_a_configs_out_is_that_of_its_run(cli):
    Path("run.toml").write_text('clients = 4\nout = "mine"\n[data]\nname = "digits"\nrows = 200\n')
    assert cli("partition", "run.toml").code == 0
    assert not Path("mine").exists()
    assert cli("partition", "run.toml", "out=p.json").code == 0
    assert Path("p.json").is_file()


def test_partition_of_a_comparison_is_that_of_its_first_seed(cli):
    shown = cli("partition", str(CONFIGS / "digits.toml"))
    assert shown.code == 0, shown.err
    assert shown.out == cli("partition", str(CONFIGS / "digits.toml"), "seed=0").out


def test_long_partitions_are_shortened(cli):
    lines = cli("partition", "clients=60", "partition=iid").out.splitlines()
    assert len(lines) < 45
    assert any(line.startswith("…") or line.strip().startswith("…") for line in lines)
    assert any(line.split()[:1] == ["59"] for line in lines)


def test_check_prints_a_list_and_sets_its_exit_code(cli):
    Path("own.py").write_text(
        "from dataclasses import dataclass\nfrom fedloom import Method\n\n"
        "@dataclass(frozen=True)\nclass Good(Method):\n    pass\n\n"
        "class Bad(Method):\n    mu: float = 1.0\n"
    )
    good = cli("check", "own.py:Good")
    assert (good.code, good.out.count("✓")) == (0, 7)
    every = cli("check", "own.py", "--json")
    assert every.code == 1
    found = json.loads(every.out)
    assert found.keys() == {"own.py:Good", "own.py:Bad"}
    assert "put @dataclass(frozen=True) above Bad" in found["own.py:Bad"][0]["note"]


@pytest.mark.parametrize("file", sorted(CONFIGS.rglob("*.toml")), ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_the_configs_that_come_along_are_valid(file):
    jobs = plan(read_toml(file)).jobs(Path())
    assert jobs
    for job in jobs:
        make_method(job.settings.method)


def test_the_example_keeps_the_contract_and_is_fedavg_without_momentum(experiment):
    file = CONFIGS.parent / "examples/my_method.py"
    mine = load_object(f"{file}:HeavyBall", "method")
    run, plain = experiment(mine(beta=0.0)), experiment("fedavg")
    for each in (run, plain):
        each.run()
    pairs = (run.server["weights"], plain.server["weights"])
    tree.map_tree(lambda p, q: torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13) or p, *pairs)
    shown = (CONFIGS.parent / "README.md").read_text().partition("class HeavyBall")[2].partition("```")[0].splitlines()
    assert len(shown) > 10
    assert set(shown) <= set(file.read_text().partition("class HeavyBall")[2].splitlines())
    assert not any(rule.kept is False for rule in check_method(f"{file}:HeavyBall"))


def test_a_report_has_no_other_form_than_those_listed(cli, tiny):
    assert tiny("run", "--quiet", "out=mine").code == 0
    done = cli("report", "mine", "out=t.xlsx")
    assert done.code == 2
    assert all(f".{suffix}" in done.err for suffix in ("html", "csv", "tex", "md", "json"))
    assert not Path("t.xlsx").exists()


def test_schema_is_printed_or_written_to_a_new_file(cli):
    printed = cli("schema")
    assert json.loads(printed.out)["$schema"].startswith("https://json-schema.org/")
    assert cli("schema", "out=s.json").out == "s.json\n"
    assert Path("s.json").read_text() == printed.out
    for words, message in (
        (["out=s.json"], "the file exists"),
        (["out="], "must not be empty"),
        (["x"], "expected out=FILE.json"),
    ):
        done = cli("schema", *words)
        assert (done.code, message in done.err) == (2, True)
