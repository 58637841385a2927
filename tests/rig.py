"""Small problems with known results: two clients with quadratic losses, and uplinks of one vector.

Client i minimises 1/2 sum_d a_id (w_d - b_id)^2 by E steps of size eta: w -> b_i + (1 - eta a_i)^E (w - b_i).
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from fedloom import Round, Stream
from fedloom.method import Arrival

A = np.array([[1.0, 0.5], [0.2, 2.0]])  # curvatures: clients, dimensions
B = np.array([[1.0, -1.0], [-2.0, 3.0]])  # optima
ROWS = 8


class Vector(nn.Module):
    """One parameter vector."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2))


class Quadratic:
    """The nets and the loss. All examples of a client contain (a_i, b_i)."""

    def nets(self, arch, task):
        return {"model": Vector()}

    def error(self, nets, batch):
        a, b = batch.x[:, :2], batch.x[:, 2:]
        return 0.5 * (a * (nets.params["model.w"] - b).square()).sum(1).mean()

    def predictors(self):
        return {"personal": self.guess}

    def guess(self, nets, x, down, memory):
        return torch.zeros(len(x), 2) + nets.params["model.w"].sum()


ETA, E = 0.1, 10
BIASED = ((1 - (1 - ETA * A) ** E) * B).sum(0) / (1 - (1 - ETA * A) ** E).sum(0)
OPTIMUM = (A * B).sum(0) / A.sum(0)


def near(w, expected, tolerance=1e-8):
    return bool(np.abs(w.numpy() - expected).max() < tolerance)


def uplink(*values):
    return {"weights": {"params": {"model.w": torch.tensor(values)}, "buffers": {"model.running_var": torch.ones(1)}}}


def round_of(shares, number=1):
    return Round(number, len(shares), tuple(Arrival(i, i, p) for i, p in enumerate(shares)), Stream(0, number))


class Facts(NamedTuple):
    """The facts of a task that servers read."""

    max_cohort: int = 4
    rounds: int = 9


TASK = Facts()


def start(method, *values, task=TASK):
    return method.init_server(uplink(*values)["weights"], task, round_of([1.0]))


def params(state):
    return state["weights"]["params"]["model.w"]
