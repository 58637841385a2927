"""One client's update, from the received weights through the phases of local work to the uplink.

Read the code from the top: `client_update`, `run_phases`, `_walk_batches` (the loop over batches) and `LocalTrain.step` (one step of SGD).
This module does not depend on other clients, transport or files. `steps.py` and `choose.py` describe the faster forms of a step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedloom import tree
from fedloom.accelerator import generators, staged, synchronise
from fedloom.errors import DataError, MethodError
from fedloom.inputs import map_inputs, shapes_of
from fedloom.method import Batch, Client, Interleave, Method, Phase, Set, Sweep, Task, Train, Turn, active_trains
from fedloom.optim import Params
from fedloom.rng import Stream
from fedloom.training.batches import is_channels_last, laid_out, phase_batches
from fedloom.training.context import ClientContext, LocalWork
from fedloom.training.gradients import Gradients
from fedloom.training.precompute import Precomputed, check_precompute, precompute
from fedloom.training.steps import FormError, TrainJob, trained_names
from fedloom.training.sweeps import read_only, run_set, run_sweep
from fedloom.tree import Tree, Weights

Modules = Mapping[str, nn.Module]


@dataclass(frozen=True, kw_only=True)
class UpdateResult:
    """The result of one client's update."""

    client: Client
    uplink: Tree
    turn: Turn
    logs: dict[str, float]  # means over the steps, named `phase.loss` and `phase.<log>`
    seconds: dict[str, float]  # duration of each phase


def client_update(
    method: Method, gradients: Gradients, client: Client, sent: Tree, context: ClientContext, *, number: int
) -> UpdateResult:
    """Run one client's update in round `number`, from the message `sent` to the client to its uplink. The inputs do not change."""
    down = context.codec.received(sent)
    turn = turn_of(method, context.task, number, len(context.rows.y))
    received = method.receive(client.weights, down, client.memory)
    start = client._replace(weights=received)
    seconds = dict[str, float]()
    worked, steps, logs = run_phases(method.phases(), gradients, start, down, context, turn=turn, seconds=seconds)
    work = LocalWork(worked, down, context, replace(turn, steps=steps))
    return finish_update(method, work, received, logs=logs, seconds=seconds)


def turn_of(method: Method, task: Task, number: int, examples: int) -> Turn:
    """Return the facts about a local update in round `number`, before it starts. The client has `examples` training examples."""
    last = task.rounds - 1
    return Turn(number, last, examples, closing=number > last, lr_scale=lr_scale(method, task, number))


def lr_scale(method: Method, task: Task, number: int) -> float:
    """Return the factor on the learning rates in round `number`. After the last round, the schedule keeps its last factor."""
    planned = task.lr_scales[min(number, len(task.lr_scales) - 1)] if task.lr_scales else 1.0
    return method.lr_decay**number * planned


def finish_update(
    method: Method, work: LocalWork, received: Weights, *, logs: dict[str, float], seconds: dict[str, float]
) -> UpdateResult:
    """Finish a client's update after its local work: compute its uplink and the state that it keeps."""
    client, down, context, turn = work
    inputs = {"memory": client.memory, "weights": client.weights, "received": received, "down": down}
    with read_only(f"{type(method).__name__}.uplink", inputs):
        uplink, memory = method.uplink(client, received, down, turn)
    for what, value in (("uplink", uplink), ("memory", memory)):
        if wrong := tree.not_tensor(value):
            name = type(method).__name__
            raise MethodError(f"{name}.uplink: in the {what}, {wrong}; use a tensor, such as torch.tensor(...)")
    codec = context.codec.only(uplink) if turn.closing else context.codec
    sent, unsent = codec.reply(uplink, down, client.unsent, context.rng.child("uplink"))
    client = client._replace(memory=memory, unsent=unsent)
    return UpdateResult(client=client, uplink=sent, turn=turn, logs=logs, seconds=seconds)


