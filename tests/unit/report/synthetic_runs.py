"""Synthetic run folders with numbers from closed formulas, which are the same on every call."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

Row = dict[str, Any]


def toml(tree: Mapping[str, Any], prefix: str = "") -> str:
    """Return nested tables of numbers, strings and booleans as TOML."""
    own = [f"{key} = {json.dumps(value)}" for key, value in tree.items() if not isinstance(value, Mapping)]
    tables = [toml(value, f"{prefix}{key}.") for key, value in tree.items() if isinstance(value, Mapping)]
    head = [f"[{prefix[:-1]}]"] if prefix else []
    return "\n".join([*head, *own, *tables])


@dataclass(frozen=True)
class Scene:
    """The results of a synthetic run. `final` is its personal metric after the last round.

    `primary` is the metric as in `summary.json`. Without it, the folder is one of a classification that does not name a metric.
    """

    method: str = "fedavg"
    seed: int = 0
    final: float = 0.8
    rounds: int = 30
    data: str = "digits"
    clients: int = 20
    classes: int = 10
    owners: Sequence[str] = ()  # names of the clients
    logs: Sequence[str] = ("train.loss",)
    server: bool = True
    finished: bool = True
    uplink_per_round: int = 2_400_000
    settings: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)  # further fields of the summary
    primary: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.primary.get("name", "accuracy"))

    @property
    def sign(self) -> int:
        """1 if larger values are better, and -1 otherwise."""
        return -1 if self.primary.get("better") == "lower" else 1

    def value(self, number: int) -> float:
        """Return values that improve to `final`, with a ripple that is zero in the last round."""
        left = (self.rounds - number) / self.rounds
        return self.final * (1 - self.sign * 0.75 * left**3) + 0.012 * left * math.sin(3 * number + self.seed)

    def client_value(self, number: int, client: int) -> float:
        lean = (client * 0.618034 + self.seed * 0.37) % 1 - 0.5
        value = self.value(number) + 0.3 * lean
        return value if self.sign < 0 else min(max(value, 0.0), 1.0)

    def counts(self) -> list[list[int]]:
        return [
            [int(240 * ((client * 0.618034 + y * 0.7549 + client * y * 0.1357) % 1) ** 5) for y in range(self.classes)]
            for client in range(self.clients)
        ]

    def metrics(self) -> list[Row]:
        done = self.rounds if self.finished else self.rounds // 2
        return [self.metrics_row(number) for number in range(1, done + 1)]

    def metrics_row(self, number: int) -> Row:
        value, name = self.value(number), self.name
        general = number % 5 == 0 or number == self.rounds
        return {
            "round": number,
            f"personal_{name}": value,
            f"personal_{name}_uniform": value - 0.01,
            f"personal_{name}_std": 0.09,
            f"personal_{name}_worst10": value - self.sign * 0.14,
            f"personal_{name}_trained": value,
            f"valid_{name}": None,
            f"general_{name}": 0.6 * value if general else None,
            f"general_{name}_std": 0.05 if general else None,
            f"server_{name}": 0.7 * value if self.server else None,
            "personal_recall": [value, None],
            "lost": number,
            "virtual_steps": 10.0 * number,
            "uplink_bytes": number * self.uplink_per_round,
            "downlink_bytes": number * 2_400_000,
            "cohort": self.clients,
            "train_seconds": 1.5 * number,
            "eval_seconds": 0.5 * number,
        } | {key: (place + 1) * 2.3 * math.exp(-0.08 * number) for place, key in enumerate(self.logs)}

    def client_rows(self) -> list[Row]:
        return [
            {
                "round": number,
                "client": client,
                "examples": 100,
                "uplink_bytes": 120_000,
                "train.loss": 0.5,
                f"personal_{self.name}": self.client_value(number, client) if number % 5 == 0 else None,
                f"general_{self.name}": None,
            }
            for number in range(self.rounds - 5, self.rounds + 1)
            for client in range(self.clients)
        ]

    def summary(self) -> Row:
        last, name = self.value(self.rounds), self.name
        ten = [self.value(number) for number in range(max(self.rounds - 9, 1), self.rounds + 1)]
        best = self.sign * max(self.sign * self.value(number) for number in range(1, self.rounds + 1))
        head = {"final": last, "last10": sum(ten) / len(ten), "best_on_test": best, "chosen_on_validation": None}
        up = self.rounds * self.uplink_per_round
        down = self.rounds * 2_400_000
        return {
            "method": self.method,
            "model": "fedavg_cnn",
            "data": self.data,
            "clients": self.clients,
            "rounds": self.rounds,
            "seed": self.seed,
            **self.named(),
            f"personal_{name}": head | {"uniform": last - 0.01, "std": 0.09, "worst10": last - self.sign * 0.14},
            f"general_{name}": {"final": 0.6 * last, "last10": 0.6 * last},
            f"server_{name}": {"final": 0.7 * last} if self.server else None,
            "uplink_bytes": up,
            "downlink_bytes": down,
            "bytes_by_kind": {
                "uplink": {"weights": int(0.95 * up), "prototypes": up - int(0.95 * up)},
                "downlink": {"weights": down},
            },
            "seconds": 2.0 * self.rounds,
            "buffers": "shared",
            "finished": True,
            **self.extra,
        }

    def named(self) -> Row:
        return {"primary": dict(self.primary)} if self.primary else {}

    def config(self) -> Row:
        method = {"name": self.method, "lr": 0.005, "local_epochs": 1} | dict(self.settings)
        return {
            "seed": self.seed,
            "clients": self.clients,
            "rounds": self.rounds,
            "batch_size": 100,
            "model": "fedavg_cnn",
            "out": f"runs/{self.method}-seed{self.seed}",
            "method": method,
            "data": {"name": self.data},
            "partition": {"name": "dirichlet", "alpha": 0.1},
        }

    def write(self, folder: Path) -> Path:
        """Write the run to `folder`."""
        folder.mkdir(parents=True)
        counts = self.counts()
        partition = {
            "train": [],
            "test": [],
            "hash": hashlib.sha256(json.dumps([counts, self.seed]).encode()).hexdigest(),
            "scheme": {"name": "dirichlet", "alpha": 0.1},
            "class_counts": {"train": counts, "test": counts},
            "classes": [str(y) for y in range(self.classes)],
            **({"clients": list(self.owners)} if self.owners else {}),
            **self.named(),
        }
        environment = {"fedloom": "0.1", "python": "3.11.4", "torch": "2.13.0", "cores": 8, "commit": "0123abc"}
        (folder / "config.toml").write_text(toml(self.config()))
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in self.metrics()))
        (folder / "environment.json").write_text(json.dumps(environment))
        (folder / "partition.json").write_text(json.dumps(partition))
        if self.finished:
            (folder / "summary.json").write_text(json.dumps(self.summary()))
            pd.DataFrame(self.client_rows()).to_parquet(folder / "clients.parquet")
        return folder
