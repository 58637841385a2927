"""Accuracy of a simulation in which two of eight clients send malicious uplinks, with and without screening.

    python benchmarks/hostile_uplinks.py

The data are the digits with label skew (Dirichlet 0.5), the model is an MLP, and there are 15 rounds. Each cell shows the accuracy without
screening, and then the accuracy with screening, as means over seeds 0, 1 and 2.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from fedloom import Downlink, tree
from fedloom.config.settings import make_settings
from fedloom.engines import Problem, Reply
from fedloom.engines.sequential import Sequential
from fedloom.errors import UsageError
from fedloom.experiment.loop import Experiment, GivenObjects
from fedloom.tree import Tree

HOSTILE = (6, 7)
METHODS: Mapping[str, dict[str, Any]] = {
    "fedavg": {}, "scaffold": {}, "fedmr": {}, "fedproto": {}, "fedvtc": {"finetune_steps": 2, "n_synthetic": 8},
}  # fmt: skip
VALUES: dict[str, Any] = {
    "data": {"name": "digits", "rows": 1200}, "model": {"name": "mlp", "hidden": 12}, "clients": 8, "rounds": 15,
    "partition": {"name": "dirichlet", "alpha": 0.5}, "batch_size": 16, "eval_every": 15, "checkpoint_every": 0,
}  # fmt: skip
Attack = Callable[[int, Tree], Tree]


def scaled(factor: float, only: int | None = None) -> Attack:
    """Multiply all numbers, only in round `only` if it is set."""

    def attack(number: int, uplink: Tree) -> Tree:
        hit = only in (None, number)
        return tree.map_tree(lambda leaf: leaf * factor if hit and leaf.is_floating_point() else leaf, uplink)

    return attack


def in_part(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Attack:
    """Change one part of the uplink, if the uplink has this part."""
    return lambda _, uplink: {**uplink, name: change(uplink[name])} if name in uplink else uplink


ATTACKS: Mapping[str, Attack] = {
    "none": lambda _, uplink: uplink,
    "x 1e6": scaled(1e6),
    "x 3e37, in round 2 only": scaled(3e37, only=1),
    "x -10": scaled(-10.0),
    "x -3": scaled(-3.0),
    "x -1": scaled(-1.0),
    "counts x 1e6": in_part("counts", lambda counts: counts * 1e6),
    "variance x -1e3": in_part("variance", lambda variance: variance * -1e3),
}


class Hostile(Sequential):
    """An engine with malicious clients."""

    def __init__(self, problem: Problem, attack: Attack, more: float = 1.0) -> None:
        """Create the engine. `more` is the factor by which the clients overstate their numbers of examples."""
        super().__init__(problem)
        self._attack, self._more = attack, more

    def train(self, number: int, cohort: Sequence[int], down: Downlink) -> list[Reply]:
        """See `Engine.train`."""
        return [self._changed(number, reply) for reply in super().train(number, cohort, down)]

    def _changed(self, number: int, reply: Reply) -> Reply:
        if reply.client not in HOSTILE:
            return reply
        n = int(reply.examples * self._more)
        return replace(reply, uplink=self._attack(number, reply.uplink), examples=n, is_finite=False)


def accuracy(method: str, attack: Attack, more: float = 1.0, **screen: float) -> str:
    """Return the mean personal accuracy in percent, or the reason why a run ended."""
    found = []
    for seed in range(3):
        with tempfile.TemporaryDirectory() as folder:
            chosen = {"name": method, **METHODS[method]}
            chosen |= {} if method == "fedmr" else {"lr": 0.2}
            values = VALUES | {"method": chosen, "seed": seed, "screen": screen, "out": f"{folder}/run"}
            run = Experiment(make_settings(values), GivenObjects(engine=lambda problem: Hostile(problem, attack, more)))
            try:
                found.append(run.run()["personal_accuracy"]["final"])
            except UsageError as error:
                return type(error).__name__
    return f"{100 * sum(found) / len(found):.1f}"


def main() -> None:
    """Print the tables."""
    warnings.simplefilter("ignore", RuntimeWarning)  # means of logs that overflow
    logging.disable()
    torch.set_num_threads(1)
    print("| attack |", " | ".join(METHODS), "|")
    for name, attack in ATTACKS.items():
        cells = [f"{accuracy(m, attack)} → {accuracy(m, attack, norm=10.0)}" for m in METHODS]
        print(f"| {name} |", " | ".join(cells), "|", flush=True)
    for share in (1.0, 3 / 8, 1 / 8):
        zeros, wrong = (
            accuracy("fedavg", attack, 1e5, norm=10.0, max_share=share) for attack in (scaled(0.0), scaled(-3.0))
        )
        print(f"| max_share={share} | zeros {zeros} | x -3 {wrong} |", flush=True)


if __name__ == "__main__":
    main()
