"""Turns of several clients at once: clients of one architecture are lanes of stacked tensors, and losses are mapped over the lanes.

The numbers are those of `fedloom.training.turn`, lane by lane, up to the rounding of batched matrix products. Every lane walks
through its own batches in its own order; at each step the lanes whose batches have the same size advance together, so ragged
clients need neither padding nor masks. Sort clients by their number of rows, and nearly all steps are whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fedloom import tree
from fedloom.accelerator import synchronise
from fedloom.method import Batch, Client, Free, Interleave, Method, Phase, Sweep, Task, Train, Turn
from fedloom.nets import select
from fedloom.rng import Stream
from fedloom.training.batches import Rows, is_channels_last, laid_out
from fedloom.training.fast.gram_layer import Dual
from fedloom.training.gradients import Gradients, Once
from fedloom.training.turn import Outcome, Site, check_batch, check_once, dual_layers, report, sweep
from fedloom.tree import Tree, Weights


class CannotMapError(Exception):
    """These turns cannot be mapped over lanes; the text says why."""


class Lane(NamedTuple):
    """One client at work."""

    client: Client
    down: Tree
    site: Site
    turn: Turn


def run_turns(
    method: Method,
    gradients: Gradients,
    clients: Sequence[Client],
    sent: Sequence[Tree],
    sites: Sequence[Site],
    number: int,
) -> list[Callable[[], Outcome]]:
    """The turns of several clients in round `number`, of one architecture and with the same work; see `training.run_turn`.

    Returns:
        What ends each turn: one after another, a client's tensors stay in the cache until they are looked at and sent.

    Raises:
        CannotMapError: a phase, a loss or a module cannot be mapped over lanes. Nothing has changed then.
    """
    downs = [site.codec.received(message) for site, message in zip(sites, sent, strict=True)]
    received = [method.receive(c.weights, down, c.memory) for c, down in zip(clients, downs, strict=True)]
    lanes = []
    for client, weights, down, site in zip(clients, received, downs, sites, strict=True):
        params = laid_out(weights["params"], is_channels_last(site.rows.x))
        buffers = {name: b.clone() for name, b in weights["buffers"].items()}
        turn = Turn(number, site.task.rounds - 1, len(site.rows.y))
        lanes.append(Lane(client._replace(weights={"params": params, "buffers": buffers}), down, site, turn))
    logs: list[dict[str, float]] = [{} for _ in lanes]
    seconds: dict[str, float] = {}  # a lane's part of them
    ends: Sequence[Callable[[], Lane]] = [partial(_same, lane) for lane in lanes]
    for phase in method.phases():
        started = time.perf_counter()
        lanes = [end() for end in ends]
        ends = _run_phase(phase, gradients, lanes, method.lr_scale(number), logs)
        synchronise(sites[0].rows.device)
        seconds[phase.name] = (time.perf_counter() - started) / len(lanes)

    def ended(end: Callable[[], Lane], weights: Weights, noted: dict[str, float]) -> Outcome:
        started = time.perf_counter()
        lane = end()
        last, own = next(reversed(seconds), ""), time.perf_counter() - started
        by_phase = {name: part + own * (name == last) for name, part in seconds.items()}
        return report(method, lane.client, weights, lane.down, lane.site, lane.turn, noted, by_phase)

    return [partial(ended, *one) for one in zip(ends, received, logs, strict=True)]


def _same(lane: Lane) -> Lane:
    return lane


def _run_phase(
    phase: Phase, gradients: Gradients, lanes: list[Lane], lr_scale: float, logs: list[dict[str, float]]
) -> list[Callable[[], Lane]]:
    """What gives each lane after a phase."""
    if isinstance(phase, Free):
        raise CannotMapError(f"phase '{phase.name}' is Free")
    if isinstance(phase, Sweep):
        swept = [sweep(phase, gradients.modules, lane.client, lane.down, lane.site.rows) for lane in lanes]
        return [partial(_same, lane._replace(client=client)) for lane, client in zip(lanes, swept, strict=True)]
    trains = (phase,) if isinstance(phase, Train) else phase.members
    active = [train for train in trains if train.works_in(lanes[0].turn)]
    if not active:
        return [partial(_same, lane) for lane in lanes]
    return _Stack(phase, active, gradients, lanes).run(lr_scale, logs)


class _Stack:
    """The tensors of all lanes in one phase, stacked along a first dimension where lanes differ."""

    def __init__(
        self, phase: Train | Interleave, trains: Sequence[Train], gradients: Gradients, lanes: list[Lane]
    ) -> None:
        self.phase, self.trains, self.gradients, self.lanes = phase, trains, gradients, lanes
        weights = [lane.client.weights for lane in lanes]
        self.names = {train.name: list(select(weights[0], train.trains)["params"]) for train in trains}
        check_once(phase, list(self.names.values()))
        self.sites = [lane.site._replace(rng=lane.site.rng.child(phase.name)) for lane in lanes]
        self.rows = _Together([site.rows for site in self.sites])
        self.plans = [_planned(phase, site) for site in self.sites]
        self.duals = self._in_dual_form()
        trained = {name for names in self.names.values() for name in names}
        changing = trained | self.duals.keys()
        fixed = [{name: p for name, p in w["params"].items() if name not in changing} for w in weights]
        self.params = tree.stack([{name: w["params"][name] for name in sorted(trained)} for w in weights])
        self.buffers = tree.stack([w["buffers"] for w in weights])
        self.around, self.dims = _stacked(
            [
                {"fixed": f, "down": lane.down, "memory": lane.client.memory}
                for f, lane in zip(fixed, lanes, strict=True)
            ]
        )
        self.device = lanes[0].site.rows.device
        self.states = {t.name: self._here(tree.stack([self._state(t, lane) for lane in lanes])) for t in trains}
        self.sums: dict[str, dict[str, Tensor]] = {train.name: {} for train in trains}

    def _here(self, value: Tree) -> Tree:
        return tree.map_tree(lambda leaf: leaf.to(self.device), value)

    def _state(self, train: Train, lane: Lane) -> Tree:
        if train.keep_state:
            state: Tree = lane.client.opts[train.name]
            return state
        return train.optimizer.init({name: lane.client.weights["params"][name] for name in self.names[train.name]})

    def run(self, lr_scale: float, logs: list[dict[str, float]]) -> list[Callable[[], Lane]]:
        """Train every lane on its own batches; returns what gives each lane after it, and adds to its logs."""
        trains, sites = self.trains, self.sites
        plans = [self.rows.places(k, plan) for k, plan in enumerate(self.plans)]
        augment = [site.rng.child("augment") for site in sites]
        draws = {t.name: [site.rng.child("draw", t.name) for site in sites] for t in trains}
        for step in range(max(map(len, plans))):
            for group in _by_size([len(plan[step]) if step < len(plan) else 0 for plan in plans]):
                places = torch.cat([plans[k][step] for k in group])
                batch = self.rows.batch(places, [augment[k] for k in group])
                streams = {t.name: [draws[t.name][k] for k in group] for t in trains}
                self._advance(_Taken(group, len(self.lanes), self.device), batch, places, streams, lr_scale)
        for train in trains:
            for name, sums in self.sums[train.name].items():
                for noted, plan, value in zip(logs, plans, sums.tolist(), strict=True):
                    noted[f"{train.name}.{name}"] = value / len(plan)
        return [partial(self._lane, k, len(plan)) for k, plan in enumerate(plans)]

    def _in_dual_form(self) -> dict[str, Dual]:
        """The input layers whose weights are not stacked, since nobody needs them before the end."""
        lr = self.trains[0].optimizer.plain_lr
        if isinstance(self.phase, Interleave) or lr is None:
            return {}
        (train,), first = self.trains, self.lanes[0]
        sited, names = first.site._replace(rng=self.sites[0].rng), self.names[train.name]
        here = self.gradients, first.client, first.down, sited
        duals = dual_layers(train, names, *here, self.plans[0], len(self.lanes))
        self.names[train.name] = [name for name in names if name not in duals]
        params = [lane.client.weights["params"] for lane in self.lanes]
        return {name: Dual([mine[name] for mine in params], self.rows.x, lr) for name in duals}

    def _advance(
        self,
        taken: _Taken,
        batch: Batch,
        places: Tensor,
        streams: Mapping[str, Sequence[Stream]],
        lr_scale: float,
    ) -> None:
        """A step of every member on the next batches of some lanes, stacked."""
        check_batch(batch.y.shape[1], self.trains, self.gradients.modules)
        rows: Tree = {"x": batch.x, "y": batch.y, "draws": {}, "once": {}}
        once = self._once(taken, rows)
        if once:
            rows["once"] = once.numbers
        for train in self.trains:
            drawn = self._here(_drawn(train, batch, self.lanes[0].site.task, streams[train.name]))
            way = once if train is self.trains[-1] else None
            self._step(train, taken, {**rows, "draws": drawn}, places, lr_scale, way)

    def _inputs(self, names: Sequence[str], taken: _Taken, rows: Tree, through: Tree) -> tuple[Tree, Tree]:
        """All that a step of the lanes in `taken` depends on, and the dimension of each leaf's lanes."""
        wanted = {name: taken.out(self.params[name]) for name in names}
        others = {name: taken.out(p) for name, p in self.params.items() if name not in wanted}
        buffers = tree.map_tree(taken.out, self.buffers)
        own = {"wanted": {**wanted, **through}, "others": others, "buffers": buffers, "batch": rows}
        around = tree.map_tree(lambda leaf, dim: leaf if dim is None else taken.out(leaf), self.around, self.dims)
        return {**own, **around}, {**tree.map_tree(lambda _: 0, own), **self.dims}  # type: ignore[arg-type, return-value]

    def _once(self, taken: _Taken, rows: Tree) -> Once | None:
        if isinstance(self.phase, Train) or not self.phase.once:
            return None
        inputs, dims = self._inputs(self.names[self.trains[-1].name], taken, rows, {})
        once = self.gradients.mapped_once(self.phase, self.trains, inputs, dims)
        self.buffers = tree.map_tree(taken.back, self.buffers, inputs["buffers"])
        return once

    def _step(
        self, train: Train, taken: _Taken, rows: Tree, places: Tensor, lr_scale: float, once: Once | None
    ) -> None:
        """One step of the lanes in `taken`; gradients flow through `once`, if given."""
        names, through = self.names[train.name], once.through if once else {}
        through |= {name: dual.outputs(places, taken.rows) for name, dual in self.duals.items()}
        inputs, dims = self._inputs(names, taken, rows, through)
        grads, logs = self.gradients.mapped(train, inputs, dims, tuple(self.duals))
        if once:
            grads = once.back(grads)
        for name, dual in self.duals.items():
            dual.step(places, grads[name], lr_scale)
        wanted = {name: inputs["wanted"][name] for name in names}
        state = tree.map_tree(taken.out, self.states[train.name])
        train.optimizer.step(grads, state, wanted, lr_scale)  # stacked tensors are nobody else's
        for name in names:
            self.params[name] = taken.back(self.params[name], wanted[name])
        self.buffers = tree.map_tree(taken.back, self.buffers, inputs["buffers"])
        self.states[train.name] = tree.map_tree(taken.back, self.states[train.name], state)
        sums = self.sums[train.name]
        for name, value in logs.items():
            so_far = sums.get(name, value.new_zeros(len(self.lanes)))
            sums[name] = taken.back(so_far, taken.out(so_far) + value)

    def _lane(self, k: int, n_steps: int) -> Lane:
        """Lane `k` by itself again."""
        lane = self.lanes[k]

        def mine(value: Tree) -> Tree:
            return tree.map_tree(lambda leaf: leaf[k].clone(), value)

        params = {**lane.client.weights["params"], **mine(self.params)}
        params |= {name: dual.weight(k) for name, dual in self.duals.items()}
        weights = {"params": params, "buffers": mine(self.buffers)}
        kept = {train.name: mine(self.states[train.name]) for train in self.trains if train.keep_state}
        client = lane.client._replace(weights=weights, opts={**lane.client.opts, **kept})
        steps = {**lane.turn.steps, **{train.name: n_steps for train in self.trains}}
        return lane._replace(client=client, turn=lane.turn._replace(steps=steps))


