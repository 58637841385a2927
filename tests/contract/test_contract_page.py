"""The examples of `docs/contract.md`. Each example is a method that runs, and the hook that it describes is called."""

import inspect
import re
from pathlib import Path

import pytest

from fedloom import Method, tree
from fedloom.methods.registry import METHODS

PAGE = (Path(__file__).parents[2] / "docs" / "contract.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"^### (\w+)[^\n]*\n.*?^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE))
PRELUDE = """
from dataclasses import dataclass
from typing import ClassVar
import torch
from torch import nn
from fedloom import Downlink, Interleave, Method, Set, Sweep, Train, optim, tree
from fedloom.method import predict_model, predict_with
from fedloom.nets import select
called = set()
"""
HELPERS = {"travelling", "local_optimizer", "needed", "remedy"}
"""Names of `Method` that are not hooks: helpers, and properties for messages."""


def hooks():
    """Return the names of the hooks of `Method`."""
    return {
        name
        for name, value in vars(Method).items()
        if not name.startswith("_") and (inspect.isfunction(value) or isinstance(value, property))
    } - HELPERS


def test_the_page_has_an_example_of_every_hook():
    assert set(EXAMPLES) - {"draw"} | {"exchanges", "from_sums"} == hooks()


@pytest.mark.parametrize("hook", EXAMPLES)
def test_an_example_runs(experiment, hook):
    body = "".join(f"    {line}\n" if line else "\n" for line in EXAMPLES[hook].splitlines())
    names: dict = {}
    exec(f"{PRELUDE}\n@dataclass(frozen=True)\nclass Mine(Method):\n{body}", names)
    mine, calls = names["Mine"], []
    own = vars(mine)[hook]

    def watched(*args, **kwargs):
        calls.append(hook)
        return own(*args, **kwargs)

    setattr(mine, hook, watched)
    run = experiment(
        mine(),
        **{
            "data.rows": 80,
            "clients": 3,
            "rounds": 1 + (hook == "phases"),
            "screen.norm": 100,
            "eval.shared_head": hook == "shared_features",
            "engine": "debug+sequential",
        },
    )
    run.run()
    if hook == "sums":  # called with a robust rule only
        sent, method = {"weights": run.server["weights"]}, run.method
        total = tree.add(method.sums(sent), method.sums(sent))
        assert tree.equal(method.from_sums(total, 2)["weights"]["params"], sent["weights"]["params"])
    assert calls
    assert run.rows[-1]["personal_accuracy"] > 0


ONE_METHOD = {"exchange", "exchanges", "finish", "keeps_shared", "pooled", "ragged", "remedy"}
"""Names of `Method` that only one built-in method (with its subclasses) defines so far."""


def test_every_name_of_the_contract_has_two_users():
    """A user overrides or reads the name. The engine uses the other names itself. A name that loses its last user should be removed."""
    chosen = [cls for name in METHODS for cls in METHODS[name].__mro__ if issubclass(cls, Method) and cls is not Method]
    texts = {cls.__name__: (vars(cls), inspect.getsource(cls)) for cls in chosen}
    names = hooks() | {
        "shared",
        "keeps_shared",
        "equal_shares",
        "accepts_late",
        "needs",
        "combines",
        "pooled",
        "remedy",
    }
    users = {
        n: [c for c, (own, text) in texts.items() if n in own or f".{n}(" in text or f".{n}\n" in text] for n in names
    }
    assert {name for name, mine in users.items() if len(mine) == 1} <= ONE_METHOD
    assert not [name for name, mine in users.items() if not mine]
