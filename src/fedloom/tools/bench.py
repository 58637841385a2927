"""The speed of federations on this machine, measured with fixed workloads by interleaving the rounds of all contestants.

Contestants take turns, one round each, so that other work on the machine affects all of them equally. Ratios are medians over rounds. The
data are random noise, because speed does not depend on the content of images. If `FEDLOOM_DATA` is a folder with the real data, the real
data are used.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from fedloom import data
from fedloom.accelerator import HOST, describe_device, exact, synchronise, torch_threads
from fedloom.config.settings import Values, make_method, make_settings
from fedloom.engines import Problem
from fedloom.engines.make import engine_words
from fedloom.engines.processes import cores
from fedloom.errors import ConfigError, WorkerError, suggest
from fedloom.experiment.build import arithmetic, make_federation, make_problem
from fedloom.experiment.costs import Costs
from fedloom.experiment.loop import Experiment, GivenObjects
from fedloom.methods.registry import load_object
from fedloom.rng import Stream

WARM_UP = 1  # number of untimed rounds at the start, which set up memory, threads and traces


class Times(NamedTuple):
    """Times of one round, in seconds."""

    train: float  # time for downlink, local updates, aggregation, and their bookkeeping
    score: float  # time for the test accuracy of all clients
    extra: float = 0.0  # time for everything else that the contestant computes in an evaluation round


class Rival(Protocol):
    """Another implementation of the same federation."""

    def round(self, cohort: Sequence[int]) -> Times:
        """Run one round with these clients, and then score all clients."""


MakeRival = Callable[[Problem, int], Rival]
"""The function that a rival's file defines: (problem, threads) -> a rival that uses at most that number of threads."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A federation of fixed size, which `scale` reduces."""

    title: str
    data: str  # name of the real data set
    input_shape: tuple[int, int, int]
    rows: tuple[int, int]  # numbers of training and official test examples at scale 1
    settings: Mapping[str, Any]
    by_clients: bool = False  # whether `scale` reduces the number of clients instead of the examples per client

    def values(self, scale: float) -> Values:
        """Return the settings at a scale."""
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
    "partition": {"name": "iid", "test_fraction": 1 / 7},  # 60 training and 10 test examples
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
        "w4": Workload(
            title="FedAvg, CNN, 100 of 1000 clients, 60 examples each", **MNIST, settings=W4, by_clients=True
        ),
        "w4-mlp": Workload(
            title="FedAvg, MLP, 100 of 1000 clients, 60 examples each",
            **MNIST,
            settings=W4 | {"model": {"name": "mlp"}},
            by_clients=True,
        ),
    }
)
"""All workloads, with their sizes at `scale=1`."""


def workload(name: str) -> Workload:
    """Return a workload by name. Raise ConfigError if there is none."""
    if name not in WORKLOADS:
        raise ConfigError(f"unknown workload '{name}'{suggest(name, WORKLOADS)}")
    return WORKLOADS[name]


def dataset_for(work: Workload, scale: float) -> data.Dataset:
    """Return the data of a workload: noise or, if `FEDLOOM_DATA` is set, a fixed random fraction `scale` of the real data."""
    n_train, n_test = (max(1, round(n * scale)) for n in work.rows)
    rng = Stream("bench", work.data)
    if not os.environ.get("FEDLOOM_DATA"):
        noise = rng.numpy.integers(0, 256, (n_train + n_test, *work.input_shape), dtype=np.uint8)
        labels = rng.integers(10, (n_train + n_test,))
        return data.from_arrays(noise[:n_train], labels[:n_train], noise[n_train:], labels[n_train:], name=work.data)
    whole = data.load(work.data)
    if n_train > whole.n_train or n_test > whole.n_rows - whole.n_train:
        raise ConfigError(f"scale={scale}: {work.data} has fewer than {n_train} + {n_test} examples; lower scale")
    keep = rng.permutation(whole.n_train)[:n_train]
    held = whole.n_train + rng.permutation(whole.n_rows - whole.n_train)[:n_test]
    x, y = whole.images, whole.labels
    return data.from_arrays(x[keep], y[keep], x[held], y[held], name=work.data, classes=whole.classes)


