"""Rules of the source code that no linter checks."""

import ast
import importlib
from collections import defaultdict
from pathlib import Path

import pytest

import fedloom

SOURCE = Path(fedloom.__file__).parent
FILES = {str(path.relative_to(SOURCE)): ast.parse(path.read_text(encoding="utf-8")) for path in SOURCE.rglob("*.py")}
MOST_POSITIONAL = 5
MOST_FIELDS = 4
PHASES = {"Train": 5}  # of the contract: Train(name, loss, nets, optimizer, epochs) reads as a sentence
TOP_LEVEL = {
    "__init__", "_version", "accelerator", "errors", "inputs", "lazy", "losses", "method", "nets", "objectives", "optim",
    "ranges", "rng", "tree",
}  # fmt: skip


def test_no_public_class_or_function_is_defined_in_two_modules():
    homes = defaultdict(set)
    for file, module in FILES.items():
        for node in module.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                homes[node.name].add(file)
    assert {name: files for name, files in homes.items() if len(files) > 1} == {}


@pytest.mark.parametrize("file", FILES)
def test_no_call_passes_more_than_five_arguments_by_position(file):
    calls = [node for node in ast.walk(FILES[file]) if isinstance(node, ast.Call)]
    long = [
        f"line {call.lineno}: {ast.unparse(call.func)}"
        for call in calls
        if len(call.args) > MOST_POSITIONAL and not any(isinstance(arg, ast.Starred) for arg in call.args)
        and not ast.unparse(call.func).startswith(("log.", "table.add_row"))
    ]  # fmt: skip
    assert long == []


def is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)


def positional_fields(node: ast.ClassDef) -> list[str]:
    """Return the fields of a record that its constructor takes by position."""
    if any("kw_only=True" in ast.unparse(decorator) for decorator in node.decorator_list):
        return []
    fields = []
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            kind = ast.unparse(statement.annotation)
            if kind == "KW_ONLY":
                break
            if "ClassVar" not in kind and "init=False" not in ast.unparse(statement):
                fields.append(statement.target.id)
    return fields


@pytest.mark.parametrize("file", FILES)
def test_records_with_more_than_four_fields_are_keyword_only(file):
    records = [
        node
        for node in ast.walk(FILES[file])
        if isinstance(node, ast.ClassDef)
        and (is_dataclass(node) or any(ast.unparse(base) == "NamedTuple" for base in node.bases))
    ]
    long = [node for node in records if len(positional_fields(node)) > PHASES.get(node.name, MOST_FIELDS)]
    assert [node.name for node in long] == []


def test_the_top_level_is_the_toolbox_of_method_authors():
    assert {path.stem for path in SOURCE.glob("*.py")} == TOP_LEVEL


@pytest.mark.parametrize("package", sorted(file for file in FILES if file.endswith("__init__.py")))
def test_every_package_says_what_it_is_for(package):
    assert len((ast.get_docstring(FILES[package]) or "").split()) >= 5


def test_no_class_uses_private_names_of_another_class():
    """`self._x` must be set or defined in the class itself, or in one of its bases in the same file."""
    classes = {
        (file, node.name): node
        for file, module in FILES.items()
        for node in ast.walk(module)
        if isinstance(node, ast.ClassDef)
    }

    def own(file: str, node: ast.ClassDef) -> set[str]:
        names = {
            leaf.attr
            for leaf in ast.walk(node)
            if isinstance(leaf, ast.Attribute) and isinstance(leaf.ctx, ast.Store) and isinstance(leaf.value, ast.Name)
        }
        names |= {item.name for item in node.body if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)}
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                names.add(item.target.id)
            if isinstance(item, ast.Assign):
                names |= {target.id for target in item.targets if isinstance(target, ast.Name)}
        for base in node.bases:
            parent = classes.get((file, ast.unparse(base)))
            names |= own(file, parent) if parent else set()
        return names

    private = {name for (file, _), node in classes.items() for name in own(file, node) if name.startswith("_")}
    wrong = []
    for (file, name), node in classes.items():
        mine = own(file, node)
        for leaf in ast.walk(node):
            if (
                isinstance(leaf, ast.Attribute)
                and isinstance(leaf.value, ast.Name)
                and leaf.value.id == "self"
                and leaf.attr.startswith("_")
                and not leaf.attr.startswith("__")
                and leaf.attr in private - mine
            ):
                wrong.append(f"{file}: {name} uses {leaf.attr}")
    assert wrong == []


SCRIPTS = [
    file for folder in ("benchmarks", "examples") for file in sorted((Path(__file__).parents[2] / folder).rglob("*.py"))
]


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.name)
def test_scripts_import_names_that_exist(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fedloom":
            module = importlib.import_module(node.module)
            for name in node.names:
                assert hasattr(module, name.name) or importlib.import_module(f"{node.module}.{name.name}")
