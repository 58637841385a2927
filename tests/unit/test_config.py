"""Settings: every key is preserved in a file, and every mistake is named."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from pydantic import BaseModel
from torch import nn

import fedloom
from fedloom.config import settings
from fedloom.config.parsing import from_words, read_toml
from fedloom.config.settings import Named, Settings, make_method, make_settings, to_toml
from fedloom.errors import ConfigError
from fedloom.methods.registry import METHODS

UNUSUAL = {
    "method": {"name": "fedprox", "mu": 0.5},
    "data": {
        "name": "mine", "path": "somewhere", "task": "regression", "owner": "folder", "rows": 77, "image_size": 12,
        "normalise": "standard", "augment": "flip",
        "label": "income", "classes": ["low", "high"],
        "columns": ["age", "job"], "drop": ["id"], "split": "fold", "missing": "fill", "missing_values": ["-9"],
        "decimal": ",", "encoding": "latin-1", "preprocess": "p.json", "factor": "code", "factor_clients": 5,
        "features": True, "revision": "0123456789" * 4,
        "text": ["title", "body"], "tokens": "chars", "case": "lower", "vocabulary": 500, "min_count": 3, "length": 20,
    },
    "partition": {
        "name": "natural", "alpha": 3.5, "classes_per_client": 4, "balance": True, "column": "writer", "bins": 5,
        "min_examples": 3, "merge": False, "test_fraction": 0.4,
    },
    "common_model": {"name": "mlp", "hidden": 3},
    "clients": 7, "participation": "0.2-0.9", "cohort": 3, "min_clients": 2, "rounds": 4, "batch_size": 5, "drop_last": True,
    "model": {"name": "mlp", "hidden": 9}, "models": ["mlp", "logistic"], "width": 6, "same_init": False, "eval_every": 2,
    "eval": {"general_every": 2, "clients": 3, "valid": 0.2, "fitted": True, "shared_head": True, "target": 0.9},
    "devices": {"dropout": 0.1, "slow": 0.2, "slowdown": 8.0, "stragglers": "drop"}, "join": {"clients": 2, "turns": 5},
    "screen": {"norm": 7.5, "max_share": 0.3},
    "engine": {
        "name": "debug+ray", "threads": 2, "workers": 3, "address": "[::1]:6379", "deadline_s": 9.5,
    },
    "precision": "fp64", "seed": 11, "checkpoint_every": 3, "out": "there", "label": "a name", "log": ["wandb"],
    "uplink": ["topk:0.5", "int8"], "downlink": ["bf16"], "aggregate": "clip:2",
    "schedule": {"name": "step", "warmup": 1, "at": [2, 3], "factor": 0.5}, "stop": {"patience": 3, "after": 2},
    "privacy": {"noise": 1.5, "epsilon": 3.0, "delta": 1e-4, "clip": 0.5, "clips": {"control": 2.0}, "adapt": 0.6},
}  # fmt: skip


OTHER = UNUSUAL | {
    "partition": {"name": "file", "path": "p.json"},
    "engine": {"name": "vectorised", "lanes": 4, "device": "cuda:1", "device_bytes": 10, "convolutions": "tuned"},
    "precision": "tf32",
    "schedule": {"name": "step", "every": 2},
}
"""Settings that conflict with those of another engine."""
THIRD = UNUSUAL | {
    "partition": {"name": "extended", "by": "age", "repair": True, "class_floor": 2},
    "schedule": {"name": "cosine", "floor": 0.1},
}
"""Settings that conflict with those of another partition or schedule."""


def paths(model: BaseModel, prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for name in type(model).model_fields:
        value = getattr(model, name)
        found |= paths(value, f"{prefix}{name}.") if isinstance(value, BaseModel) else {prefix + name: value}
    return found


def test_the_unusual_settings_differ_from_the_defaults_in_every_key():
    default, *unusual = (
        paths(settings) for settings in (Settings(), make_settings(UNUSUAL), make_settings(OTHER), make_settings(THIRD))
    )
    same = [key for key in default if all(default[key] == other[key] for other in unusual)]
    assert same == [], "add new keys to UNUSUAL"


@pytest.mark.parametrize("values", [UNUSUAL, OTHER])
def test_every_key_survives_a_file(tmp_path, values):
    settings = make_settings(values)
    (tmp_path / "settings.toml").write_text(to_toml(settings))
    again = make_settings(read_toml(tmp_path / "settings.toml"))
    assert again == settings
    assert again.method.options == {"mu": 0.5}


def test_the_defaults_survive_a_file(tmp_path):
    (tmp_path / "settings.toml").write_text(to_toml(Settings()))
    assert make_settings(read_toml(tmp_path / "settings.toml")) == Settings()


@pytest.mark.parametrize("name", METHODS)
def test_every_hyper_parameter_survives_a_file(tmp_path, name):
    method = METHODS[name]()
    settings = make_settings({"method": {"name": name, **dataclasses.asdict(method)}})
    (tmp_path / "settings.toml").write_text(to_toml(settings))
    assert make_method(make_settings(read_toml(tmp_path / "settings.toml")).method) == method


def test_every_key_is_documented():
    for section in (
        Settings,
        settings.DataSettings,
        settings.PartitionSettings,
        settings.EvalSettings,
        settings.EngineSettings,
    ):
        for name, field in section.model_fields.items():
            nested = isinstance(field.default, BaseModel) and not isinstance(field.default, Named)
            assert nested or field.description, f"{section.__name__}.{name}"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["rounds=3", "seed=1"], {"rounds": 3, "seed": 1}),
        (["data=digits", "data.rows=5"], {"data": {"name": "digits", "rows": 5}}),
        (["data.rows=5", "data=digits"], {"data": {"rows": 5, "name": "digits"}}),
        (["method=fedprox", "method.mu=1e-2"], {"method": {"name": "fedprox", "mu": 0.01}}),
        (["method=fedprox", "method.mu=1", "method=fedavg"], {"method": {"name": "fedavg"}}),
        (["data=mnist", "data.rows=5", "data.path=x", "data=cifar10"], {"data": {"rows": 5, "name": "cifar10"}}),
        (["data=mine", "data.path=x", "data.owner=folder", "data=cifar10"], {"data": {"name": "cifar10"}}),
        (
            ["partition=natural", "partition.column=writer", "partition.merge=false", "partition=iid"],
            {"partition": {"merge": False, "name": "iid"}},
        ),
        (["engine=ray", "engine.address=auto", "engine=sequential"], {"engine": {"name": "sequential"}}),
        (["participation=0.1-0.5"], {"participation": "0.1-0.5"}),
        (["models=mlp,resnet8"], {"models": "mlp,resnet8"}),
        (["drop_last=true"], {"drop_last": True}),
        (["data.path=/tmp/a=b"], {"data": {"path": "/tmp/a=b"}}),
        (["label="], {"label": ""}),
        (["label=7", "out=2026-01-31"], {"label": "7", "out": "2026-01-31"}),
        (['label="a=b"', "partition.column=1e3"], {"label": "a=b", "partition": {"column": "1e3"}}),
        (["model=mlp", "model.hidden=9", "models=mlp,logistic"], {"models": "mlp,logistic"}),
    ],
)
def test_words_of_the_command_line(words, expected):
    assert from_words(words) == expected


def test_words_go_over_a_file(tmp_path):
    (tmp_path / "c.toml").write_text('data = "digits"\nrounds = 3\n[method]\nname = "fedprox"\nmu = 1.0\n')
    values = from_words(["rounds=5", "method.mu=2"], read_toml(tmp_path / "c.toml"))
    settings = make_settings(values)
    assert (settings.rounds, settings.data.name, settings.method.options) == (5, "digits", {"mu": 2})


MISTAKES = [
    (["roundz=3"], ["roundz", "did you mean 'rounds'"]),
    (["strategy=3"], ["'strategy'", "known"]),
    (["floats=3"], ["'floats'"]),
    (["eval.stride=3"], ["'eval.stride'"]),
    (["data.rowz=3"], ["data.rowz", "'rows'"]),
    (["partition.alfa=3"], ["partition.alfa", "alpha"]),
    (["rounds=many"], ["rounds=many", "integer"]),
    (["rounds=0"], ["rounds=0", "at least 1"]),
    (["rounds=2.5"], ["rounds=2.5", "integer"]),
    (["seed=-1"], ["seed=-1", "at least 0"]),
    (["batch_size=0"], ["batch_size=0", "at least 1"]),
    (["partition.alpha=0"], ["partition.alpha=0", "above 0"]),
    (["partition.name=dirichle"], ["partition", "dirichle", "dirichlet"]),
    (["partition.test_fraction=1"], ["partition.test_fraction=1", "below 1"]),
    (["precision=fp16"], ["precision=fp16", "fp32", "fp64"]),
    (["participation=0"], ["participation=0", "above 0", "at most 1"]),
    (["participation=1.5"], ["participation=1.5", "at most 1"]),
    (["participation=0.9-0.1"], ["participation=0.9-0.1", "range"]),
    (["participation=half"], ["participation=half", "range"]),
    (["participation=nan"], ["participation=nan"]),
    (["log=tensorbord"], ["log", "tensorbord", "tensorboard"]),
    (["clients=10", "cohort=11"], ["cohort=11", "10 clients"]),
    (["eval.valid=1.5"], ["eval.valid=1.5", "below 1"]),
    (["drop_last=perhaps"], ["drop_last=perhaps", "true or false"]),
    (["devices.slowdown=inf"], ["devices.slowdown=inf", "finite"]),
    (["rounds=2026-01-31"], ["rounds=2026-01-31", "integer"]),
]


@pytest.mark.parametrize(("words", "parts"), MISTAKES, ids=lambda value: " ".join(value))
def test_a_mistake_is_one_line_that_names_key_value_and_what_is_allowed(words, parts):
    with pytest.raises(ConfigError) as caught:
        make_settings(from_words(words))
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize("word", ["rounds", "=3", ""])
def test_a_word_that_is_not_a_setting_is_named(word):
    with pytest.raises(ConfigError, match=f"'{word}': expected key=value"):
        from_words([word])


METHOD_MISTAKES = [
    ({"name": "fedprx"}, ["method=fedprx", "did you mean 'fedprox'"]),
    ({"name": "fedprox", "nu": 1}, ["method.nu", "fedprox has no such hyper-parameter"]),
    ({"name": "fedprox", "mu": "big"}, ["method.mu=big", "number"]),
    ({"name": "fedavg", "lr": 0}, ["method", "lr=0", "above 0"]),
    ({"name": "fedavg", "momentum": 1.0}, ["momentum=1.0", "below 1"]),
    ({"name": "fedavg", "optimizer": "sdg"}, ["method.optimizer=sdg", "sgd"]),
    ({"name": "fedavg", "local_epochs": 0}, ["local_epochs=0", "at least 1"]),
    ({"name": "fedavg", "lr_decay": 1.1}, ["lr_decay=1.1", "at most 1"]),
    ({"name": "fedmr", "unit": "leyer"}, ["method.unit=leyer", "layer"]),
    ({"name": "fedmr", "segment": 0}, ["segment=0", "above 0"]),
    ({"name": "scaffold", "momentum": 0.9}, ["plain SGD"]),
    ({"name": "fedrir", "mask_ratio": 1}, ["mask_ratio=1", "below 1"]),
    ({"name": "fedrir", "loss_region": "masked", "mcsl": "off"}, ["loss_region=masked", "mcsl=masked"]),
]


@pytest.mark.parametrize(("table", "parts"), METHOD_MISTAKES, ids=lambda value: str(value))
def test_a_mistake_in_a_method_is_named(table, parts):
    with pytest.raises(ConfigError) as caught:
        make_method(Named(**table))
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_a_missing_and_a_broken_file_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"config file .*none\.toml does not exist"):
        read_toml(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("rounds = = 3")
    with pytest.raises(ConfigError, match=r"bad\.toml"):
        read_toml(tmp_path / "bad.toml")
    with pytest.raises(ConfigError):
        read_toml(tmp_path)


def test_settings_are_read_only():
    with pytest.raises(ValueError, match="frozen"):
        Settings().rounds = 3
    assert isinstance(make_settings({"out": "x"}).out, Path)


def test_a_small_participation_is_not_a_range():
    assert settings.participation_range(make_settings({"participation": 1e-5}).participation) == (1e-5, 1e-5)
    assert settings.participation_range("0.1-0.5") == (0.1, 0.5)


def test_a_key_beside_its_table_is_explained(tmp_path):
    """TOML does not allow this, and its own message states no remedy."""
    file = tmp_path / "study.toml"
    file.write_text('method = ["fedavg", "fedmr"]\n[method]\nlr = 0.1\n')
    with pytest.raises(ConfigError, match=r"twice.*set `name = ...` inside the table"):
        read_toml(file)
    file.write_text('[method]\nname = ["fedavg", "fedmr"]\nlr = 0.1\n')
    assert read_toml(file)["method"] == {"name": ["fedavg", "fedmr"], "lr": 0.1}


def test_objects_from_python_are_checked_too():
    with pytest.raises(
        ConfigError, match=r"method: must be a method object, such as FedAvg\(\), or a name, not FedAvg$"
    ):
        fedloom.run(fedloom.FedAvg)
    with pytest.raises(
        ConfigError, match=r"data: must be a name, or a data set from fedloom\.from_arrays\(x, y\), not ndarray"
    ):
        fedloom.run(data=np.zeros((3, 2)))
    with pytest.raises(ConfigError, match="models: cannot be combined with `model`"):
        fedloom.run(model=nn.Linear(2, 2), models=["mlp", "logistic"])
