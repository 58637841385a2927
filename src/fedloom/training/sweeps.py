"""Passes over a client's examples without optimiser steps: the phases `Sweep` and `Set`, and prediction."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fedloom import tree
from fedloom.accelerator import staged
from fedloom.errors import MethodError
from fedloom.inputs import Inputs, map_inputs, n_examples
from fedloom.method import Client, Predictor, Set, Sweep
from fedloom.training.batches import is_channels_last, laid_out
from fedloom.training.context import LocalWork
from fedloom.training.gradients import Gradients
from fedloom.tree import Tree, Weights

EVAL_BATCH = 512


def run_sweep(phase: Sweep, gradients: Gradients, work: LocalWork) -> Client:
    """Accumulate the phase's statistics over all examples that it visits, and store them in the client's memory."""
    client, down, rows = work.client, work.down, work.context.rows
    if phase.rows == "valid":
        rows = work.context.valid or rows
    if phase.name not in client.memory:
        raise MethodError(f"sweep '{phase.name}' needs memory['{phase.name}']; create it in init_memory")
    nets = gradients.nets(**client.weights)
    total = tree.zeros_like(client.memory[phase.name])
    inputs = {"rows": {"x": rows.x, "y": rows.y}, "down": down, "memory": client.memory, "weights": client.weights}
    with read_only(f"phase '{phase.name}'", inputs), torch.no_grad():  # unlike inference mode, allows `nets.gradient`
        for start in range(0, len(rows.y), EVAL_BATCH):
            batch = rows.part(start, start + EVAL_BATCH)
            total = phase.step(nets, batch, total, down, client.memory)
    return client._replace(memory={**client.memory, phase.name: tree.clone(total)})


def run_set(phase: Set, work: LocalWork) -> Client:
    """Replace the client's weights by those that the phase computes.

    Raises:
        MethodError: the new weights have other names, shapes or types.
    """
    client, down = work.client, work.down
    weights = client.weights
    with (
        read_only(f"phase '{phase.name}'", {"weights": weights, "down": down, "memory": client.memory}),
        torch.no_grad(),
    ):
        new = phase.weights(weights, down, client.memory)
    if wrong := tree.mismatch(weights, new):
        raise MethodError(
            f"phase '{phase.name}' must return all weights with their names, shapes and types, but {wrong}"
        )
    params = laid_out(new["params"], is_channels_last(work.context.rows.x))
    buffers = {name: new["buffers"][name].clone() for name in weights["buffers"]}  # later phases write to them
    return client._replace(weights={"params": {name: params[name] for name in weights["params"]}, "buffers": buffers})


@contextmanager
def read_only(what: str, inputs: Tree) -> Iterator[None]:
    """Raise MethodError if `what`, a phase or a hook, writes to tensors that later phases or other clients read."""
    before = tree.versions(inputs)
    yield
    changed = tree.changed_since(before, inputs)
    if changed:
        raise MethodError(f"{what} changes '{changed}' in place; its inputs are read-only")


@torch.inference_mode()
def predict(
    predictor: Predictor,
    gradients: Gradients,
    client: Client,
    x: Inputs,
    down: Tree,
    *,
    batch: int = EVAL_BATCH,
) -> Tensor:
    """Return the outputs, such as logits (n, Y), of all examples, computed in evaluation mode and in large batches."""
    weights: Weights = client.weights
    nets = gradients.nets(laid_out(weights["params"], is_channels_last(x)), weights["buffers"])
    with gradients.autocast():
        starts = range(0, n_examples(x), batch)
        parts = (map_inputs(lambda v, k=k: staged(v[k : k + batch], gradients.device), x) for k in starts)
        return torch.cat([predictor(nets, part, down, client.memory) for part in parts])
