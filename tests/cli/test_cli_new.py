"""The files that `fedloom new` writes work as they are."""

import subprocess
import sys
from pathlib import Path

import pytest

from fedloom.tools.check import check_method
from fedloom.tools.new_method import method_files


def test_a_new_method_keeps_every_rule_and_files_are_not_overwritten(cli):
    written = cli("new", "method", "slow_pull", "out=mine")
    assert written.out.split() == ["mine/slow_pull.py", "mine/test_slow_pull.py", "mine/slow_pull.md"]
    assert {finding.kept for finding in check_method("mine/slow_pull.py:SlowPull")} == {True}
    compile(Path("mine/test_slow_pull.py").read_text(), "test_slow_pull.py", "exec")
    again = cli("new", "method", "slow_pull", "out=mine")
    assert (again.code, "mine/slow_pull.py: the file exists" in again.err) == (2, True)


@pytest.mark.slow
def test_the_tests_of_a_new_method_pass(tmp_path):
    for file, text in method_files("slow_pull").items():
        (tmp_path / file).write_text(text)
    subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"], cwd=tmp_path, check=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "expected method NAME"),
        (("method",), "expected method NAME"),
        (("model", "x"), "expected method NAME"),
        (("method", "FedX"), "lower-case letters"),
        (("method", "class"), "lower-case letters"),
        (("method", "../x"), "lower-case letters"),
        (("method", "fedprox"), "fedloom has a method of this name"),
        (("method", "torch"), "Python has a module of this name"),
        (("method", "mine", "folder"), "expected out=FOLDER"),
        (("method", "mine", "out="), "must not be empty"),
    ],
)
def test_mistakes_are_refused_and_nothing_is_written(cli, words, message):
    done = cli("new", *words)
    assert (done.code, message in done.err, list(Path().iterdir())) == (2, True, [])