def run_phases(
    phases: Sequence[Phase],
    gradients: Gradients,
    client: Client,
    down: Tree,
    context: ClientContext,
    *,
    turn: Turn,
    seconds: dict[str, float] | None = None,
) -> tuple[Client, dict[str, int], dict[str, float]]:
    """Run phases one after another. Return the resulting client, the number of optimiser steps by phase, and the logs by phase.

    Args:
        turn: the local update; its `lr_scale` multiplies all learning rates.
        seconds: a dictionary to which the duration of each phase is added.
    """
    buffers = {name: b.clone() for name, b in client.weights["buffers"].items()}  # BatchNorm writes to them
    params = laid_out(client.weights["params"], is_channels_last(context.rows.x))
    client = client._replace(weights={"params": params, "buffers": buffers})
    steps: dict[str, int] = {}
    logs: dict[str, float] = {}
    for phase in phases:
        started, here = time.perf_counter(), replace(context, rng=context.rng.child(phase.name))
        try:
            client, trained = _run_phase(phase, gradients, LocalWork(client, down, here, turn))
        except Exception as error:
            if isinstance(error, ValueError) and ONE_VALUE in str(error):
                raise DataError(TOO_FEW) from error
            before, shape = sum(steps.values()), shapes_of(here.rows.x)
            error.add_note(
                f"in phase '{phase.name}', after {before} steps in earlier phases; examples of shape {shape}"
            )
            raise
        for member in trained:
            steps[member.train.name] = member.steps
            logs |= member.mean_logs()
        if seconds is not None:
            synchronise(here.rows.device)
            seconds[phase.name] = time.perf_counter() - started
    return client, steps, logs


def _run_phase(phase: Phase, gradients: Gradients, work: LocalWork) -> tuple[Client, Sequence[LocalTrain]]:
    """Run a phase. Return the resulting client, and each `Train` that took steps. The client's buffers are changed in place."""
    if not phase.works_in(work.turn):
        return work.client, ()
    if isinstance(phase, Set):
        return run_set(phase, work), ()
    if isinstance(phase, Sweep):
        with own_randomness(work.context.rng, work.context.rows.device):
            return run_sweep(phase, gradients, work), ()
    buffers = work.client.weights["buffers"]
    before = tree.clone(buffers)
    try:
        return _walk_batches(phase, gradients, work)
    except FormError:  # the faster form does not support what the loss does on some batch; rerun the phase
        tree.map_tree(Tensor.copy_, buffers, before)
        return _walk_batches(phase, gradients, work, same_bits=True)


def _walk_batches(
    phase: Train | Interleave, gradients: Gradients, work: LocalWork, *, same_bits: bool = False
) -> tuple[Client, Sequence[LocalTrain]]:
    """Train on the client's batches: every `Train` of the phase takes one step per batch. See also `_run_phase`.

    Args:
        same_bits: see `FastForms.runner`.
    """
    client, _, context, turn = work
    rows, rng = context.rows, context.rng
    weights = {**client.weights, "params": dict(client.weights["params"])}
    order = phase_batches(phase, context.plan, rows, rng)
    trains = active_trains(phase, turn)
    with own_randomness(rng, rows.device):
        members = [
            LocalTrain(t, gradients, work, weights, phase=phase, order=order, same_bits=same_bits) for t in trains
        ]
        check_precompute(phase, [member.names for member in members])
        for index, batch in zip(order, rows.batches(order, rng.child("augment")), strict=True) if members else ():
            shared = None
            if isinstance(phase, Interleave) and phase.precompute:
                shared = precompute(phase, trains, gradients, members[-1].inputs(members[-1].params(), batch))
            for member in members:
                last = member is members[-1]
                for _ in range(member.train.repeats):
                    member.step(index, batch, shared if last or shared is None else shared.detached())
    for member in members:
        weights["params"].update(member.runner.finished())
    kept = {member.train.name: member.state for member in members if member.train.keep_state}
    return client._replace(weights=weights, opts={**client.opts, **kept}), members