class _Taken:
    """Some of the lanes, taken out of stacked tensors and put back."""

    def __init__(self, group: list[int], n_lanes: int, device: torch.device) -> None:
        self.rows = None if len(group) == n_lanes else torch.tensor(group, device=device)

    def out(self, value: Tensor) -> Tensor:
        return value if self.rows is None else value.index_select(0, self.rows)

    def back(self, value: Tensor, new: Tensor) -> Tensor:
        return new if self.rows is None else value.index_copy(0, self.rows, new)


class _Together:
    """The rows of all lanes in one tensor, so that a step takes its batches in one piece."""

    def __init__(self, lanes: Sequence[Rows]) -> None:
        _, _, self._augment, device = lanes[0]
        self.x, y = (_side_by_side(parts) for parts in ([rows.x for rows in lanes], [rows.y for rows in lanes]))
        self._rows = Rows(self.x.flatten(0, 1), y.flatten(), None, device)

    def places(self, lane: int, batches: Sequence[Tensor]) -> Sequence[Tensor]:
        """A lane's batches by where their rows lie among those of all lanes."""
        return torch.split(torch.cat(list(batches)) + lane * self.x.shape[1], [len(batch) for batch in batches])

    def batch(self, places: Tensor, streams: Sequence[Stream]) -> Batch:
        """The same number of rows of as many lanes as there are streams, stacked: x (lanes, B, ...), y (lanes, B)."""
        x, y, *_ = self._rows.batch(places, streams[0])
        x, y = x.view(len(streams), -1, *x.shape[1:]), y.view(len(streams), -1)
        if self._augment:
            x = torch.stack([self._augment(own, stream) for own, stream in zip(x, streams, strict=True)])
        return Batch(x, y)


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Tensors (n, ...) with zeros after the shorter ones: (lanes, most, ...). Not copied where they lie so in memory already."""
    first, storage = parts[0], parts[0].untyped_storage().data_ptr()
    places = [first.storage_offset() + k * first.numel() for k in range(len(parts))]
    if all(
        part.shape == first.shape
        and part.is_contiguous()
        and part.untyped_storage().data_ptr() == storage
        and part.storage_offset() == place
        for part, place in zip(parts, places, strict=True)
    ):
        return first.as_strided((len(parts), *first.shape), (first.numel(), *first.stride()))
    return pad_sequence(list(parts), batch_first=True)


def _planned(phase: Train | Interleave, site: Site) -> list[Tensor]:
    """A lane's batches, as row numbers."""
    return list(site.plan.batches(len(site.rows.y), phase.epochs, phase.steps, site.rng.child("batches")))


def _drawn(train: Train, batch: Batch, task: Task, streams: Sequence[Stream]) -> Tree:
    """The lanes' random tensors, stacked."""
    if not train.draw:
        return {}
    lanes = zip(batch.x, batch.y, streams, strict=True)
    return tree.stack([dict(train.draw(Batch(x, y), task, rng)) for x, y, rng in lanes])


def _by_size(sizes: Sequence[int]) -> list[list[int]]:
    """Places with equal sizes together; those of size 0 are left out."""
    groups: dict[int, list[int]] = {}
    for place, size in enumerate(sizes):
        if size:
            groups.setdefault(size, []).append(place)
    return list(groups.values())


def _stacked(trees: Sequence[Tree]) -> tuple[Tree, Tree]:
    """One tree for all lanes, and for each leaf 0 if it was stacked, or None if all lanes hold the very same tensor."""

    def is_shared(*leaves: Tensor) -> bool:
        return all(leaf is leaves[0] for leaf in leaves)

    value = tree.map_tree(lambda *leaves: leaves[0] if is_shared(*leaves) else torch.stack(leaves), *trees)
    dims = tree.map_tree(lambda *leaves: None if is_shared(*leaves) else 0, *trees)  # type: ignore[arg-type]
    return value, dims
