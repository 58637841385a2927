"""Commands and imports, which load only what they use."""

from __future__ import annotations

import importlib
import inspect
import json
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest

import fedloom
from fedloom import lazy
from fedloom.cli import completing, deploying
from fedloom.methods import registry, source_facts
from fedloom.models import ZOO, option_defaults

HEAVY = ("torch", "numpy", "pandas", "pyarrow", "pydantic", "matplotlib", "scipy", "sklearn", "PIL")
LIGHT_COMMANDS = (
    "", "--help", "--version", "list methods", "list methods fedrir", "list datasets", "list models", "list models mlp",
    "list engines", "list transforms", "list methods --json",
)  # fmt: skip


def loaded(code: str, *modules: str) -> set[str]:
    """Return those of the modules that a new Python process has imported after `code`."""
    told = f"{code}\nimport sys; print(*[m for m in {modules!r} if m in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    return set(done.stderr.splitlines()[-1].split())


def test_importing_the_package_loads_nothing():
    assert loaded("import fedloom; dir(fedloom); fedloom.__version__", *HEAVY, "rich") == set()


@pytest.mark.parametrize("words", LIGHT_COMMANDS)
def test_light_commands_load_nothing_heavy(words):
    assert loaded(f"from fedloom.cli import main; assert main({words.split()!r}) == 0", *HEAVY) == set()


@pytest.mark.parametrize("command", ["run", "compare"])
def test_help_of_settings_needs_pydantic_alone(command):
    found = loaded(f"from fedloom.cli import main; assert main(['{command}', '--help']) == 0", *HEAVY)
    assert found <= {"pydantic"}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("fedloom li", "list "),
        ("fedloom list tr", "transforms "),
        ("fedloom list methods fedmu", "fedmut "),
        ("fedloom run method=fedmu", "method=fedmut "),
        ("fedloom run method=fedrir method.mask", "method.mask_ratio="),
        ("fedloom compare method=local,fedpro", "method=local,fedproto\vmethod=local,fedprox"),
        ("fedloom run partition=dir", "partition=dirichlet "),
        ("fedloom report --q", "--quiet "),
        ("fedloom verify --k", "--key "),
        ("fedloom run --acc", "--accept-changes "),
        ("fedloom deploy se", "server "),
        ("fedloom deploy init --no", "--nodes "),
        ("fedloom deploy run ward method=fedmu", "method=fedmut "),
        ("fedloom preprocess people.csv data.lab", "data.label="),
        ("fedloom preprocess people.csv data.missing=f", "data.missing=fill "),
        ("fedloom preprocess people.csv o", "out="),
        ("fedloom predict runs/mine cl", "client="),
        ("fedloom predict runs/mine a.csv client=0 adapt=t", "adapt=true "),
        ("fedloom predict runs/mine a.csv client=s", "client=server "),
    ],
)
def test_completion_knows_commands_settings_and_names_and_loads_no_torch(line, expected, monkeypatch):
    for key, value in {
        "_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\v", "COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9",
    }.items():  # fmt: skip
        monkeypatch.setenv(key, value)
    code = (
        "import argcomplete, sys\n"
        "from fedloom.cli import completing, main\n"
        "def leave(code): raise SystemExit(code)\n"
        "plain = argcomplete.autocomplete\n"
        "argcomplete.autocomplete = lambda *a, **k: plain(*a, exit_method=leave, output_stream=sys.stdout, **k)\n"
        "try: main([])\n"
        "except SystemExit: pass\n"
    )
    told = f"{code}\nprint(*[m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    assert done.stdout == expected
    assert set(done.stderr.split()) <= {"pydantic"}


