"""Local work: one client's turn, from the weights it receives to its uplink. No client axis, no transport, no files."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedloom import tree
from fedloom.accelerator import generators, staged, synchronise
from fedloom.errors import DataError, MethodError
from fedloom.method import Batch, Client, Free, Interleave, Method, Phase, Predictor, Sweep, Task, Train, Turn
from fedloom.nets import Nets, select
from fedloom.rng import Stream
from fedloom.training.batches import Plan, Rows, is_channels_last, laid_out
from fedloom.training.fast.gram_layer import Dual, NotDualError, Work
from fedloom.training.gradients import Gradients, Once, autocast
from fedloom.tree import Tree, Weights
from fedloom.wire.codec import PLAIN, Codec

Modules = Mapping[str, nn.Module]
EVAL_BATCH = 512


class Site(NamedTuple):
    """Where a client works: its rows and their plan, the problem's facts, its stream for this piece of work, its end of the wire."""

    rows: Rows
    plan: Plan
    task: Task
    rng: Stream
    codec: Codec = PLAIN


class Outcome(NamedTuple):
    """What came of a client's turn."""

    client: Client
    uplink: Tree
    turn: Turn
    logs: dict[str, float]  # means over the steps, named `phase.loss`, `phase.<log>`
    seconds: dict[str, float]  # by phase


def run_turn(method: Method, gradients: Gradients, client: Client, sent: Tree, site: Site, number: int) -> Outcome:
    """One client's part in round `number`, from the message `sent` to it to the uplink that it sends. Inputs are not changed."""
    down = site.codec.received(sent)
    turn = Turn(number, site.task.rounds - 1, len(site.rows.y))
    received = method.receive(client.weights, down, client.memory)
    start = client._replace(weights=received)
    scale = method.lr_scale(number)
    seconds: dict[str, float] = {}
    worked, steps, logs = run_phases(method.phases(), gradients, start, down, site, turn, scale, seconds)
    turn = turn._replace(steps=steps)
    return report(method, worked, received, down, site, turn, logs, seconds)


def report(
    method: Method,
    client: Client,
    received: Weights,
    down: Tree,
    site: Site,
    turn: Turn,
    logs: dict[str, float],
    seconds: dict[str, float],
) -> Outcome:
    """The end of a turn: what a client that has worked sends, and what it keeps."""
    uplink, memory = method.uplink(client, received, down, turn)
    sent, unsent = site.codec.reply(uplink, down, client.unsent, site.rng.child("uplink"))
    return Outcome(client._replace(memory=memory, unsent=unsent), sent, turn, logs, seconds)


def run_phases(
    phases: Sequence[Phase],
    gradients: Gradients,
    client: Client,
    down: Tree,
    site: Site,
    turn: Turn,
    lr_scale: float = 1.0,
    seconds: dict[str, float] | None = None,
) -> tuple[Client, dict[str, int], dict[str, float]]:
    """Run phases one after another. Returns the client after them, the optimiser steps taken and the logs, both by phase.

    Args:
        seconds: where the time that each phase took is written.
    """
    buffers = {name: b.clone() for name, b in client.weights["buffers"].items()}  # BatchNorm writes into them
    params = laid_out(client.weights["params"], is_channels_last(site.rows.x))
    client = client._replace(weights={"params": params, "buffers": buffers})
    steps: dict[str, int] = {}
    logs: dict[str, float] = {}
    for phase in phases:
        here, started = site._replace(rng=site.rng.child(phase.name)), time.perf_counter()
        try:
            if isinstance(phase, Train | Interleave):
                client, trainer = _trained(phase, gradients, client, down, here, turn, lr_scale)
                steps |= trainer.steps()
                logs |= trainer.logs()
            else:
                with own_randomness(here.rng, here.rows.device):
                    client = _at_once(phase, gradients, client, down, here)
        except Exception as error:
            shape = tuple(here.rows.x.shape)
            error.add_note(f"in phase '{phase.name}', after {sum(steps.values())} steps in earlier ones; rows {shape}")
            raise
        if seconds is not None:
            synchronise(here.rows.device)
            seconds[phase.name] = time.perf_counter() - started
    return client, steps, logs


