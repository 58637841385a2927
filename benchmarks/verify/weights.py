"""Descriptions of comparisons of two tools, and the weights that are compared."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fedloom.experiment.loop import Experiment
from fedloom.nets import read_weights

CLIENTS, TRAIN, VALID, TEST, ROUNDS, HIDDEN, LR = 4, 40, 8, 10, 3, 20, 0.1

Arrays = list[Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A method in both tools."""

    server: str
    """PFLlib's server, in the form module:Class."""
    ours: Mapping[str, Any] = field(default_factory=dict)
    """fedloom's hyper-parameters."""
    rounds: int = ROUNDS
    """Number of our rounds."""
    theirs: Mapping[str, Any] = field(default_factory=dict)
    """PFLlib's arguments."""
    split: bool = True
    """Whether PFLlib divides the model into a base and a head."""
    parts: Mapping[str, tuple[Callable[[Experiment], Sequence[Arrays]], Callable[[Any], Sequence[Arrays]]]]
    """The models that are compared, by name: functions of our run and of PFLlib's server that return one list of tensors per model."""
    starts: Callable[[Experiment, Any], None] | None = None
    """A function that copies further initial weights, in addition to the model's, from our run to PFLlib's server."""
    norm: bool = False
    """Whether the model has a normalisation layer."""
    watch: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    """A context for our run. Its value becomes the attribute `seen` of PFLlib's server."""
    valid: bool = False
    """Whether our clients hold out the validation examples that PFLlib holds out."""
    switch: Callable[[Any], None] | None = None
    """A function that changes PFLlib's server so that it no longer has a difference with a known cause."""
    cause: str = ""
    """The cause of this difference, with the place in PFLlib's code."""


def our_server(net: str = "model") -> Callable[[Experiment], Sequence[Arrays]]:
    """Return the server's parameters of one net."""
    return lambda run: [chosen(run.server["weights"]["params"], net)]


def our_clients(net: str = "model") -> Callable[[Experiment], Sequence[Arrays]]:
    """Return each client's parameters of one net."""
    return lambda run: [chosen(run.engine.client(i).weights["params"], net) for i in range(CLIENTS)]


def chosen(params: Mapping[str, Tensor], net: str) -> Arrays:
    """Return the tensors of a net, or of a part of it such as `model:body`, in the order of the modules.

    Some methods have the nets `body` and `head` instead of `model`.
    """
    prefix = net.replace(":", ".") + "."
    if not any(name.startswith("model.") for name in params):
        prefix = prefix.removeprefix("model.")
    return [tensor.detach().clone() for name, tensor in params.items() if name.startswith(prefix)]


def their_server(part: str = "") -> Callable[[Any], Sequence[Arrays]]:
    """Return the parameters of PFLlib's global model, or of one of its attributes."""
    return lambda server: [parameters(getattr(server.global_model, part) if part else server.global_model)]


def their_clients(path: str = "model") -> Callable[[Any], Sequence[Arrays]]:
    """Return the parameters of an attribute of each of PFLlib's clients, such as `model.head`."""
    return lambda server: [parameters(attribute(client, path)) for client in server.clients]


class Net(nn.Module):
    """Our MLP with the attribute names that PFLlib expects, and `bn`, a normalisation layer or nothing."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.linear, self.bn = nn.Linear(64, HIDDEN), nn.BatchNorm1d(HIDDEN) if norm else nn.Identity()
        self.fc = nn.Linear(HIDDEN, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, 10)."""
        logits: Tensor = self.fc(torch.relu(self.bn(self.linear(x.flatten(1)))))
        return logits


def attribute(client: Any, path: str) -> Any:
    """Return an attribute of an attribute, such as `model.head`."""
    return functools.reduce(getattr, path.split("."), client)


def parameters(module: nn.Module) -> Arrays:
    """Return a module's parameters."""
    return [p.detach().clone() for p in module.parameters()]


def fill(module: nn.Module, weights: Arrays) -> None:
    """Copy weights into the parameters of a module."""
    with torch.no_grad():
        for p, tensor in zip(module.parameters(), weights, strict=True):
            p.copy_(tensor)


def start_clients(run: Experiment, server: Any, net: str, path: str) -> None:
    """Give an attribute of PFLlib's clients the initial weights of one of our nets."""
    weights = chosen(read_weights(run.problem.modules(0))["params"], net)
    for client in server.clients:
        fill(attribute(client, path), weights)
