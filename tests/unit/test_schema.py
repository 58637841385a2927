"""The JSON schema of config files, which accepts what fedloom accepts and detects what fedloom refuses."""

import tomllib
from pathlib import Path

import pytest

from fedloom.cli.keys import keys
from fedloom.config.schema import config_schema
from fedloom.methods.registry import METHODS

jsonschema = pytest.importorskip("jsonschema")
ROOT = Path(__file__).parents[2]
FILES = [*(ROOT / "configs").rglob("*.toml"), *(ROOT / "src/fedloom/config/demo").glob("*.toml")]


@pytest.fixture(scope="module")
def validator():
    schema = config_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_config_file_of_the_repository_is_valid(validator, file):
    validator.validate(tomllib.loads(file.read_text()))


@pytest.mark.parametrize(
    "text",
    [
        'method = ["fedavg", "fedmr+fedprox", "my.py:Mine"]\nseed = [0, 1]',
        'method = {name = "my.py:Mine", depth = 3}',
        'tune = {search = "halving", candidates = 4}\nfedavg.lr = [0.1, 0.2]\nfedprox = {lr = "0.1,0.2", mu = "0.01..1"}',
        'models = "mlp,fedavg_cnn"\nuplink = ["topk:0.1", "int8"]',
        'data = "digits"\npartition = "iid"\nparticipation = "0.1-1.0"\n"engine.lanes" = 4',
        'model = {name = "mlp", hidden = 8, lora = 2}\n[fedrir]\nlr = 0.1\n[variant.a]\nmethod = "fedrir"\nmcsl = "off"',
    ],
)
def test_valid_files_are_valid(validator, text):
    validator.validate(tomllib.loads(text))


@pytest.mark.parametrize(
    "text",
    [
        "rouns = 5", "rounds = 0", 'rounds = "5"', 'method = {name = "fedrir", lrr = 1}', 'model = {name = "mlp", hiden = 3}',
        'data.normalise = "x"', 'partition = "iidd"', "engine.lanes = 0", '"data.rows" = "x"', "fedrir.lr = 0",
        '[variant.a]\nmethod = "fedrir"\nmcsl = "y"', "[variant.a]\nlr = 0.1", "screen.nrom = 3", "seed = [-1]",
        'tune.search = "x"', 'fedavg.lr = ["x"]',
    ],
)  # fmt: skip
def test_mistakes_are_found(validator, text):
    assert list(validator.iter_errors(tomllib.loads(text)))


def test_every_setting_and_hyper_parameter_is_described():
    schema = config_schema()
    known = schema["properties"]
    assert [key.name for key in keys() if not (known.get(key.name, {}).get("description") or key.name in known)] == []
    assert all(known[f"data.{key}"]["description"] for key in ("path", "rows", "normalise"))
    assert known["fedmr"]["properties"]["unit"]["anyOf"][0]["enum"] == ["layer", "tensor", "block", "segment"]
    assert set(METHODS) <= set(known)