def problem_of(work: Workload, scale: float, **more: Any) -> Problem:
    """Return the workload's clients, data, models and plan, without an engine. `more` overrides settings."""
    settings = make_settings({**work.values(scale), **more})
    with arithmetic(settings):
        federation = make_federation(settings, dataset_for(work, scale))
        return make_problem(settings, make_method(settings.method), federation)


class Stepped(Experiment):
    """An experiment that is run one round at a time. Times include all bookkeeping of a normal run."""

    def next_cohort(self) -> Sequence[int]:
        """Return the cohort of the next round."""
        return self.draw_cohort(self.done)

    def round(self, cohort: Sequence[int]) -> Times:
        """Run one round as described in `Rival.round`. The argument is ignored, because the experiment draws the same cohort itself."""
        synchronise(self.place.device)
        before = self.ledger.train_seconds, self.ledger.eval_seconds
        with arithmetic(self.settings):
            self.run_round(self.done)
            synchronise(self.place.device)
            score = self._score()
        evaluation = self.ledger.eval_seconds - before[1]
        return Times(self.ledger.train_seconds - before[0], score, max(evaluation - score, 0.0))

    def _score(self) -> float:
        """Return the time in seconds for one accuracy per client. A full evaluation scores more, such as the server's model."""
        started = time.perf_counter()
        down = self.hooks.deploy(self.server, self.done)
        personal = self.scoring.asks(general=False)[:1]
        self.engine.score(self.done, down, range(self.data.n_clients), personal)
        synchronise(self.place.device)
        return time.perf_counter() - started


class _RivalProcess:
    """A rival in a separate process, so that the thread and memory settings of the engines do not affect it."""

    def __init__(self, where: str, work: Workload, scale: float, precision: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._where, (self._pipe, theirs) = where, context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, where, work, scale, precision), daemon=True)
        before = signal.signal(
            signal.SIGINT, signal.SIG_IGN
        )  # inherited; only the command handles Ctrl-C, and it stops this process
        self._process.start()
        signal.signal(signal.SIGINT, before)
        theirs.close()

    def round(self, cohort: Sequence[int]) -> Times:
        """Run one round as described in `Rival.round`."""
        try:
            self._pipe.send(list(cohort))
            times: Times = self._pipe.recv()
        except (EOFError, ConnectionError):
            raise WorkerError(f"rival={self._where}: its process ended; see its output above") from None
        return times

    def close(self) -> None:
        """Stop the process, even during a round."""
        self._process.terminate()
        self._process.join()
        self._pipe.close()


def _serve(pipe: Connection, where: str, work: Workload, scale: float, precision: str) -> None:
    """Run a rival in its process: one round for every cohort that it receives, until the pipe closes."""
    make = load_object(where, "rival")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # so that the rival can clean up
    rival = make(problem_of(work, scale, precision=precision), cores())
    with suppress(EOFError, ConnectionError):  # the command has exited
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
    """Time a workload on engines and rivals in interleaved rounds.

    Args:
        engines: names of engines; `processes:8` means `engine.lanes=8`.
        scale: fraction of the examples (or of the clients), above 0 and at most 1.
        rounds: number of timed rounds, after one warm-up round.
        device: device of the engines (`engine.device`); rivals run on the CPU.
        rivals: rivals by name, each given as `FILE.py:NAME` of its `MakeRival`. Each rival runs in a separate process.
        roof: highest FLOP/s of the machine (`machine_roof`). If set, the result contains each contestant's fraction of it.

    Returns:
        Facts that can be stored as JSON: sizes, the number of operations of a round's training, and, for each contestant, the seconds of
        training, scoring and the rest (median and quartiles), FLOP/s, and its time relative to the first engine: `train`; `equal_work`
        (training and test accuracy); `as_it_does` (everything in an evaluation round).

    Raises:
        ConfigError: the scale, number of rounds, precision or engine is invalid.
        WorkerError: a rival's process exited.
    """
    _check_ranges(scale, rounds)
    with ExitStack() as open_things:
        folder = Path(open_things.enter_context(tempfile.TemporaryDirectory(prefix="fedloom-bench-")))
        dataset = dataset_for(work, scale)
        common = {**work.values(scale), "precision": precision, "checkpoint_every": 0}
        common["rounds"] = WARM_UP + rounds + 1  # the last round evaluates more than others, so it is not run
        ours: dict[str, Stepped] = {}
        for engine in dict.fromkeys(engines):
            values = {**common, "engine": _engine(engine, device), "out": folder / engine}
            ours[engine] = Stepped(make_settings(values), GivenObjects(dataset=dataset))
            open_things.callback(ours[engine].engine.close)
        first = next(iter(ours.values()))
        others = {
            name: open_things.enter_context(closing(_RivalProcess(where, work, scale, precision)))
            for name, where in (rivals or {}).items()
        }
        flop = train_flop(first)
        times = _time_interleaved({**ours, **others}, first, rounds)
    facts = _described(work, first, scale, rounds) | {"train_flop": flop, "roof_flop_per_s": roof}
    return facts | {"contestants": {name: _facts(t, times[next(iter(ours))], flop, roof) for name, t in times.items()}}