def test_completion_knows_the_clients_of_a_run(tmp_path):
    parts = {"train": [[0], [1]], "clients": ["ann", "bob"]}
    (tmp_path / "partition.json").write_text(json.dumps(parts))
    given = SimpleNamespace(given=[str(tmp_path), "people.csv"])
    assert list(completing.KEYS["predict"](given)["client"]) == ["ann", "bob", "server"]
    (tmp_path / "partition.json").write_text(json.dumps(parts | {"clients": None}))
    assert list(completing.KEYS["predict"](given)["client"]) == ["0", "1", "server"]
    (tmp_path / "partition.json").write_text("[")
    assert list(completing.KEYS["predict"](given)["client"]) == ["server"]


@pytest.mark.skipif(sys.platform != "linux", reason="worker processes need Linux")
def test_worker_processes_load_no_tables_and_no_plots(tmp_path):
    """Workers are forked, so they contain the modules that are loaded by then."""
    words = [
        "run", "model=mlp", "clients=2", "rounds=1", "data.rows=200", "engine=processes", "engine.workers=2",
        f"out={tmp_path / 'run'}",
    ]  # fmt: skip
    code = (
        "import os, sys\n"
        "from multiprocessing.process import BaseProcess\n"
        "from fedloom.cli import main\n"
        "def told(self):\n"
        f"    print('worker', *[m for m in {HEAVY!r} if m in sys.modules], flush=True)\n"
        "    os._exit(0)\n"
        "BaseProcess.start = told\n"
        f"main({words!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    workers = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("worker ")]
    assert workers == [["torch", "numpy", "pydantic", "PIL"]]


@pytest.mark.parametrize("name", registry.METHODS)
def test_facts_from_the_source_equal_those_of_the_class(name):
    assert registry.describe_registered(name) == registry.describe_method(name, registry.METHODS[name])


@pytest.mark.parametrize("name", ZOO)
def test_facts_about_a_model_equal_those_of_its_function(name):
    assert source_facts.function_facts(ZOO.origins[name]) == (inspect.getdoc(ZOO[name]), option_defaults(name))


def test_completion_knows_the_steps_of_a_deployment():
    assert {name: step.__module__ for name, step in deploying.STEPS.items()} == completing.STEPS


def test_a_method_is_named_like_its_file():
    for name, cls in registry.METHODS.items():
        assert cls.__module__ == f"fedloom.methods.{name}"


def test_an_exported_object_is_not_hidden_by_a_module_of_its_name():
    code = "import fedloom.data.partition, fedloom.data as data; assert callable(data.partition), data.partition"
    assert loaded(f"{code}; from fedloom.models import arch; assert callable(arch)") == set()


@pytest.mark.parametrize("package", ["fedloom", "fedloom.data", "fedloom.engines", "fedloom.methods", "fedloom.models"])
def test_every_exported_name_is_found(package):
    module = importlib.import_module(package)
    for name in module.__all__:
        assert getattr(module, name) is not None, name
    assert set(module.__all__) <= set(dir(module))


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'fedloom' has no attribute 'FedNone'"):
        fedloom.FedNone  # noqa: B018
    with pytest.raises(ImportError):
        exec("from fedloom import FedNone")


def test_lazy_modules_travel_to_other_processes():
    assert pickle.loads(pickle.dumps(fedloom)) is fedloom


def test_a_registry_imports_what_is_looked_up():
    table = lazy.Registry[type]({"path": "pathlib:Path"})
    assert (list(table), len(table), "path" in table, "x" in table) == (["path"], 1, True, False)
    assert table["path"].__name__ == "Path"
    with pytest.raises(KeyError):
        table["x"]


def test_runs_and_intervals_need_no_extra(tmp_path):
    words = [
        "compare", "method=local,fedavg", "seed=0,1,2", "rounds=1", "clients=2", "model=mlp", "model.hidden=4",
        "data.rows=100", "engine=sequential", f"out={tmp_path / 'both'}",
    ]  # fmt: skip
    blocked = ("scipy", "sklearn", "matplotlib", "jinja2", "torchmetrics")
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked!r}))\nfrom fedloom.cli import main; sys.exit(main({words!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "In brackets: 95 % t-interval of the mean" in " ".join(done.stdout.split())
    assert "pip install 'fedloom[report]'" in done.stdout
