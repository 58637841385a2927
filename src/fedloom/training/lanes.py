"""Updates of several clients at once. Clients of one architecture are lanes of stacked tensors, and losses are mapped over the lanes.

Each lane has the same results as with `fedloom.training.turn`, up to the rounding of batched matrix products. Every lane has its own
batches in its own order. In each step, the lanes whose batches have the same size advance together, so clients with different numbers of
examples need no padding or masks. If clients are sorted by their number of examples, nearly all steps include all lanes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fedloom import tree
from fedloom.accelerator import synchronise
from fedloom.inputs import unstacked
from fedloom.method import Batch, Client, Interleave, Method, Phase, Set, Sweep, Train, active_trains
from fedloom.optim import Params
from fedloom.training.batches import is_channels_last, laid_out, phase_batches
from fedloom.training.context import ClientContext, LocalWork
from fedloom.training.gradients import Gradients
from fedloom.training.lane_gradients import LaneGradients
from fedloom.training.lane_tensors import LaneBatch, LaneRows, LaneSubset, by_size, stack_differing
from fedloom.training.precompute import Precomputed, check_precompute
from fedloom.training.steps import StepRunner, TrainJob, trained_names
from fedloom.training.sweeps import run_set, run_sweep
from fedloom.training.turn import UpdateResult, finish_update, turn_of
from fedloom.tree import Tree, Weights


class CannotMapError(Exception):
    """These updates cannot be mapped over lanes. The message states the reason."""


def client_updates(
    method: Method,
    gradients: Gradients,
    clients: Sequence[Client],
    sent: Sequence[Tree],
    contexts: Sequence[ClientContext],
    *,
    number: int,
) -> list[Callable[[], UpdateResult]]:
    """Run the updates of several clients in round `number`; see `client_update`. They must have the same architecture and phases.

    Returns:
        One function per client, which finishes its update. If the functions are called one by one, a client's tensors are still in the
        processor's cache when its uplink is computed.

    Raises:
        CannotMapError: a phase, a loss or a module cannot be mapped over lanes. All clients are unchanged.
    """
    lanes = [_received(method, *one, number) for one in zip(clients, sent, contexts, strict=True)]
    received = [lane.client.weights for lane in lanes]
    logs: list[dict[str, float]] = [{} for _ in lanes]
    seconds: dict[str, float] = {}  # seconds per lane, by phase
    ends: Sequence[Callable[[], LocalWork]] = [partial(_same, _laid_out(lane)) for lane in lanes]
    for phase in method.phases():
        started = time.perf_counter()
        ends = _run_phase(phase, gradients, [end() for end in ends], logs)
        synchronise(contexts[0].rows.device)
        seconds[phase.name] = (time.perf_counter() - started) / len(lanes)

    def finish(end: Callable[[], LocalWork], weights: Weights, noted: dict[str, float]) -> UpdateResult:
        started = time.perf_counter()
        work = end()
        last, own = next(reversed(seconds), ""), time.perf_counter() - started
        by_phase = {name: spent + own * (name == last) for name, spent in seconds.items()}
        return finish_update(method, work, weights, logs=noted, seconds=by_phase)

    return [partial(finish, *one) for one in zip(ends, received, logs, strict=True)]


def _received(method: Method, client: Client, sent: Tree, context: ClientContext, number: int) -> LocalWork:
    """Return the inputs of one client's local update, with the weights from which it starts."""
    down = context.codec.received(sent)
    received = method.receive(client.weights, down, client.memory)
    turn = turn_of(method, context.task, number, len(context.rows.y))
    return LocalWork(client._replace(weights=received), down, context, turn)


def _laid_out(lane: LocalWork) -> LocalWork:
    """Return the same client with copies of all tensors that its phases write to."""
    weights = lane.client.weights
    params = laid_out(weights["params"], is_channels_last(lane.context.rows.x))
    buffers = {name: b.clone() for name, b in weights["buffers"].items()}
    return lane._replace(client=lane.client._replace(weights={"params": params, "buffers": buffers}))


def _same(lane: LocalWork) -> LocalWork:
    return lane


def _run_phase(
    phase: Phase, gradients: Gradients, lanes: list[LocalWork], logs: list[dict[str, float]]
) -> list[Callable[[], LocalWork]]:
    """Run a phase. Return one function per lane, which returns the lane after the phase."""
    if isinstance(phase, Sweep | Set) and phase.works_in(lanes[0].turn):
        done = [run_set(phase, lane) if isinstance(phase, Set) else run_sweep(phase, gradients, lane) for lane in lanes]
        return [partial(_same, lane._replace(client=client)) for lane, client in zip(lanes, done, strict=True)]
    active = active_trains(phase, lanes[0].turn)
    if isinstance(phase, Sweep | Set) or not active:
        return [partial(_same, lane) for lane in lanes]
    return LaneStack(phase, active, gradients, lanes).run(logs)


