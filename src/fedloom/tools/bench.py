"""How fast this machine runs federations: fixed workloads, timed round by round, contestants in turn.

One round of every contestant follows one round of the others, so that whatever else the machine does falls on all of them
alike, and ratios are medians over such rounds. Data are made up (speed does not depend on what pictures show) unless
`FEDLOOM_DATA` names a folder that holds the real ones.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from fedloom import data
from fedloom.accelerator import HOST, describe_device, exact, synchronise
from fedloom.config.settings import Values, make_method, make_settings
from fedloom.engines import Problem
from fedloom.engines.processes import cores
from fedloom.errors import ConfigError, WorkerError, suggest
from fedloom.experiment.build import arithmetic, make_federation, make_problem
from fedloom.experiment.costs import Costs
from fedloom.experiment.loop import Experiment, GivenObjects
from fedloom.methods.registry import load_object
from fedloom.rng import Stream

WARM_UP = 1  # rounds before the clock counts: memory, threads and traces settle


class Times(NamedTuple):
    """Seconds of one round."""

    train: float  # downlink, local work, aggregation, and the bookkeeping that goes with them
    score: float  # test accuracy of all clients, alone
    extra: float = 0.0  # whatever else the contestant computes in a round of evaluation


class Rival(Protocol):
    """Another way to run the same federation."""

    def round(self, cohort: Sequence[int]) -> Times:
        """One round with these clients, then scoring all clients."""


MakeRival = Callable[[Problem, int], Rival]
"""What a rival's file defines: (problem, threads) -> a rival that may use so many threads."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A federation of a fixed size; `scale` shrinks it."""

    title: str
    data: str  # the real data set's name
    input_shape: tuple[int, int, int]
    rows: tuple[int, int]  # training rows and official test rows at scale 1
    settings: Mapping[str, Any]
    by_clients: bool = False  # whether `scale` shrinks the number of clients too, and so leaves each its rows

    def values(self, scale: float) -> Values:
        """The settings at a scale."""
        values: Values = dict(self.settings)
        if self.by_clients:
            values |= {key: max(1, round(values[key] * scale)) for key in ("clients", "cohort")}
        return values


CIFAR: Values = {"data": "cifar10", "input_shape": (3, 32, 32), "rows": (50_000, 10_000)}
MNIST: Values = {"data": "mnist", "input_shape": (1, 28, 28), "rows": (60_000, 10_000)}
W1: Values = {"method": {"name": "fedavg", "lr": 0.005}, "clients": 20, "drop_last": True}
W4: Values = {
    "method": {"name": "fedavg", "lr": 0.05},
    "clients": 1000,
    "cohort": 100,
    "partition": {"name": "iid", "test_fraction": 1 / 7},  # 60 and 10 rows
}

WORKLOADS: Mapping[str, Workload] = MappingProxyType(
    {
        "w1": Workload(title="FedAvg, CNN, 20 skewed clients, batch 10", **CIFAR, settings=W1),
        "w1-100": Workload(
            title="FedAvg, CNN, 20 skewed clients, batch 100", **CIFAR, settings=W1 | {"batch_size": 100}
        ),
        "w2": Workload(
            title="FedRIR as released, 20 skewed clients, batch 100",
            **CIFAR,
            settings={
                "method": {"name": "fedrir", "idm_mode": "released"},
                "model": {"name": "fedrir_cnn"},
                "clients": 20,
                "batch_size": 100,
                "drop_last": True,
            },
        ),
        "w3": Workload(
            title="FedMR, ResNet-20, 10 of 100 equal clients, batch 50, 5 epochs",
            **CIFAR,
            settings={
                "method": {"name": "fedmr", "unit": "tensor"},
                "model": {"name": "resnet20"},
                "clients": 100,
                "cohort": 10,
                "batch_size": 50,
                "partition": {"name": "iid", "merge": False},
            },
        ),
        "w4": Workload(title="FedAvg, CNN, 100 of 1000 clients, 60 rows each", **MNIST, settings=W4, by_clients=True),
        "w4-mlp": Workload(
            title="FedAvg, MLP, 100 of 1000 clients, 60 rows each",
            **MNIST,
            settings=W4 | {"model": {"name": "mlp"}},
            by_clients=True,
        ),
    }
)
"""What is timed; every size is that of `scale=1`."""


def workload(name: str) -> Workload:
    """A workload by name. Raises ConfigError."""
    if name not in WORKLOADS:
        raise ConfigError(f"no workload is called '{name}'{suggest(name, WORKLOADS)}")
    return WORKLOADS[name]