def _trained(
    phase: Train | Interleave,
    gradients: Gradients,
    client: Client,
    down: Tree,
    site: Site,
    turn: Turn,
    lr_scale: float,
) -> tuple[Client, _Trainer]:
    """The client after a phase of steps, and who ran it. The client's buffers are written into."""
    before = tree.clone(client.weights["buffers"])

    def run(in_dual_form: bool) -> tuple[Client, _Trainer]:
        weights = {**client.weights, "params": dict(client.weights["params"])}
        trainer = _Trainer(phase, gradients, client._replace(weights=weights), down, turn)
        with own_randomness(site.rng, site.rows.device):
            return trainer.run(site, lr_scale, in_dual_form), trainer

    try:
        return run(in_dual_form=True)
    except NotDualError:  # a loss that looks at a weight for some batches only: this turn's phase runs as written
        tree.map_tree(Tensor.copy_, client.weights["buffers"], before)
        return run(in_dual_form=False)


def _at_once(phase: Sweep | Free, gradients: Gradients, client: Client, down: Tree, site: Site) -> Client:
    """The client after a phase without steps."""
    if isinstance(phase, Sweep):
        return sweep(phase, gradients.modules, client, down, site.rows)
    nets = Nets(gradients.modules, **client.weights)
    with _read_only(phase, {"rows": {"x": site.rows.x, "y": site.rows.y}, "down": down, "memory": client.memory}):
        return phase.run(client, nets, site.rows.part(0), down, site.rng)


@contextmanager
def _read_only(phase: Sweep | Free, inputs: Tree) -> Iterator[None]:
    """Refuse a phase that writes into what later phases, or other clients, read. Raises MethodError."""
    before = tree.versions(inputs)
    yield
    changed = tree.changed_since(before, inputs)
    if changed:
        raise MethodError(f"phase '{phase.name}' changes '{changed}' in place; rows, downlink and memory are read-only")


@contextmanager
def own_randomness(rng: Stream, device: torch.device) -> Iterator[None]:
    """Seed torch's generator, for modules with randomness of their own (Dropout), while it lasts.

    The host's and this device's alone: `torch.manual_seed` also asks every accelerator, which costs more than a step of a small model.
    """
    every = generators(device)
    before = [generator.get_state() for generator in every]
    for generator in every:
        generator.manual_seed(rng.torch_seed())
    try:
        yield
    finally:
        for generator, state in zip(every, before, strict=True):
            generator.set_state(state)


class _Member:
    """One `Train` at work: its parameters, optimiser state and running means of its logs."""

    def __init__(self, train: Train, gradients: Gradients, client: Client, down: Tree) -> None:
        self.train, weights = train, client.weights
        self.find = gradients.of(train, down, client.memory)
        self.duals: dict[str, Dual] = {}
        self.names = list(select(weights, train.trains)["params"])
        if not self.names:
            raise MethodError(f"phase '{train.name}' trains {train.trains}, which holds no parameters")
        params = {name: weights["params"][name] for name in self.names}
        self.state = client.opts[train.name] if train.keep_state else train.optimizer.init(params)
        self.steps, self.sums = 0, dict[str, Tensor]()

    def mine(self, weights: Weights) -> dict[str, Tensor]:
        """The parameters that it trains."""
        return {name: weights["params"][name] for name in self.names}

    def begin(self, gradients: Gradients, client: Client, down: Tree, site: Site, order: Sequence[Tensor]) -> None:
        """Before the first step: take input layers in dual form where that is less work."""
        train, params, lr = self.train, client.weights["params"], self.train.optimizer.plain_lr
        names = dual_layers(train, self.names, gradients, client, down, site, order)
        if names and lr is not None:
            self.duals = {name: Dual([params[name]], site.rows.x[None], lr) for name in names}
            self.names = [name for name in self.names if name not in names]
            self.find = gradients.of(train, down, client.memory, names)

    def end(self, weights: Weights) -> None:
        """After the last step: give the input layers their weights."""
        weights["params"].update({name: dual.weight() for name, dual in self.duals.items()})

    def step(self, weights: Weights, index: Tensor, batch: Batch, lr_scale: float, once: Once | None = None) -> None:
        """One optimiser step: the first replaces entries of `weights["params"]`, which may be others' too; later ones change them.

        `batch` are the rows `index`. Gradients flow through `once`, if given.
        """
        params, mine = weights["params"], self.mine(weights)
        outputs = {name: dual.outputs(index)[0] for name, dual in self.duals.items()}
        wanted = {**mine, **outputs, **(once.through if once else {})}
        grads, logs = self.find(wanted, params, weights["buffers"], batch)
        if once:
            grads = once.back(grads)
        for name, dual in self.duals.items():
            dual.step(index, grads[name], lr_scale)
        if self.steps:
            self.train.optimizer.step(grads, self.state, mine, lr_scale)
        else:
            mine, self.state = self.train.optimizer.update(grads, self.state, mine, lr_scale)
            params.update(mine)
        self.steps += 1
        for name, value in logs.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value