class LaneTrain:
    """The state of one `Train` for several clients: their optimiser states and the sums of their logs, stacked."""

    def __init__(self, train: Train, runner: StepRunner, lanes: Sequence[LocalWork]) -> None:
        """Stack the state. `lanes` contains clients of one round, with the phase's random streams. Their `lr_scale` is the same."""
        self.train, self.runner, self._lanes = train, runner, lanes
        self.device, self.lr_scale = lanes[0].context.rows.device, lanes[0].turn.lr_scale
        self.state = self._here(tree.stack([self._first_state(lane.client) for lane in lanes]))
        self.sums: dict[str, Tensor] = {}
        self._streams = [lane.context.rng.child("draw", train.name) for lane in lanes]

    def _first_state(self, client: Client) -> Tree:
        if self.train.keep_state:
            state: Tree = client.opts[self.train.name]
            return state
        return self.train.optimizer.init({name: client.weights["params"][name] for name in self.runner.names})

    def draw(self, at: LaneBatch) -> Tree:
        """Return the step's random tensors, stacked."""
        if not self.train.draw:
            return {}
        n = len(at.subset.lanes)
        lanes = zip(unstacked(at.batch.x, n), at.batch.y, [self._streams[k] for k in at.subset.lanes], strict=True)
        task = self._lanes[0].context.task
        return self._here(tree.stack([dict(self.train.draw(Batch(x, y), task, rng)) for x, y, rng in lanes]))

    def update(self, grads: Params, params: Params, subset: LaneSubset) -> None:
        """Take an optimiser step for some lanes. Updates in place are safe, because nothing else uses the stacked tensors."""
        state = tree.map_tree(subset.take, self.state)
        self.train.optimizer.step(grads, state, params, self.lr_scale)
        self.state = tree.map_tree(subset.put, self.state, state)

    def log(self, logs: Params, subset: LaneSubset) -> None:
        """Add the logs of one step of some lanes."""
        for name, value in logs.items():
            so_far = self.sums.get(name, value.new_zeros(len(self._lanes)))
            self.sums[name] = subset.put(so_far, subset.take(so_far) + value)

    def _here(self, value: Tree) -> Tree:
        return tree.map_tree(lambda leaf: leaf.to(self.device), value)


