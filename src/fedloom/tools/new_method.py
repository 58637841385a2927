"""Templates for a user's own method: the method, its test and its documentation page."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from keyword import iskeyword
from pathlib import Path

from fedloom.errors import ConfigError
from fedloom.methods.registry import METHODS

METHOD = '''"""{title}: replace this line with the idea of the method.

Run it with `fedloom run method={name}.py:{title}`, and check it with `fedloom check {name}.py`.
"""

from dataclasses import dataclass

from fedloom import Method, losses
from fedloom.ranges import NonNegative


@dataclass(frozen=True)
class {title}(Method):
    """{title} (AUTHORS, VENUE, equations): say what differs from the paper, and why.

    Sent: The whole model is sent in both directions. Kept: Clients keep nothing between rounds. With pull = 0, the method is FedAvg.
    """

    pull: NonNegative = 0.1
    """Weight of (pull / 2) ||w - w_received||^2, which keeps local models near the received one."""

    def loss(self, nets, batch, down, memory):
        """Return the task's loss plus the term of this method."""
        error = nets.loss(nets.model(batch.x), batch.y)
        return error + self.pull / 2 * losses.squared_distance(nets.params, down["weights"]["params"])
'''

TEST = '''"""What {title} must do, whatever the data: `pytest test_{name}.py`."""

import sys
from pathlib import Path

import pytest

import fedloom as fl
from fedloom.tools.check import check_method

FILE = Path(__file__).with_name("{name}.py")
sys.path.insert(0, str(FILE.parent))
from {name} import {title}  # noqa: E402

SMALL = {{"clients": 3, "rounds": 2, "model": "mlp", "model.hidden": 8, "data.rows": 120, "engine": "sequential"}}


def final_loss(method, folder):
    """Return the mean training loss of the last round."""
    run = fl.run(method, data="digits", out=folder, progress=False, **SMALL)
    return run.metrics["train.loss"].iloc[-1]


@pytest.mark.parametrize("rule", check_method(f"{{FILE}}:{title}"), ids=lambda rule: rule.rule)
def test_the_method_follows_the_contract(rule):
    assert rule.kept is not False, rule.note


def test_without_its_term_it_is_fedavg(tmp_path):
    lr = {title}().lr
    assert final_loss({title}(pull=0.0), tmp_path / "own") == final_loss(fl.FedAvg(lr=lr), tmp_path / "fedavg")


def test_a_strong_pull_holds_models_near_what_they_received(tmp_path):
    assert final_loss({title}(pull=10.0, lr=0.01), tmp_path / "strong") > final_loss(
        {title}(pull=0.0, lr=0.01), tmp_path / "weak"
    )
'''

PAGE = """# {title}

What is the idea? Which problem of FedAvg does it solve?

| | |
|---|---|
| paper | AUTHORS, *TITLE*, VENUE |
| sent | the whole model, both ways |
| kept on the client | nothing |
| run | `fedloom run method={name}.py:{title}` |
| compare | `fedloom compare method=local,fedavg,fedavg_ft,{name}.py:{title} seed=0,1,2` |

## Equations

## Hyper-parameters

`fedloom list methods {name}.py:{title}` shows them.

## Differences from the paper and its code

## What was measured

State data, partition, rounds, seeds, and how each method's learning rate was chosen, next to the command.
"""


def method_files(name: str) -> Mapping[str, str]:
    """Return the files of a new method by file name.

    Raises:
        ConfigError: the name is not a lower-case Python name, or a registered method or a module already has it.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,39}", name) or iskeyword(name):
        raise ConfigError(
            f"fedloom new method {name[:60]}: a name has lower-case letters, digits and _, such as my_method"
        )
    if importlib.util.find_spec(name):
        raise ConfigError(
            f"fedloom new method {name}: Python has a module of this name, which the file would hide; choose another"
        )
    if name in METHODS:
        raise ConfigError(f"fedloom new method {name}: fedloom has a method of this name; choose another")
    title = "".join(part.capitalize() for part in name.split("_"))
    texts = {f"{name}.py": METHOD, f"test_{name}.py": TEST, f"{name}.md": PAGE}
    return {file: text.format(name=name, title=title) for file, text in texts.items()}


def write_method(name: str, folder: Path) -> list[Path]:
    """Write the files of a new method to a folder, and return their paths. Existing files are not overwritten.

    Raises:
        ConfigError: the name is invalid, the folder is not writable, or one of the files exists.
    """
    texts = {folder / file: text for file, text in method_files(name).items()}
    for path in texts:
        if path.exists():
            raise ConfigError(f"{path}: the file exists; choose another name or folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, text in texts.items():
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"out={folder}: cannot be written: {error.strerror}") from None
    return list(texts)
