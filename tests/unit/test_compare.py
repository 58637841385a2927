"""`fedloom.tools.compare`: the runs of a comparison, and resuming one."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from fedloom import DataError
from fedloom.config.parsing import from_words, read_toml
from fedloom.errors import ConfigError, RunFolderError
from fedloom.tools.compare import create_folder, execute, plan, reopen

TINY = (
    "rounds=2",
    "clients=3",
    "model=mlp",
    "model.hidden=8",
    "data.rows=120",
    "engine.name=sequential",
    "engine.threads=1",
)


def rows(*words: str):
    return {row.label: row.method for row in plan(from_words(words)).rows}


def test_lists_of_methods_and_seeds():
    found = plan(from_words(["method=fedavg,local", "seed=0,2"]))
    assert [row.label for row in found.rows] == ["fedavg", "local"]
    assert found.seeds == (0, 2)
    jobs = found.jobs(Path("out"))
    assert [(job.label, job.seed) for job in jobs] == [("fedavg", 0), ("local", 0), ("fedavg", 2), ("local", 2)]
    assert jobs[-1].folder == Path("out/local-seed2")


def test_lists_may_be_toml_lists():
    assert plan({"method": ["fedavg", "local"], "seed": [3]}).seeds == (3,)


def test_common_hyper_parameters_reach_those_that_have_them():
    found = rows("method=fedavg,fedprox", "method.lr=0.3", "method.mu=0.7")
    assert found["fedavg"]["lr"] == found["fedprox"]["lr"] == 0.3
    assert found["fedprox"]["mu"] == 0.7
    assert "mu" not in found["fedavg"]


def test_the_more_special_table_wins():
    words = ("method=fedavg,fedprox,v", "method.lr=0.3", "fedprox.lr=0.2", "fedprox.mu=0.5", "variant.v.method=fedprox")
    found = rows(*words, "variant.v.mu=0.9")
    assert [found[name]["lr"] for name in ("fedavg", "fedprox", "v")] == [0.3, 0.2, 0.2]
    assert [found[name]["mu"] for name in ("fedprox", "v")] == [0.5, 0.9]


def test_several_values_give_a_row_each():
    found = rows("method=fedavg,fedprox", "method.lr=0.3,0.1", "fedprox.mu=[0.5, 1e-5]")
    assert list(found) == [
        "fedavg-lr0.3", "fedavg-lr0.1",
        "fedprox-lr0.3-mu0.5", "fedprox-lr0.3-mu1e-05", "fedprox-lr0.1-mu0.5", "fedprox-lr0.1-mu1e-05",
    ]  # fmt: skip
    assert (found["fedprox-lr0.1-mu1e-05"]["lr"], found["fedprox-lr0.1-mu1e-05"]["mu"]) == (0.1, 1e-5)
    assert list(rows("method=fedmr", "method.secure=true,false", "method.optimizer=sgd,adam")) == [
        "fedmr-secure-true-optimizer-sgd", "fedmr-secure-true-optimizer-adam",
        "fedmr-secure-false-optimizer-sgd", "fedmr-secure-false-optimizer-adam",
    ]  # fmt: skip
    assert list(rows("variant.v.method=fedprox", "variant.v.mu=0.1,0.2", "fedprox.lr=0.1,")) == ["v-mu0.1", "v-mu0.2"]


def test_lists_that_are_one_value_or_text_stay_whole(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(
        "from dataclasses import dataclass\nfrom fedloom import Method\n"
        "@dataclass(frozen=True)\nclass Mine(Method):\n    sizes: tuple[int, ...] = ()\n    names: str = ''\n"
    )
    found = rows(f"method={file}:Mine", "Mine.sizes=[1, 2]", "Mine.names=a,b")
    assert (found["Mine"]["sizes"], found["Mine"]["names"]) == ((1, 2), "a,b")


def test_a_key_that_some_methods_lack_is_reported(caplog):
    rows("method=fedavg,fedprox", "method.mu=0.1")
    assert caplog.messages == ["method.mu: not for fedavg, which has no such hyper-parameter"]


def test_without_a_method_all_variants_are_compared():
    assert list(rows("variant.a.method=fedavg", "variant.b.method=local")) == ["a", "b"]


def test_own_methods_are_called_by_their_class(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(
        "from dataclasses import dataclass\nfrom fedloom import Method\n"
        "@dataclass(frozen=True)\nclass Mine(Method):\n    nu: float = 0.1\n"
    )
    found = rows(f"method=fedavg,{file}:Mine", "Mine.nu=0.4")
    assert found["Mine"]["name"] == f"{file}:Mine"
    assert found["Mine"]["nu"] == 0.4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "must name the methods to compare"),
        (("method=fedavg,fedavg",), "is given twice"),
        (("method=fedavg", "fedavg=3"), "fedavg=3: is a table"),
        (("method=fedavg", "fedprocks.mu=3"), "unknown key 'fedprocks'"),
        (("method=fedavg", "rounds=x"), "rounds=x: must be an integer"),
        (("method=fedavg", "method.lr=x"), "method.lr=x: must be a number"),
        (("method=fedavg,local", "seed=1,1"), "distinct integers"),
        (("method=fedavg", "method.lr=0.1,0.1"), "fedavg.lr=0.1,0.1: has a value twice"),
        (("method=fedavg", "method.lr=[]"), "fedavg.lr=: must not be empty"),
        (("method=fedavg", "method.lr=0.1,x"), "method.lr=x: must be a number"),
        (("method=fedavg", "rounds=5,10"), "rounds=5,10: all rows share this setting; run one comparison"),
        (("method=fedavg", "partition.alpha=0.1,1"), "partition.alpha=0.1,1: all rows share this setting"),
        (("method=v", "variant.v.method=4"), "must be the name of a method"),
        (("method=a/b", 'variant."a/b".method=fedavg'), "no such method or variant|letters, digits"),
    ],
)
def test_invalid_input_is_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        plan(from_words(words))


def test_a_written_comparison_reads_back_the_same(tmp_path):
    found = plan(from_words(["method=fedavg,v", "variant.v.method=fedprox", "method.lr=0.1,0.2", "seed=1,2", *TINY]))
    file = tmp_path / "compare.toml"
    file.write_text(found.toml())
    again = plan(read_toml(file))
    assert (again.rows, again.seeds) == (found.rows, found.seeds)
    here, there = (each.jobs(Path("x"))[0].settings for each in (found, again))
    assert here == there


def test_a_hyper_parameter_without_a_value_is_left_out_of_the_file(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from dataclasses import dataclass\nfrom fedloom import FedAvg\n\n@dataclass(frozen=True)\nclass Mine(FedAvg):\n"
        "    clip: float | None = None\n"
    )
    found = plan(from_words([f"method={mine}:Mine", *TINY]))
    file = create_folder(found, tmp_path / "out") / "compare.toml"
    assert plan(read_toml(file)).rows == found.rows


def test_variants_may_differ_in_their_transforms(tmp_path):
    words = ["variant.a.method=fedavg", "variant.a.uplink=int8", "variant.b.method=fedavg", "downlink=fp16", *TINY]
    found = plan(from_words(words))
    file = tmp_path / "compare.toml"
    file.write_text(found.toml())
    for each in (found, plan(read_toml(file))):
        settings = [job.settings for job in each.jobs(Path("x"))]
        assert [s.uplink for s in settings] == [("int8",), ()]
        assert [s.downlink for s in settings] == [("fp16",), ("fp16",)]
    with pytest.raises(ConfigError, match="uplink=int9"):
        plan(from_words(["variant.a.method=fedavg", "variant.a.uplink=int9"]))


def test_trouble_shows_before_anything_is_written(tmp_path):
    found = plan(from_words(["method=fedavg,local", "clients=500", "data.rows=100"]))
    with pytest.raises(DataError, match="clients=500"):
        create_folder(found, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_target_is_checked_against_the_metric_before_anything_is_written(tmp_path):
    found = plan(from_words(["method=fedavg,local", "eval.target=80", *TINY]))
    with pytest.raises(
        ConfigError, match=r"eval\.target=80: must be above 0 and at most 1, because accuracy is a fraction"
    ):
        create_folder(found, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_interrupted_comparison_resumes_with_the_same_results(tmp_path):
    words = ["method=local,fedavg", "checkpoint_every=1", "rounds=3", *TINY[1:]]
    found = plan(from_words(words))
    whole, cut = (create_folder(found, tmp_path / name) for name in ("whole", "cut"))
    execute(found, whole)

    def interrupt(job):
        def stop(done, rounds, row):
            if job.label == "fedavg" and done == 2:
                raise KeyboardInterrupt

        return stop

    with pytest.raises(KeyboardInterrupt):
        execute(found, cut, interrupt)
    ran = []
    assert execute(reopen(cut)[cut], cut, lambda job: ran.append(job.label)) == [
        cut / "local-seed0",
        cut / "fedavg-seed0",
    ]
    assert ran == ["fedavg"]
    for label in ("local", "fedavg"):
        one, other = (json.loads((f / f"{label}-seed0/summary.json").read_text()) for f in (whole, cut))
        assert one["personal_accuracy"] == other["personal_accuracy"]
        assert one["bytes_by_kind"] == other["bytes_by_kind"]


def test_only_the_folder_of_a_comparison_is_reopened(tmp_path):
    with pytest.raises(RunFolderError, match=r"it has no compare\.toml"):
        reopen(tmp_path)
    (tmp_path / "config.toml").touch()
    with pytest.raises(RunFolderError, match="single run"):
        reopen(tmp_path)


def test_the_shared_head_is_left_out_where_clients_share_no_body(tmp_path, caplog):
    comparison = plan(from_words(["method=local,fedper", "eval.shared_head=true", *TINY]))
    assert [job.settings.eval.shared_head for job in comparison.jobs(tmp_path)] == [False, True]
    comparison.check()
    assert "eval.shared_head: not for local" in caplog.text
    assert plan(tomllib.loads(comparison.toml())).base["eval"]["shared_head"] is True
    with pytest.raises(ConfigError, match="in no row do clients share a body"):
        plan(from_words(["method=local,fedproto", "eval.shared_head=true", *TINY])).check()
