"""Methods by name, objects from users' files, and descriptions of classes."""

import dataclasses
import inspect

import pytest

import fedloom
from fedloom.cli import listing
from fedloom.errors import ConfigError
from fedloom.methods.registry import METHODS, describe_method, installed_methods, load_object, method_class, method_name

MINE = """
from dataclasses import dataclass
from fedloom import Method

@dataclass(frozen=True)
class Mine(Method):
    '''Mine, for a test.'''

    strength: float = 0.5
    '''How strong.'''

class Plain(Method):
    pass

number = 3
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my.py"
    path.write_text(MINE)
    return path


def test_a_class_from_a_file(file):
    mine = method_class(f"{file}:Mine")
    assert mine(strength=2).strength == 2
    assert method_name(mine) == "Mine"
    assert load_object(f"{file}:number", "x") == 3


@pytest.mark.parametrize("where", ["number", "dataclass"])
def test_an_object_that_is_not_a_method_is_named(file, where):
    with pytest.raises(ConfigError, match=f"method=.*{where}: must be a dataclass derived from fedloom.Method"):
        method_class(f"{file}:{where}")


def test_mistakes_around_a_file_are_named(file, tmp_path):
    with pytest.raises(ConfigError, match=r"method=.*none\.py:Mine: there is no file"):
        method_class(f"{tmp_path}/none.py:Mine")
    with pytest.raises(ConfigError, match=r"defines no 'Mien' \(did you mean 'Mine'\?\)"):
        method_class(f"{file}:Mien")
    file.write_text("import nothing_of_that_name")
    with pytest.raises(ConfigError, match="cannot be imported: ModuleNotFoundError"):
        method_class(f"{file}:Mine")
    file.write_text("import sys\nsys.exit(0)")
    with pytest.raises(ConfigError, match="exits Python when it is imported"):
        method_class(f"{file}:Mine")


def test_an_unknown_name_is_named():
    with pytest.raises(ConfigError, match=r"method=fedprx: there is no such method \(did you mean 'fedprox'\?\)"):
        method_class("fedprx")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_describes_itself(name):
    cls = METHODS[name]
    assert method_name(cls) == name
    found = describe_method(name, cls)
    assert found["summary"]
    assert found["paper"]
    assert set(found["hyper_parameters"]) == {field.name for field in dataclasses.fields(cls)}
    for key, entry in found["hyper_parameters"].items():
        assert entry["doc"], key
        assert entry["default"] == getattr(cls(), key)
    assert "Sent:" in inspect.getdoc(cls) or "not a federated method" in inspect.getdoc(cls)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_a_frozen_value(name):
    method = METHODS[name]()
    assert method == METHODS[name]()
    assert hash(method) == hash(METHODS[name]())
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.lr = 1.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.anything = 1.0


def test_registered_methods_are_public_and_sorted():
    assert list(METHODS) == sorted(METHODS)
    assert {cls.__name__ for cls in METHODS.values()} <= set(fedloom.__all__)
    with pytest.raises(TypeError):
        METHODS["mine"] = fedloom.Method


def test_methods_of_files_and_of_modules_compose(file, tmp_path, monkeypatch):
    """Each half may be a registered name, a file's class or a module's class."""
    (tmp_path / "mymodule.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    assert method_class("mymodule:Mine")(strength=3).strength == 3
    for name in (f"fedmr+{file}:Mine", "fedmr+mymodule:Mine"):
        mixed = method_class(name)()
        assert mixed.strength == 0.5
        assert mixed.unit == "layer"
    assert method_class(f"{file}:Mine+fedprox")().mu == 0.01
    with pytest.raises(
        ConfigError, match=r"method=mymodule:Mien: mymodule defines no 'Mien' \(did you mean 'Mine'\?\)"
    ):
        method_class("mymodule:Mien")
    with pytest.raises(ConfigError, match=r"method=nomodule\.x:Mine: the module nomodule\.x cannot be imported"):
        method_class("nomodule.x:Mine")


def test_a_path_may_contain_a_plus(tmp_path):
    folder = tmp_path / "a+b"
    folder.mkdir()
    (folder / "my.py").write_text(MINE)
    assert method_class(f"{folder}/my.py:Mine").__name__ == "Mine"


def test_installed_packages_offer_methods(tmp_path, monkeypatch):
    """A package with an entry point is found by name, is listed, and does not hide a registered method."""
    (tmp_path / "theirs.py").write_text(MINE)
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[fedloom.methods]\ntheirs = theirs:Mine\nfedavg = theirs:Mine\n")
    monkeypatch.syspath_prepend(tmp_path)
    installed_methods.cache_clear()
    try:
        assert method_class("theirs").__name__ == "Mine"
        assert method_class("fedavg").__name__ == "FedAvg"
        assert method_class("fedmr+theirs")().strength == 0.5
        listed = {facts["name"]: facts["summary"] for facts in listing.methods()}
        assert listed["theirs"] == "Mine, for a test."
        assert listed["fedavg"] != listed["theirs"]
    finally:
        installed_methods.cache_clear()
