"""Screening of decoded uplinks. It rejects impossible statistics, and updates that are much larger than those of other clients.

Screening is on if `screen.norm` is positive, which is the default on devices. It cannot detect a malicious update of usual size
(docs/devices.md describes the damage that remains possible).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedloom import tree
from fedloom.config.settings import ScreenSettings
from fedloom.engines import Problem
from fedloom.objectives import Classification
from fedloom.tree import Tree

COHORT = 4  # with fewer uplinks in a round, sizes are compared with those of earlier rounds
REMEMBERED = 100  # number of accepted sizes that are kept for this purpose, per part
SQUARES = {"variance": 1e6}  # parts with a higher limit than `screen.norm`, as a multiple of the median
STRIKES, SPAN = 3, 10  # a client with this many rejected uplinks in this many rounds is excluded from the run
LARGEST_LOG = 1e30  # larger logs would overflow in means and plots


class Candidate(NamedTuple):
    """A decoded uplink that has the expected form."""

    client: int
    examples: int
    uplink: Tree
    received: Tree  # the downlink, as the client decoded it


class Measured(NamedTuple):
    """The size of one part of an uplink, and the client's number of examples."""

    size: float
    examples: float


class Screen:
    """The screening rules of one experiment, and their state, which is kept between rounds."""

    def __init__(self, problem: Problem, rules: ScreenSettings) -> None:
        self._problem, self._rules = problem, rules
        self.on = bool(rules.norm)
        self.excluded: set[int] = set()
        self._strikes: dict[int, list[int]] = {}  # rounds in which a client's uplink was rejected
        self._accepted: dict[str, list[Measured]] = {}  # sizes of accepted uplinks, by part
        self._reported: dict[int, int] = {}  # first reported numbers of examples of clients absent at the start

    # uplinks

    def faults(self, candidates: Sequence[Candidate]) -> dict[int, str]:
        """Return the clients whose uplink must not be aggregated, with the reason for each."""
        if not self.on:
            return {}
        found = {one.client: self._content_fault(one) for one in candidates}
        sound = [one for one in candidates if not found[one.client]]
        weights = capped([float(one.examples) for one in sound], self.max_share(len(sound)))
        measured = [
            {part: Measured(size, weight) for part, size in sizes_of(one).items()}
            for one, weight in zip(sound, weights, strict=True)
        ]
        usual = self._usual(measured)
        for one, mine in zip(sound, measured, strict=True):
            found[one.client] = self._size_fault(mine, usual)
            if not found[one.client]:
                self._remember(one, mine)
        return {client: reason for client, reason in found.items() if reason}

    def _content_fault(self, one: Candidate) -> str:
        """Return the reason why an uplink's values are impossible, or ""."""
        first = self._reported.get(one.client, one.examples)
        if one.examples != first:
            return f"it reports {one.examples} training examples, but reported {first} before"
        for name, buffer in one.uplink.get("weights", {}).get("buffers", {}).items():
            if name.endswith(".running_var") and bool((buffer < 0).any()):
                return f"'weights/buffers/{name}' is negative"
        held = self._class_counts[one.client]
        return self._problem.method.uplink_fault(one.uplink, held if int(held.sum()) else None)

    def _usual(self, measured: Sequence[Mapping[str, Measured]]) -> dict[str, Measured]:
        """Return the lower medians of the sizes and of the numbers of examples, by part.

        With fewer than `COHORT` valid uplinks, they are medians over accepted uplinks of earlier rounds.
        """
        usual = {}
        for part in dict.fromkeys(part for mine in measured for part in mine):
            every = [mine[part] for mine in measured if part in mine]
            every = every if len(measured) >= COHORT else self._accepted.get(part, [])
            if every:
                sizes, examples = zip(*every, strict=True)
                usual[part] = Measured(lower_median(sizes), lower_median(examples))
        return usual

    def _size_fault(self, mine: Mapping[str, Measured], usual: Mapping[str, Measured]) -> str:
        """Return a message that names a part of an uplink that is too large, or "".

        If a client has more examples than the median client, its limit is proportionally larger, because it takes more steps.
        """
        for part in sorted(mine.keys() & usual.keys()):
            (size, examples), (median, median_examples) = mine[part], usual[part]
            limit = SQUARES.get(part, self._rules.norm or 0.0) * max(examples / median_examples, 1.0)
            if median and size > limit * median:
                return f"'{part}' is {size / median:.3g} times as large as the median; at most {limit:.3g} times is allowed"
        return ""

    def _remember(self, one: Candidate, mine: Mapping[str, Measured]) -> None:
        if not self._problem.data.n_train(one.client):
            self._reported[one.client] = one.examples
        for part, measured in mine.items():
            self._accepted[part] = [*self._accepted.get(part, []), measured][-REMEMBERED:]

    @cached_property
    def _class_counts(self) -> Tensor:
        """Each client's number of training examples of each class (K, Y).

        It is 0 if the server lacks it, or if the task has no classes.
        """
        data = self._problem.data
        if not isinstance(data.objective, Classification):
            return torch.zeros(data.n_clients, 1)
        return torch.as_tensor(data.partition.counts(data.dataset.labels, data.n_classes, "train"))

    def max_share(self, n: int) -> float:
        """Return the largest share that one of `n` uplinks may have in a mean over examples."""
        default = min(3 / max(n, 1), 1.0) if self._problem.data.counts_are_claims else 1.0
        return self._rules.max_share or default

    def bad_logs(self, logs: Mapping[str, float]) -> list[str]:
        """Return the names of logs that cannot be averaged."""
        return [name for name, value in logs.items() if not abs(value) <= LARGEST_LOG] if self.on else []

    # clients

    def strike(self, number: int, rejected: Collection[int]) -> list[int]:
        """Record the clients whose uplink was rejected while others were accepted in the round. Return those to exclude from now on."""
        out = []
        for client in sorted(rejected) if self.on else ():
            recent = [at for at in self._strikes.get(client, ()) if at > number - SPAN]
            self._strikes[client] = [*recent, number]
            if len(recent) + 1 >= STRIKES:
                out.append(client)
        self.excluded |= set(out)
        return out

    def summary(self) -> dict[str, Any]:
        """Return the excluded clients for the run's summary, if uplinks are screened."""
        return {"excluded": sorted(self.excluded)} if self.on else {}

    # resuming

    def state(self) -> dict[str, Any]:
        """Return the state for the checkpoint."""
        return {
            "excluded": sorted(self.excluded),
            "strikes": self._strikes,
            "accepted": self._accepted,
            "reported": self._reported,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore an earlier result of `state`, as read from JSON."""
        self.excluded = set(state.get("excluded", ()))
        self._strikes = {int(i): list(rounds) for i, rounds in state.get("strikes", {}).items()}
        self._accepted = {part: [Measured(*one) for one in every] for part, every in state.get("accepted", {}).items()}
        self._reported = {int(i): n for i, n in state.get("reported", {}).items()}


def sizes_of(one: Candidate) -> dict[str, float]:
    """Return the root mean square of each part of an uplink, except counts. Weights are measured as differences from the downlink."""
    known = dict(tree.flatten(one.received.get("weights", {}), "weights/"))
    squares: dict[str, tuple[float, int]] = {}
    for path, leaf in tree.flatten(one.uplink):
        top, _, rest = path.partition("/")
        if not leaf.is_floating_point() or top == "counts":
            continue
        part = f"{top}/{rest.partition('/')[0]}" if top == "weights" else top
        moved = leaf - known[path] if path in known else leaf
        norm = float(torch.linalg.vector_norm(moved, dtype=torch.float64))
        total, n = squares.get(part, (0.0, 0))
        squares[part] = total + norm**2, n + leaf.numel()
    return {part: (total / n) ** 0.5 for part, (total, n) in squares.items() if n}


def lower_median(values: Sequence[float]) -> float:
    """Return the lower median of one or more values."""
    return sorted(values)[(len(values) - 1) // 2]


def capped(weights: Sequence[float], share: float) -> list[float]:
    """Return min(weight, c) for each weight, with the largest c for which no weight exceeds the fraction `share` of the sum.

    If `share` is less than 1/n for n weights, this is impossible, and all weights are then equal.
    """
    if not weights or max(weights) <= share * sum(weights):
        return list(weights)
    least = min(weights)
    if share * len(weights) <= 1:
        return [least] * len(weights)
    falling, rest = sorted(weights, reverse=True), sum(weights)
    for n_capped, weight in enumerate(falling, start=1):
        rest -= weight
        level = share * rest / (1 - share * n_capped)
        following = falling[n_capped] if n_capped < len(falling) else 0.0
        if level >= following:
            break
    return [min(weight, level) for weight in weights]