class _Trainer:
    """A `Train`, or an `Interleave` of several, over a client's batches."""

    def __init__(self, phase: Train | Interleave, gradients: Gradients, client: Client, down: Tree, turn: Turn) -> None:
        self.phase, self.gradients, self.client, self.down = phase, gradients, client, down
        every = (phase,) if isinstance(phase, Train) else phase.members
        self.members = [_Member(t, gradients, client, down) for t in every if t.works_in(turn)]
        check_once(phase, [member.names for member in self.members])

    def run(self, site: Site, lr_scale: float, in_dual_form: bool = True) -> Client:
        """Train; returns the client with its new weights and kept optimiser states.

        Args:
            in_dual_form: whether input layers may be (`fedloom.training.fast.gram_layer`).
        """
        rows, plan, task, rng, _ = site
        weights = self.client.weights
        draws = [rng.child("draw", member.train.name) for member in self.members]
        augment = rng.child("augment")
        order = list(plan.batches(len(rows.y), self.phase.epochs, self.phase.steps, rng.child("batches")))
        trains = [member.train for member in self.members]
        if in_dual_form and isinstance(self.phase, Train) and self.members:
            self.members[0].begin(self.gradients, self.client, self.down, site, order)
        for index, batch in zip(order, rows.batches(order, augment), strict=True) if self.members else ():
            check_batch(len(batch.y), trains, self.gradients.modules)
            once = self._once(weights, batch)
            numbers = once.numbers if once else {}
            for member, stream in zip(self.members, draws, strict=True):
                drawn = member.train.draw(batch, task, stream) if member.train.draw else {}
                drawn = {name: staged(value, rows.device) for name, value in drawn.items()}
                given = batch._replace(draws=drawn, once=numbers) if drawn or numbers else batch
                way = once if member is self.members[-1] else None
                member.step(weights, index, given, lr_scale, way)
        for member in self.members:
            member.end(weights)
        kept = {m.train.name: m.state for m in self.members if m.train.keep_state}
        return self.client._replace(opts={**self.client.opts, **kept})

    def steps(self) -> dict[str, int]:
        """Optimiser steps taken, by `Train`."""
        return {member.train.name: member.steps for member in self.members}

    def logs(self) -> dict[str, float]:
        """Means over the steps, named `train.loss`, `train.<log>`."""
        return {
            f"{member.train.name}.{name}": float(value) / member.steps
            for member in self.members
            for name, value in member.sums.items()
        }

    def _once(self, weights: Weights, batch: Batch) -> Once | None:
        phase, trains = self.phase, [member.train for member in self.members]
        if isinstance(phase, Train) or not phase.once:
            return None
        wanted, memory = self.members[-1].mine(weights), self.client.memory
        return self.gradients.once(phase, trains, wanted, **weights, batch=batch, down=self.down, memory=memory)


