"""Check that a method follows the contract: run it on a tiny federation in several ways that must agree, and explain differences.

All runs use float64, a few of scikit-learn's digits, and temporary folders.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedloom import data, tree
from fedloom.config.settings import make_settings
from fedloom.engines import Reply
from fedloom.engines.wrappers import Wrapper
from fedloom.errors import ConfigError
from fedloom.experiment.build import arithmetic
from fedloom.experiment.loop import Experiment, GivenObjects
from fedloom.inputs import map_inputs
from fedloom.method import Batch, Client, Downlink, Method, PrecomputeFn, Train, trains_of
from fedloom.methods.registry import load_module, method_class
from fedloom.nets import Nets, select
from fedloom.rng import Stream
from fedloom.tools.error_report import one_line, own_place
from fedloom.tree import Tree

ROWS = 120
PLAIN, NORMALISED = {"name": "mlp", "hidden": 16}, {"name": "fedrir_cnn"}
Model = Mapping[str, Any]


class Finding(NamedTuple):
    """The result for one rule: kept (True), broken (False), or neither tested nor required (None), with the reason."""

    rule: str
    kept: bool | None
    note: str = ""


class _ReverseOrder(Wrapper):
    """Trains the members of a cohort one by one, in reverse order."""

    def train(self, number: int, cohort: Sequence[int], down: Downlink) -> list[Reply]:
        replies = []
        for slot in reversed(range(len(cohort))):
            (reply,) = self.inner.train(number, [cohort[slot]], Downlink(each=[down.to(slot)]))
            replies.append(replace(reply, slot=slot))
        return replies[::-1]


def methods_in(where: str) -> list[str]:
    """Return the methods that `FILE.py` defines, as `FILE.py:Class`. Return any other word unchanged.

    Raises:
        ConfigError: the file defines no method, or cannot be imported.
    """
    if not where.endswith(".py"):
        return [where]
    names = vars(load_module(Path(where), f"check={where}"))
    found = [
        name
        for name, value in names.items()
        if inspect.isclass(value) and issubclass(value, Method) and value.__module__ == names["__name__"]
    ]
    if not found:
        raise ConfigError(f"check={where}: the file defines no class derived from fedloom.Method")
    return [f"{where}:{name}" for name in found]


def check_method(name: str) -> list[Finding]:
    """Check a registered method, or `FILE.py:Class`.

    Raises:
        ConfigError: the method does not exist.
    """
    cls = method_class(name)
    first = _check_class(cls)
    if not first.kept:
        return [first]
    method, dataset = cls(), data.load("digits", rows=ROWS)
    with tempfile.TemporaryDirectory(prefix="fedloom-check-") as folder:
        return [first, *_Trial(name, method, dataset, Path(folder)).findings()]


def _check_class(cls: type[Method]) -> Finding:
    rule = "the method is a frozen dataclass whose hyper-parameters have defaults"
    fields = {field.name for field in dataclasses.fields(cls)}
    for key, kind in vars(cls).get("__annotations__", {}).items():
        if key not in fields and "ClassVar" not in str(kind):
            return Finding(
                rule, False, f"'{key}' is not a hyper-parameter: put @dataclass(frozen=True) above {cls.__name__}"
            )
    try:
        cls()
    except Exception as error:
        return Finding(rule, False, f"{cls.__name__}() fails: {one_line(error)}")
    return Finding(rule, True)


class _Trial:
    """The runs of one method."""

    def __init__(self, name: str, method: Method, dataset: data.Dataset, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.parts = GivenObjects(method=method, dataset=dataset)

    def findings(self) -> list[Finding]:
        """Return the findings for all rules that need a run."""
        contract = (
            "two rounds follow the contract: inputs unchanged, private nets kept, structures constant, numbers finite"
        )
        try:
            reference = self._run("plain", "sequential")
            self._run("debug", "debug+sequential")
        except Exception as error:
            return [Finding(contract, False, one_line(error))]
        return [
            Finding(contract, True),
            self._normalised(),
            self._same(
                "messages encoded as bytes give the same numbers",
                reference,
                lambda: self._run("bytes", "bytes+sequential"),
            ),
            self._same("a run stopped after a round and resumed gives the same numbers", reference, self._resumed),
            self._same("the order of the clients does not matter", reference, self._in_reverse_order),
            self._mapped(reference),
        ]

    def _experiment(self, folder: str, engine: str, model: Model = PLAIN) -> Experiment:
        values = {
            "method": {"name": self.name},
            "model": dict(model),
            "engine": {"name": engine, "threads": 1},
            "partition": {"name": "dirichlet", "alpha": 1.0},
            "out": self.folder / folder,
            "precision": "fp64",
        }
        sizes = {"clients": 4, "cohort": 3, "rounds": 2, "batch_size": 8, "checkpoint_every": 1}
        return Experiment(make_settings({**values, **sizes}), self.parts)

    def _run(self, folder: str, engine: str, model: Model = PLAIN) -> Experiment:
        experiment = self._experiment(folder, engine, model)
        experiment.run()
        return experiment

    def _normalised(self) -> Finding:
        rule = "the same holds with BatchNorm in the model"
        try:
            self._run("batchnorm", "debug+sequential", NORMALISED)
        except Exception as error:
            return Finding(rule, False, one_line(error))
        return Finding(rule, True)

    def _resumed(self) -> Experiment:
        def stop(done: int, rounds: int, row: Mapping[str, Any]) -> None:
            raise StopIteration  # stops the run like Ctrl-C

        first = self._experiment("resumed", "sequential")
        with contextlib.suppress(StopIteration):
            first.run(stop)
        second = Experiment.resume(first.folder.path, self.parts)
        second.run()
        return second

    def _in_reverse_order(self) -> Experiment:
        experiment = self._experiment("backwards", "sequential")
        experiment.engine = _ReverseOrder(experiment.engine)
        experiment.run()
        return experiment

    def _same(self, rule: str, reference: Experiment, other: Callable[[], Experiment]) -> Finding:
        try:
            difference = _difference(_state(reference), _state(other()))
        except Exception as error:
            return Finding(rule, False, one_line(error))
        return Finding(rule, not difference, difference)

    def _mapped(self, experiment: Experiment) -> Finding:
        rule = "losses can be mapped over clients (vectorised engine)"
        method = experiment.problem.method
        if method.pooled:
            return Finding(rule, None, "nothing to map: one client has all examples")
        phases = method.phases()
        with arithmetic(experiment.settings):
            for train, once in [
                (train, getattr(phase, "precompute", None)) for phase in phases for train in trains_of([phase])
            ]:
                try:
                    wrong = _map_differs(experiment, train, once)
                except Exception as error:
                    return Finding(rule, None, f"runs, but is never vectorised: phase '{train.name}' {_why(error)}")
                if wrong:
                    note = f"phase '{train.name}': the gradient of {wrong} changes when two clients are mapped"
                    return Finding(rule, False, note)
        return Finding(rule, True)


def _state(experiment: Experiment) -> Tree:
    """Return all values that must not depend on how a run was executed."""
    n = experiment.problem.task.n_clients
    clients = {f"client {i}": experiment.engine.client(i)._asdict() for i in range(n)}
    scores = [
        {key: value for key, value in row.items() if isinstance(value, float) and "seconds" not in key}
        for row in experiment.rows
    ]
    rounds = {f"round {i}": {k: torch.tensor(v) for k, v in row.items()} for i, row in enumerate(scores)}
    return {"server": experiment.server, **clients, "metrics": rounds}


def _difference(a: Tree, b: Tree) -> str:
    """Describe the first difference between two states, or return "" if they are equal bit for bit."""
    if tree.structure(a) != tree.structure(b):
        path, _ = min(set(tree.structure(a).items()) ^ set(tree.structure(b).items()), key=lambda item: item[0])
        return f"the structure differs at {path}"
    other = dict(tree.flatten(b))
    for path, leaf in tree.flatten(a):
        if not tree.equal({"x": leaf}, {"x": other[path]}):
            gap = (leaf.double() - other[path].double()).abs().max()
            return f"{path} differs by up to {gap:.2g}; the method may keep state outside of memory and server"
    return ""


def _map_differs(experiment: Experiment, train: Train, once: PrecomputeFn | None) -> str:
    """Return the name of the first tensor whose gradient changes if two clients are mapped with `vmap`, or "" if there is none."""
    modules, lanes = _lanes(experiment, train)
    objective = experiment.problem.task.objective

    def gradient(lane: Tree) -> Any:
        def loss(trained: dict[str, Tensor]) -> Tensor:
            buffers = {
                name: value.clone() for name, value in lane["buffers"].items()
            }  # BatchNorm modifies them in place
            nets = Nets(modules, {**lane["fixed"], **trained}, buffers, train.modes, objective=objective)
            batch = Batch(**lane["batch"])
            if once:
                batch = batch._replace(precomputed=once(nets, batch, lane["down"], lane["memory"]))
            result = train.loss(nets, batch, lane["down"], lane["memory"])
            return result[0] if isinstance(result, tuple) else result

        return torch.func.grad(loss)(lane["trained"])

    one_by_one = tree.stack([gradient(lane) for lane in lanes])
    mapped = torch.func.vmap(gradient)(tree.stack(lanes))
    for name, value in one_by_one.items():
        if not torch.allclose(value, mapped[name], rtol=1e-8, atol=1e-10, equal_nan=True):
            return name
    return ""


def _lanes(experiment: Experiment, train: Train) -> tuple[Any, list[Tree]]:
    problem, members = experiment.problem, _largest(experiment.data)
    sent = experiment.hooks.downlink(experiment.server, 0, members)
    lanes = []
    for slot, i in enumerate(members):
        modules, client, _ = experiment.engine.personal(0, Downlink(sent.to(slot)), i)
        rng = Stream("check", i)
        x, y = experiment.data.train(i)
        batch = Batch(map_inputs(lambda v: v[:4], x), y[:4])
        draws = dict(train.draw(batch, problem.task, rng)) if train.draw else {}
        lanes.append(_lane(client, train, {"x": batch.x, "y": batch.y, "draws": draws}, sent.to(slot), rng))
    return modules, lanes


def _lane(client: Client, train: Train, batch: Tree, down: Tree, rng: Stream) -> Tree:
    """Return the inputs of a client's loss, with weights perturbed so that all clients differ."""
    params = {k: v.detach().contiguous() + 0.01 * rng.normal(v.shape) for k, v in client.weights["params"].items()}
    names = select(client.weights, train.params)["params"].keys()
    trained = {name: params.pop(name) for name in names}
    return {
        "trained": trained,
        "fixed": params,
        "buffers": client.weights["buffers"],
        "batch": batch,
        "down": down,
        "memory": client.memory,
    }


def _largest(federation: data.Federation) -> list[int]:
    return sorted(range(federation.n_clients), key=lambda i: -federation.n_train(i))[:2]


_REASONS = {
    "one_hot": "uses F.one_hot: compare with torch.arange(n_classes) instead",
    ".item()": "converts a tensor to a number (.item(), float(), int(), or `if` on a tensor)",
    "data-dependent control flow": "branches on the value of a tensor (`if`, `while`, bool()): use torch.where instead",
    "dynamic shape": "creates tensors whose shape depends on values (boolean indexing, nonzero, unique): use 0/1 weights instead",
    "randomness": "draws random numbers (randn, or a module with Dropout): draw them in the phase's `draw` instead",
    "inplace": "modifies a tensor that all clients share: create a new one instead",
}


def _why(error: Exception) -> str:
    place = own_place(error)
    line = f"; {place}: {place.code}" if place else ""
    text = f"{error} {place.code if place else ''}"
    reason = next((words for sign, words in _REASONS.items() if sign in text), None)
    first = f"{type(error).__name__}: {error}".splitlines()[0]
    return f"{reason or first}{line}"