def _described(work: Workload, first: Stepped, scale: float, rounds: int) -> dict[str, Any]:
    """Return a description of what was timed, and of the machine."""
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
    """Return the engine settings for `NAME` or `NAME:LANES`."""
    name, colon, lanes = words.partition(":")
    return {"name": name, "device": device, "lanes": lanes if colon else None}


def check(
    work: Workload, engines: Sequence[str], *, scale: float, rounds: int, precision: str = "fp32", device: str = "cpu"
) -> None:
    """Raise ConfigError or DataError for invalid arguments of `measure`. Nothing is measured."""
    _check_ranges(scale, rounds)
    values = {**work.values(scale), "precision": precision}
    for engine in engines:
        settings = make_settings({**values, "engine": _engine(engine, device)})
        engine_words(settings.engine.name)
    with arithmetic(settings):
        make_federation(settings, dataset_for(work, scale))


def _check_ranges(scale: float, rounds: int) -> None:
    if not 0 < scale <= 1:
        raise ConfigError(f"scale={scale:g}: must be above 0 and at most 1")
    if rounds < 1:
        raise ConfigError(f"rounds={rounds}: must be at least 1")


def _time_interleaved(contestants: Mapping[str, Rival], leader: Stepped, rounds: int) -> dict[str, np.ndarray]:
    """Return the times in seconds (rounds, 3) by contestant. In every round, a different contestant starts."""
    names = list(contestants)
    times: dict[str, list[Times]] = {name: [] for name in names}
    for number in range(WARM_UP + rounds):
        cohort = leader.next_cohort()
        start = number % len(names)
        for name in names[start:] + names[:start]:
            times[name].append(contestants[name].round(cohort))
    return {name: np.array(found[WARM_UP:]) for name, found in times.items()}


def _facts(times: np.ndarray, first: np.ndarray, flop: float, roof: float | None) -> dict[str, Any]:
    """Return the facts about one contestant. Both arrays have the shape (rounds, 3)."""
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
    """Return the number of floating-point operations of the next round's local training (see `fedloom.experiment.costs`)."""
    costs = Costs(experiment.problem)
    with arithmetic(experiment.settings):
        return sum(sum(costs.flops(i, experiment.done).values()) for i in experiment.next_cohort())


def machine_roof(n_cores: int | None = None, seconds: float = 1.0, device: torch.device = HOST) -> float:
    """Measure the highest float32 FLOP/s of a device, or of one core times the number of cores, on a matrix product or a convolution.

    One core is measured in bursts of a few milliseconds, so that other work on the machine does not lower the result. This is not possible
    with all cores at once. On a device, the operations are large enough to use the whole device.

    Args:
        n_cores: number of cores; default: all cores that this process may use.
        seconds: duration of the measurement in seconds.
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
    with torch_threads(1), torch.inference_mode(), exact(device):
        best = max(flop / _shortest(run, seconds / len(tries), device) for flop, run in tries)
    return best * (n_cores or cores() if device == HOST else 1)


def _shortest(run: Callable[[], Any], seconds: float, device: torch.device) -> float:
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        run()
        synchronise(device)
        best = min(best, time.perf_counter() - started)
    return best