def dual_layers(
    train: Train,
    names: Sequence[str],
    gradients: Gradients,
    client: Client,
    down: Tree,
    site: Site,
    order: Sequence[Tensor],
    lanes: int = 1,
) -> tuple[str, ...]:
    """Those of the parameters `names` that are input layers with less work in dual form (`fast/gram_layer.py`), over batches in some order.

    Args:
        lanes: clients with as much work that are trained side by side.
    """
    (x, y, augment, _), params = site.rows, client.weights["params"]
    if train.optimizer.plain_lr is None or augment:
        return ()
    work, n_features = Work(len(y), sum(map(len, order)), len(order), lanes), x[0].numel()
    fitting = (name for name in names if params[name].ndim == 2 and params[name].shape[1] == n_features)
    large = [name for name in fitting if work.is_less_in_dual_form(params[name])]

    def batch() -> Batch:
        few = Batch(x[: len(order[0])], y[: len(order[0])])
        return few._replace(draws=train.draw(few, site.task, Stream("trial"))) if train.draw else few

    return gradients.duals(train, large, client.weights, batch, down, client.memory) if large else ()


def check_batch(n_rows: int, trains: Sequence[Train], modules: Modules) -> None:
    """Refuse a batch of one row for nets with BatchNorm, whose variance would be 0. Raises DataError."""
    trained = {net for train in trains for net in train.modes} if n_rows == 1 else ()
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for net in trained for m in modules[net].modules()):
        raise DataError(
            "BatchNorm cannot train on a batch of one row: raise partition.min_examples or batch_size, or use model.norm=group"
        )


def check_once(phase: Train | Interleave, names: Sequence[Sequence[str]]) -> None:
    """Refuse members that change what gradients will flow into; `names` are the parameters that each of them trains.

    Raises:
        MethodError: two do, and the phase computes something once for both.
    """
    both = {name for mine in names[:-1] for name in mine}.intersection(*names[-1:])
    if isinstance(phase, Interleave) and phase.once and both:
        raise MethodError(f"phase '{phase.name}': with `once`, only its last member may train '{min(both)}'")


def sweep(phase: Sweep, modules: Modules, client: Client, down: Tree, rows: Rows) -> Client:
    if phase.name not in client.memory:
        raise MethodError(f"sweep '{phase.name}' needs memory['{phase.name}'], which init_memory does not create")
    nets = Nets(modules, **client.weights)
    total = tree.zeros_like(client.memory[phase.name])
    inputs = {"rows": {"x": rows.x, "y": rows.y}, "down": down, "memory": client.memory, "weights": client.weights}
    with _read_only(phase, inputs), torch.inference_mode():
        for start in range(0, len(rows.y), EVAL_BATCH):
            batch = rows.part(start, start + EVAL_BATCH)
            total = phase.step(nets, batch, total, down, client.memory)
    return client._replace(memory={**client.memory, phase.name: tree.clone(total)})


@torch.inference_mode()
def predict(
    predictor: Predictor,
    gradients: Gradients,
    weights: Weights,
    x: Tensor,
    down: Tree,
    memory: Tree,
    batch: int = EVAL_BATCH,
) -> Tensor:
    """Logits (n, Y) of all rows, in evaluation mode and large batches."""
    nets = Nets(gradients.modules, laid_out(weights["params"], is_channels_last(x)), weights["buffers"])
    with autocast(gradients.device, gradients.bf16):
        parts = (staged(part, gradients.device) for part in torch.split(x, batch))
        return torch.cat([predictor(nets, part, down, memory) for part in parts])


def fresh_modules(build: Callable[[], Any], rng: Stream) -> dict[str, nn.Module]:
    """Modules whose initial weights depend on `rng` alone. Which of them are frozen (`requires_grad=False`) stays as built."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.torch_seed())
        modules: dict[str, nn.Module] = build()
    for module in modules.values():
        module.to(torch.get_default_dtype())  # a user's instance may be of another precision
    return modules