def dataset_for(work: Workload, scale: float) -> data.Dataset:
    """The rows of a workload: real ones if `FEDLOOM_DATA` is set, else noise; a fixed draw of `scale` of them."""
    n_train, n_test = (max(1, round(n * scale)) for n in work.rows)
    rng = Stream("bench", work.data)
    if not os.environ.get("FEDLOOM_DATA"):
        noise = rng.numpy.integers(0, 256, (n_train + n_test, *work.input_shape), dtype=np.uint8)
        labels = rng.integers(10, (n_train + n_test,))
        return data.from_arrays(noise[:n_train], labels[:n_train], noise[n_train:], labels[n_train:], name=work.data)
    whole = data.load(work.data)
    if n_train > whole.n_train or n_test > whole.n_rows - whole.n_train:
        raise ConfigError(f"scale={scale}: {work.data} holds fewer than {n_train} + {n_test} rows")
    keep = rng.permutation(whole.n_train)[:n_train]
    held = whole.n_train + rng.permutation(whole.n_rows - whole.n_train)[:n_test]
    x, y = whole.images, whole.labels
    return data.from_arrays(x[keep], y[keep], x[held], y[held], name=work.data, classes=whole.classes)


def problem_of(work: Workload, scale: float, **more: Any) -> Problem:
    """The workload's clients, rows, models and plan, without an engine; `more` are settings of it that change."""
    settings = make_settings({**work.values(scale), **more})
    with arithmetic(settings):
        federation = make_federation(settings, dataset_for(work, scale))
        return make_problem(settings, make_method(settings.method), federation)


class Stepped(Experiment):
    """An experiment that is run one round at a time; its times are those of the product, bookkeeping and all."""

    def next_cohort(self) -> Sequence[int]:
        """Who takes part in the next round."""
        return self.draw_cohort(self.done)

    def round(self, cohort: Sequence[int]) -> Times:
        """See `Rival.round`; the cohort is its own, which is the same for all engines."""
        synchronise(self.place.device)
        before = self.ledger.train_seconds, self.ledger.eval_seconds
        with arithmetic(self.settings):
            self.run_round(self.done)
            synchronise(self.place.device)
            score = self._score()
        evaluation = self.ledger.eval_seconds - before[1]
        return Times(self.ledger.train_seconds - before[0], score, max(evaluation - score, 0.0))

    def _score(self) -> float:
        """Seconds for one accuracy per client alone; an evaluation scores more, such as the server's model."""
        started = time.perf_counter()
        down = self.method.deploy(self.server, self.problem.task)
        personal = self.scoring.asks(general=False)[:1]
        self.engine.score(self.done, down, range(self.data.n_clients), personal)
        synchronise(self.place.device)
        return time.perf_counter() - started


class _Apart:
    """A rival in a process of its own, where nothing is set (threads, the handling of memory) that the engines set in theirs."""

    def __init__(self, where: str, work: Workload, scale: float, precision: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._where, (self._pipe, theirs) = where, context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, where, work, scale, precision), daemon=True)
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C is for the command, which ends this
        self._process.start()
        signal.signal(signal.SIGINT, before)
        theirs.close()

    def round(self, cohort: Sequence[int]) -> Times:
        """See `Rival.round`."""
        try:
            self._pipe.send(list(cohort))
            times: Times = self._pipe.recv()
        except (EOFError, ConnectionError):
            raise WorkerError(f"rival={self._where}: its process ended; see what it wrote above") from None
        return times

    def close(self) -> None:
        """End the process, in the midst of a round too."""
        self._process.terminate()
        self._process.join()
        self._pipe.close()


def _serve(pipe: Connection, where: str, work: Workload, scale: float, precision: str) -> None:
    """What a rival's process does: a round for every cohort, until there are no more."""
    make = load_object(where, "rival")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # so that the rival clears up
    rival = make(problem_of(work, scale, precision=precision), cores())
    with suppress(EOFError, ConnectionError):  # the command is gone
        while True:
            pipe.send(rival.round(pipe.recv()))


def measure(
    work: Workload,
    engines: Sequence[str],
    *,
    scale: float = 0.05,
    rounds: int = 5,
    precision: str = "fp32",
    device: str = "cpu",
    rivals: Mapping[str, str] | None = None,
    roof: float | None = None,
) -> dict[str, Any]:
    """Time a workload on some engines, and on rivals if given, in turn.

    Args:
        engines: their names; `processes:8` is one with `engine.lanes=8`.
        scale: part of the rows (or of the clients), above 0 and at most 1.
        rounds: rounds that count, after one to warm up.
        device: where the engines compute (`engine.device`); rivals stay on the CPU.
        rivals: by the name to give each, where its `MakeRival` is defined, as `FILE.py:NAME`; every one gets a process of its own.
        roof: FLOP/s that the machine reaches at its best (`machine_roof`); gives each contestant's share of it.

    Returns:
        JSON-able facts: sizes, FLOPs of a round's training, and for each contestant the seconds of training, scoring and the
        rest (median and quartiles), FLOP/s, and how many times as long as the first engine it takes: `train`;
        `equal_work` (training and test accuracy); `as_it_does` (all that it does in a round of evaluation).

    Raises:
        ConfigError: an impossible scale, number of rounds, precision, or engine.
        WorkerError: a rival's process ended.
    """
    _check(scale, rounds)
    with ExitStack() as open_things:
        folder = Path(open_things.enter_context(tempfile.TemporaryDirectory(prefix="fedloom-bench-")))
        dataset = dataset_for(work, scale)
        common = {**work.values(scale), "precision": precision, "checkpoint_every": 0}
        common["rounds"] = WARM_UP + rounds + 1  # the last round scores more than others
        ours: dict[str, Stepped] = {}
        for engine in dict.fromkeys(engines):
            values = {**common, "engine": _engine(engine, device), "out": folder / engine}
            ours[engine] = Stepped(make_settings(values), GivenObjects(dataset=dataset))
            open_things.callback(ours[engine].engine.close)
        first = next(iter(ours.values()))
        others = {
            name: open_things.enter_context(closing(_Apart(where, work, scale, precision)))
            for name, where in (rivals or {}).items()
        }
        flop = train_flop(first)
        times = _in_turn({**ours, **others}, first, rounds)
    facts = _described(work, first, scale, rounds) | {"train_flop": flop, "roof_flop_per_s": roof}
    return facts | {"contestants": {name: _facts(t, times[next(iter(ours))], flop, roof) for name, t in times.items()}}


