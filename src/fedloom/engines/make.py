"""Create an engine by name."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from fedloom import lazy
from fedloom.errors import ConfigError, suggest

if TYPE_CHECKING:
    from fedloom.accelerator import DeviceBudget
    from fedloom.engines.base import Engine, Problem
    from fedloom.training.choose import ConvolutionForm, Convolutions

ENGINES: Mapping[str, str] = {
    "sequential": "one client after another, in this process; the reference",
    "vectorised": "clients of one architecture in lanes, by batched operations",
    "processes": "a one-thread worker process per core; the default on Linux with more than one core",
    "ray": "one-thread workers on the machines of a Ray cluster, or on this one (pip install 'fedloom[ray]')",
}
WRAPPERS: lazy.Registry[Callable[[Engine], Engine]] = lazy.Registry(
    {"debug": "fedloom.engines.wrappers:Debug", "bytes": "fedloom.engines.wrappers:Bytes"}
)


def make_engine(
    name: str,
    problem: Problem,
    workers: int | None = None,
    lanes: int | None = None,
    address: str | None = None,
    deadline_s: float | None = None,
    place: DeviceBudget | None = None,
    convolutions: ConvolutionForm = "grouped",
) -> Engine:
    """Create an engine: `sequential`, `processes`, `auto`, a wrapper (`debug`, `bytes`), or a combination: `debug+bytes+sequential`.

    Args:
        workers: number of worker processes; default: one per core.
        lanes: number of clients that are trained side by side in batched operations, in the vectorised engine (default: as many as memory
            allows, at most 64) or in each worker process (default: one client after another).
        address: the Ray cluster to join; default: start Ray on this machine.
        deadline_s: time limit in seconds for a worker, per client's local update (`processes`) or per share of a round (`ray`); default:
            no limit.
        place: the device on which `sequential` and `vectorised` compute; default: the CPU. On a GPU, `auto` is `vectorised`.
        convolutions: how `vectorised` computes convolutions.

    Raises:
        ConfigError: the name is unknown, or this system cannot run the engine.
    """
    from fedloom.accelerator import HOST, ON_HOST
    from fedloom.engines.process_memory import keep_freed_memory
    from fedloom.engines.processes import Processes, cores
    from fedloom.engines.sequential import Sequential
    from fedloom.engines.vectorised import Vectorised

    place = place or ON_HOST
    *wrappers, last = engine_words(name)
    keep_freed_memory()
    can_fork = "fork" in multiprocessing.get_all_start_methods() and sys.platform == "linux"
    if last == "auto":
        many = place.device == HOST and can_fork and (workers or cores()) > 1 and problem.task.max_cohort > 1
        alone = "sequential" if place.device == HOST else "vectorised"
        last = "processes" if many and "debug" not in wrappers else alone  # debug must detect in-place changes
    if last == "processes" and not can_fork:
        raise ConfigError("engine=processes: runs only on Linux; use engine=sequential")
    if deadline_s is not None and last not in ("processes", "ray"):
        raise ConfigError(f"engine.deadline_s={deadline_s:g}: needs worker processes, but engine={name} is {last} here")
    engine: Engine = (
        Processes(problem, workers, lanes, deadline_s)
        if last == "processes"
        else Vectorised(problem, lanes, place, _convolutions(convolutions, problem, place))
        if last == "vectorised"
        else _on_ray(problem, workers, address, deadline_s)
        if last == "ray"
        else Sequential(problem, place)
    )
    for wrapper in reversed(wrappers):
        engine = WRAPPERS[wrapper](engine)
    return engine


def engine_words(name: str) -> list[str]:
    """Return an engine's wrappers, and the engine itself last. Raise ConfigError if one of them is unknown."""
    *wrappers, last = name.split("+")
    if last in WRAPPERS:
        wrappers, last = [*wrappers, last], "auto"
    if last == "flower":
        raise ConfigError("engine=flower: needs a deployed federation; see fedloom deploy --help")
    for word, known in [*((w, WRAPPERS) for w in wrappers), (last, {**ENGINES, "auto": None})]:
        if word not in known:
            raise ConfigError(
                f"engine={name}: there is no engine '{word}'{suggest(word, [*ENGINES, *WRAPPERS, 'auto'])}"
            )
    return [*wrappers, last]


def _convolutions(form: ConvolutionForm, problem: Problem, place: DeviceBudget) -> Convolutions | None:
    """Return the convolutions for `form`, or None if vmap computes them, which uses grouped convolutions."""
    from fedloom.training.choose import Convolutions

    return None if form == "grouped" else Convolutions(form, place.device, problem.bf16)


def _on_ray(problem: Problem, workers: int | None, address: str | None, deadline_s: float | None) -> Engine:
    from fedloom.engines.ray.address import quiet_environment

    quiet_environment(address)
    try:
        from fedloom.engines.ray.engine import Cluster, RayEngine
    except ModuleNotFoundError as missing:
        if missing.name != "ray":
            raise
        raise ConfigError("engine=ray: Ray is not installed; pip install 'fedloom[ray]'") from None
    return RayEngine(problem, Cluster(address, workers, problem.task.max_cohort), deadline_s)