class LaneStack:
    """The tensors of all lanes in one phase. Tensors that differ between lanes are stacked along a first dimension."""

    def __init__(
        self, phase: Train | Interleave, trains: Sequence[Train], gradients: Gradients, lanes: list[LocalWork]
    ) -> None:
        self.phase, self.modules, self.lanes = phase, gradients.modules, lanes
        self.here = [
            lane._replace(context=replace(lane.context, rng=lane.context.rng.child(phase.name))) for lane in lanes
        ]
        self.rows = LaneRows([lane.context.rows for lane in lanes])
        self.orders = [
            phase_batches(phase, lane.context.plan, lane.context.rows, lane.context.rng) for lane in self.here
        ]
        weights = [lane.client.weights for lane in lanes]
        names = [trained_names(train, weights[0]) for train in trains]
        check_precompute(phase, names)
        trained = {name for mine in names for name in mine}
        self.around, self.dims = stack_differing([_around(lane, trained) for lane in lanes])
        self.gradients = LaneGradients(gradients, self.dims)
        self.members = [
            LaneTrain(train, gradients.forms.runner(self._job(train, mine, gradients, trained)), self.here)
            for train, mine in zip(trains, names, strict=True)
        ]
        stacked = sorted({name for member in self.members for name in member.runner.names})
        self.params = tree.stack([{name: w["params"][name] for name in stacked} for w in weights])
        self.buffers = tree.stack([w["buffers"] for w in weights])

    def _job(self, train: Train, names: list[str], gradients: Gradients, trained: set[str]) -> TrainJob:
        return TrainJob(
            train=train,
            names=names,
            alone=train is self.phase,
            work=self.here[0],
            order=self.orders[0],
            step=partial(gradients.step, train),
            clients=[lane.client for lane in self.lanes],
            inputs=self.rows.x,
            stacked_step=partial(self.gradients.step, train),
            layout=(tuple(tree.flatten(self.dims)), tuple(sorted(trained))),
        )

    def run(self, logs: list[dict[str, float]]) -> list[Callable[[], LocalWork]]:
        """Train every lane on its own batches, and add mean logs to `logs`.

        Return one function per lane, which returns the trained lane.
        """
        plans = [self.rows.places(k, order) for k, order in enumerate(self.orders)]
        augment = [lane.context.rng.child("augment") for lane in self.here]
        device = self.lanes[0].context.rows.device
        for step in range(max(map(len, plans))):
            for group in by_size([len(plan[step]) if step < len(plan) else 0 for plan in plans]):
                subset, places = LaneSubset(group, len(plans), device), torch.cat([plans[k][step] for k in group])
                batch = self.rows.batch(places, [augment[k] for k in group])
                self._advance(LaneBatch(subset, batch, places))
        for member in self.members:
            for name, sums in member.sums.items():
                for noted, plan, value in zip(logs, plans, sums.tolist(), strict=True):
                    noted[f"{member.train.name}.{name}"] = value / (len(plan) * member.train.repeats)
        return [partial(self._lane, k, len(plan)) for k, plan in enumerate(plans)]

    def _advance(self, at: LaneBatch) -> None:
        """Take one step with every member on the next batches of some lanes."""
        shared = self._precompute(at)
        for member in self.members:
            last = member is self.members[-1]
            for _ in range(member.train.repeats):
                self._step(member, at, shared if last or shared is None else shared.detached())

    def _step(self, member: LaneTrain, at: LaneBatch, shared: Precomputed | None) -> None:
        """Take one step with one member on some lanes; see `LocalTrain.step`."""
        subset, runner = at.subset, member.runner
        run = shared.around(runner.run) if shared else runner.run
        params = self._params(member, subset)
        batch = at.batch._replace(draws=member.draw(at))
        inputs = self._inputs(params | runner.extra(at.places, subset.index), subset, batch)
        grads, logs = run(inputs)
        runner.after_step(at.places, grads, member.lr_scale)
        member.update(grads, params, subset)
        for name, value in params.items():
            self.params[name] = subset.put(self.params[name], value)
        self.buffers = tree.map_tree(subset.put, self.buffers, inputs["buffers"])
        member.log(logs, subset)

    def _precompute(self, at: LaneBatch) -> Precomputed | None:
        if isinstance(self.phase, Train) or not self.phase.precompute:
            return None
        inputs = self._inputs(self._params(self.members[-1], at.subset), at.subset, at.batch)
        shared = self.gradients.precompute(self.phase, [member.train for member in self.members], inputs)
        self.buffers = tree.map_tree(at.subset.put, self.buffers, inputs["buffers"])
        return shared

    def _params(self, member: LaneTrain, subset: LaneSubset) -> Params:
        """Return the parameters of some lanes that a member's optimiser updates."""
        return {name: subset.take(self.params[name]) for name in member.runner.names}

    def _inputs(self, wanted: Params, subset: LaneSubset, batch: Batch) -> Tree:
        """Return the inputs of a step for some lanes; see `LaneGradients`."""
        others = {name: subset.take(p) for name, p in self.params.items() if name not in wanted}
        buffers = tree.map_tree(subset.take, self.buffers)
        around = tree.map_tree(lambda leaf, dim: leaf if dim is None else subset.take(leaf), self.around, self.dims)
        return {"wanted": wanted, "others": others, "buffers": buffers, "batch": batch._asdict(), **around}

    def _lane(self, k: int, n_steps: int) -> LocalWork:
        """Return the client of lane `k` with its own tensors."""
        lane = self.lanes[k]

        def mine(value: Tree) -> Tree:
            return tree.map_tree(lambda leaf: leaf[k].clone(), value)

        params = {**lane.client.weights["params"], **mine(self.params)}
        for member in self.members:
            params |= member.runner.finished(k)
        weights = {"params": params, "buffers": mine(self.buffers)}
        kept = {member.train.name: mine(member.state) for member in self.members if member.train.keep_state}
        client = lane.client._replace(weights=weights, opts={**lane.client.opts, **kept})
        steps = {**lane.turn.steps, **{member.train.name: n_steps * member.train.repeats for member in self.members}}
        return lane._replace(client=client, turn=replace(lane.turn, steps=steps))


def _around(lane: LocalWork, trained: set[str]) -> Tree:
    """Return the tensors that a lane's steps read but do not change."""
    fixed = {name: p for name, p in lane.client.weights["params"].items() if name not in trained}
    return {"fixed": fixed, "down": lane.down, "memory": lane.client.memory}