def _described(work: Workload, first: Stepped, scale: float, rounds: int) -> dict[str, Any]:
    """What was timed, and on what."""
    return {
        "title": work.title,
        "data": f"{work.data} ({'real' if os.environ.get('FEDLOOM_DATA') else 'synthetic'})",
        "scale": scale,
        "rounds": rounds,
        "clients": first.problem.task.n_clients,
        "cohort": first.problem.task.max_cohort,
        "precision": first.settings.precision,
        "cores": cores(),
        "device": describe_device(first.place.device),
        "seed": first.settings.seed,
    }


def _engine(words: str, device: str) -> Values:
    """The engine's settings of `NAME` or `NAME:LANES`."""
    name, colon, lanes = words.partition(":")
    return {"name": name, "device": device, "lanes": lanes if colon else None}


def _check(scale: float, rounds: int) -> None:
    if not 0 < scale <= 1:
        raise ConfigError(f"scale={scale:g}: must be above 0 and at most 1")
    if rounds < 1:
        raise ConfigError(f"rounds={rounds}: must be at least 1")


def _in_turn(contestants: Mapping[str, Rival], leader: Stepped, rounds: int) -> dict[str, np.ndarray]:
    """(rounds, 3) seconds by contestant; who starts changes from round to round."""
    names = list(contestants)
    times: dict[str, list[Times]] = {name: [] for name in names}
    for number in range(WARM_UP + rounds):
        cohort = leader.next_cohort()
        start = number % len(names)
        for name in names[start:] + names[:start]:
            times[name].append(contestants[name].round(cohort))
    return {name: np.array(found[WARM_UP:]) for name, found in times.items()}


def _facts(times: np.ndarray, first: np.ndarray, flop: float, roof: float | None) -> dict[str, Any]:
    """What is told of one contestant; both arrays are (rounds, 3)."""
    speed = flop / float(np.median(times[:, 0]))
    upto = {"train": 1, "equal_work": 2, "as_it_does": 3}
    ratios = {key: times[:, :n].sum(1) / first[:, :n].sum(1) for key, n in upto.items()}
    return {
        **{f"{kind}_s": _spread(times[:, k]) for k, kind in enumerate(Times._fields)},
        "flop_per_s": speed,
        "share_of_roof": speed / roof if roof else None,
        "times_as_long": {key: _spread(ratio) for key, ratio in ratios.items()},
    }


def _spread(values: np.ndarray) -> dict[str, float]:
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    return {"median": float(median), "low": float(low), "high": float(high)}


def train_flop(experiment: Stepped) -> float:
    """Floating-point operations of the next round's local training (see `fedloom.experiment.costs`)."""
    costs = Costs(experiment.problem)
    with arithmetic(experiment.settings):
        return sum(sum(costs.flops(i, experiment.done).values()) for i in experiment.next_cohort())


def machine_roof(n_cores: int | None = None, seconds: float = 1.0, device: torch.device = HOST) -> float:
    """The most FLOP/s in float32 that cores, or a device, reach on a matrix product or a convolution, each by itself.

    Measured on one core, in pieces of a few milliseconds, and multiplied: so a machine that is busy otherwise is not mistaken
    for a slow one, which a measurement over all cores would do. A device gets pieces large enough to fill it.

    Args:
        n_cores: default: all that this process may use.
        seconds: how long to try.
    """
    times = 1 if device == HOST else 16
    n, batch, channels, side = 512 * times, 4 * times, 64, 32
    a, b = torch.randn(2, n, n, device=device)
    x, weight = torch.randn(batch, channels, side, side), torch.randn(channels, channels, 3, 3)
    if device == HOST:
        x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    x, weight = x.to(device), weight.to(device)
    tries: list[tuple[float, Callable[[], Any]]] = [
        (2.0 * n**3, lambda: a @ b),
        (2.0 * batch * side**2 * channels**2 * 9, lambda: torch.conv2d(x, weight, padding=1)),
    ]
    with _threads(1), torch.inference_mode(), exact(device):
        best = max(flop / _shortest(run, seconds / len(tries), device) for flop, run in tries)
    return best * (n_cores or cores() if device == HOST else 1)


@contextmanager
def _threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _shortest(run: Callable[[], Any], seconds: float, device: torch.device) -> float:
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        run()
        synchronise(device)
        best = min(best, time.perf_counter() - started)
    return best