class LocalTrain:
    """The state of one `Train` for one client: its optimiser state, and the sums of its logs."""

    def __init__(
        self,
        train: Train,
        gradients: Gradients,
        work: LocalWork,
        weights: Weights,
        *,
        phase: Train | Interleave,
        order: Sequence[Tensor],
        same_bits: bool,
    ) -> None:
        """Prepare for the batches in `order`. Steps will change `weights`, which several members may share."""
        client, _, context, _ = work
        self.train, self.work, self.weights = train, work, weights
        self.names = trained_names(train, weights)
        params = {name: weights["params"][name] for name in self.names}
        self.state = client.opts[train.name] if train.keep_state else train.optimizer.init(params)
        self.steps, self.sums = 0, dict[str, Tensor]()
        self._draws = context.rng.child("draw", train.name)
        job = TrainJob(
            train=train,
            names=self.names,
            alone=train is phase,
            work=work,
            order=order,
            step=partial(gradients.step, train),
            clients=[client],
            inputs=map_inputs(lambda x: x[None], context.rows.x),
        )
        self.runner = gradients.forms.runner(job, same_bits=same_bits)

    def step(self, index: Tensor, batch: Batch, shared: Precomputed | None = None) -> None:
        """Take one optimiser step on `batch`, which contains the examples `index`.

        Args:
            shared: precomputed values of the batch.
        """
        run = shared.around(self.runner.run) if shared else self.runner.run
        params, lr_scale = self.params(), self.work.turn.lr_scale
        grads, logs = run(self.inputs(params | self.runner.extra(index), self._with_draws(batch)))
        self.runner.after_step(index, grads, lr_scale)
        if self.steps:
            self.train.optimizer.step(grads, self.state, params, lr_scale)  # in place
        else:  # other code may use the weights and the state with which the phase starts, so do not change them
            params, self.state = self.train.optimizer.update(grads, self.state, params, lr_scale)
            self.weights["params"].update(params)
        self.steps += 1
        for name, value in logs.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def params(self) -> Params:
        """Return the parameters that the optimiser updates."""
        return {name: self.weights["params"][name] for name in self.runner.names}

    def inputs(self, wanted: Params, batch: Batch) -> Tree:
        """Return the inputs of a step. Gradients are computed for `wanted`."""
        memory = self.work.client.memory
        return {"wanted": wanted, **self.weights, "batch": batch._asdict(), "down": self.work.down, "memory": memory}

    def _with_draws(self, batch: Batch) -> Batch:
        """Return the batch with the step's random tensors."""
        if not self.train.draw:
            return batch
        drawn = self.train.draw(batch, self.work.context.task, self._draws)
        device = self.work.context.rows.device
        return batch._replace(draws={name: staged(value, device) for name, value in drawn.items()})

    def mean_logs(self) -> dict[str, float]:
        """Return the means over the steps, named `train.loss` and `train.<log>`."""
        return {f"{self.train.name}.{name}": float(value) / self.steps for name, value in self.sums.items()}


@contextmanager
def own_randomness(rng: Stream, device: torch.device) -> Iterator[None]:
    """Seed torch's generators for modules with their own randomness (Dropout), and restore them at the end.

    Only the generators of the host and of this device are seeded. `torch.manual_seed` also seeds every other accelerator, which costs more
    than a step of a small model.
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


ONE_VALUE = "Expected more than 1 value per channel"  # part of torch's message
TOO_FEW = "BatchNorm cannot train on a batch of one example; raise partition.min_examples or batch_size, or use model.norm=group"


def fresh_modules(build: Callable[[], Any], rng: Stream) -> dict[str, nn.Module]:
    """Build modules whose initial weights depend only on `rng`.

    Frozen parameters (`requires_grad=False`) keep the values with which they are built.
    """
    with torch.random.fork_rng(devices=[]):
        # without a GPU, torch.manual_seed records a stack trace for every kind of accelerator, which takes longer than a small model
        seed = torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed
        seed(rng.torch_seed())
        modules: dict[str, nn.Module] = build()
    for module in modules.values():
        module.to(torch.get_default_dtype())  # a module that a user has built may have another precision
        module.train()  # a module may override this, for example to keep a layer in evaluation mode
    return modules
