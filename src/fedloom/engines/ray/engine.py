"""An engine with workers on a Ray cluster, or on this machine. It gives the same numbers as the sequential engine with one thread.

A worker is an actor with one thread. Client i runs on worker i modulo n, or on another worker while that one is unavailable. The problem,
including all examples, is put into the object store once. Each machine has one copy, which its workers read in place.

A client's state is committed in the experiment when the result of its local update arrives, so the state survives the loss of any worker
or machine. A worker keeps a copy of its clients for the next round. Each copy has a version, which is the number of the local update that
produced it. If a worker lacks the requested version, because it is new or because its result never arrived, it reports this, and the
experiment sends it the client.
"""

from __future__ import annotations

import logging
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from pickle import PicklingError
from typing import Any, NamedTuple

import ray
import torch
from ray import cloudpickle
from ray.exceptions import RayError, RayTaskError

from fedloom import tree
from fedloom.engines.base import Problem, Reply, Score, ScoreRequest
from fedloom.engines.forwarding import ForwardingEngine
from fedloom.engines.process_worker import listed
from fedloom.engines.ray.address import check_address, refused
from fedloom.engines.ray.packing import Packed, Packer, unpack
from fedloom.engines.ray.worker import (
    Done,
    Facts,
    JobFailure,
    Missing,
    RayJob,
    RayWorker,
    Scores,
    ServerScore,
    Shared,
    UpdateJob,
    package_versions,
)
from fedloom.engines.scoring import merged, shares
from fedloom.engines.sequential import Sequential
from fedloom.errors import ConfigError, WorkerError, is_own_code
from fedloom.method import Client, Downlink
from fedloom.objectives import sum_scores

START_S = 180.0  # time limit for workers to start; the first import of torch on a machine is slow
ATTEMPTS = 3  # maximum number of attempts at scoring, and of consecutive rounds without a reply
POLL_S = 0.05  # polling interval in seconds while there is no worker

log = logging.getLogger(__name__)


class LostWorker(NamedTuple):
    """The answer that replaces that of a lost worker."""

    reason: str


class Cluster:
    """Workers on a Ray cluster."""

    def __init__(self, address: str | None, workers: int | None, most: int) -> None:
        """Start Ray on this machine, or join the cluster at `address`.

        Use one worker per core, or `workers` workers, but at most `most`. If the program has already joined a cluster, use that cluster
        and do not stop it.
        """
        self._ours = not ray.is_initialized()
        if self._ours:
            _connect(address, min(workers, most) if workers else None)
        cores = int(ray.cluster_resources().get("CPU", 1))  # type: ignore[no-untyped-call]
        n = min(workers or cores, most)
        actor: Any = ray.remote(RayWorker)
        self.actors = [actor.options(num_cpus=1, max_restarts=-1).remote() for _ in range(n)]

    def close(self) -> None:
        """Stop the workers, and disconnect from Ray if it was started or joined here."""
        if ray.is_initialized():
            for actor in self.actors:
                ray.kill(actor)
            if self._ours:
                ray.shutdown()
        self.actors = []


def _connect(address: str | None, n_cpus: int | None) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    try:
        if address is None:
            ray.init(address="local", num_cpus=n_cpus, include_dashboard=False, **quiet)
        else:
            check_address(address)
            ray.init(address=address, **quiet)
    except (RayError, OSError, RuntimeError, ValueError) as error:
        raise refused(address, _first_line(error)) from None


class Seat:
    """An experiment's handle to one worker."""

    def __init__(self, number: int, actor: Any, shared: Shared) -> None:
        self._number, self._actor, self._shared = number, actor, shared
        self.facts: Facts | None = None  # reported by the worker at its latest start
        self.is_gone = False
        self._starting: Any = None
        self._request_readiness()

    def __str__(self) -> str:
        """Return a text such as `worker 1 (process 4711 on HOST)`."""
        return f"worker {self._number}" + (f" (process {self.facts.pid} on {self.facts.host})" if self.facts else "")

    def _request_readiness(self) -> None:
        """Ask the worker to report when it is ready. This is repeated after each restart."""
        self._starting = self._actor.ready.options(max_task_retries=-1).remote(self._shared)

    def is_ready(self, wait_s: float = 0) -> bool:
        """Return whether the worker is ready now.

        Raises:
            ConfigError: the worker can never work. The error is raised only once.
        """
        if self._starting is None:
            return not self.is_gone
        if not ray.wait([self._starting], timeout=wait_s)[0]:
            return False
        starting, self._starting, self.is_gone = self._starting, None, True
        try:
            facts = self.facts = ray.get(starting)
        except RayError as error:
            raise ConfigError(f"engine=ray: {self} cannot start: {_first_line(error)}") from None
        for name, here in package_versions().items():
            if facts.versions[name] != here:
                wrong = f"{self} has {name} {facts.versions[name]}, but this machine has {name} {here}"
                raise ConfigError(f"engine=ray: {wrong}; every machine needs the same version")
        self.is_gone = False
        return True

    def start(self, common: Any, job: RayJob, clients: Mapping[int, tuple[int, Packed]]) -> Any:
        """Send a job, and return a reference to its answer."""
        return self._actor.do.remote(self._shared, common, job, clients)

    def answer(self, reference: Any) -> Any:
        """Return the answer to a job, or LostWorker. A lost worker is asked to report when it has restarted."""
        try:
            return ray.get(reference)
        except RayTaskError:  # not from the job itself, whose errors come as `JobFailure`
            raise
        except RayError as error:
            self._request_readiness()
            return LostWorker(f"its process or its machine is gone ({type(error).__name__})")

    def restart(self) -> None:
        """Kill the worker's process, even if it is working. Ray restarts it."""
        ray.kill(self._actor, no_restart=False)
        self._request_readiness()

    def forget(self) -> None:
        """Notify the worker that the experiment is over."""
        self._actor.forget.remote(self._shared.key)


class RayEngine(ForwardingEngine):
    """An engine with workers on a cluster.

    If a worker is lost, its clients are lost for the round and keep their previous state, and the run continues.
    """

    def __init__(self, problem: Problem, cluster: Cluster, deadline_s: float | None = None) -> None:
        """Start the workers. `deadline_s` is the time limit in seconds of a worker for its share of a round or of scoring; default: no
        limit.

        Raises:
            ConfigError: no worker starts, or a worker has different package versions.
        """
        self._cluster, self._deadline_s, self._packer = cluster, deadline_s, Packer()
        self._versions: dict[int, int] = {}
        self._ticket = self._empty_rounds = 0
        self._seats: list[Seat] = []
        try:
            super().__init__(problem, Sequential(problem))
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        shared = Shared(uuid.uuid4().hex, _put(self.problem), torch.get_default_dtype())
        self._seats = [Seat(k, actor, shared) for k, actor in enumerate(self._cluster.actors)]
        until = time.monotonic() + START_S
        started = sum(seat.is_ready(max(until - time.monotonic(), 0)) for seat in self._seats)
        if not started:
            raise ConfigError(
                f"engine=ray: no worker started within {START_S:g} s; check that the cluster has a free core"
            )
        if started < len(self._seats):
            log.warning("engine=ray: %d of %d workers have started; others join later", started, len(self._seats))

    def train(self, number: int, cohort: Sequence[int], down: Downlink) -> list[Reply]:
        """See `Engine.train`."""
        self._ticket += 1
        own = [self._packer.pack(message) for message in down.each] if down.each is not None else None
        jobs = [(seat, self._update_job(number, cohort, own, slots)) for seat, slots in self._by_worker(cohort)]
        replies: list[Reply] = []
        for (seat, job), answer in zip(jobs, self._run(down, jobs), strict=True):
            if isinstance(answer, LostWorker):
                clients = listed([i for _, i in job.members])
                log.warning(
                    "engine=ray: round %d continues without %s: %s: %s", number + 1, clients, seat, answer.reason
                )
            else:
                replies += [self._commit(done) for done in answer]
        self._empty_rounds = 0 if replies else self._empty_rounds + 1
        if self._empty_rounds == ATTEMPTS:
            raise WorkerError(
                f"no local update arrived in {ATTEMPTS} consecutive rounds; all workers were lost each time"
            )
        return sorted(replies, key=lambda reply: reply.slot)

    def _update_job(
        self, number: int, cohort: Sequence[int], own: Sequence[Packed] | None, slots: Sequence[int]
    ) -> UpdateJob:
        """Return a job for one worker: the local updates of the cohort's members at `slots`."""
        return UpdateJob(
            number=number,
            ticket=self._ticket,
            members=[(slot, cohort[slot]) for slot in slots],
            own=[own[slot] for slot in slots] if own is not None else None,
            versions=self._wanted([cohort[slot] for slot in slots]),
        )

    def _commit(self, done: Done) -> Reply:
        reply, kept = done
        self.inner.restore(reply.client, Client(**unpack(kept)))
        self._versions[reply.client] = self._ticket
        return replace(reply, uplink=unpack(reply.uplink))  # type: ignore[arg-type]

    def score(
        self, number: int, down: Downlink, clients: Sequence[int], asks: Sequence[ScoreRequest]
    ) -> list[dict[str, Score]]:
        """Score clients as described in `Engine.score`.

        If clients keep nothing, all have the same model, and the common test examples are split into pieces.
        """
        same = not self.problem.method.adapt() and not any(tree.leaves(self.client(i)._asdict()) for i in clients)
        assigned = self._by_worker(clients)
        work = shares(asks, [[clients[place] for place in places] for _, places in assigned], by_rows=same)
        jobs = [Scores(number, share, {} if same else self._wanted(share.clients)) for share in work]
        return merged(work, self._run_with_retries(down, jobs, [seat for seat, _ in assigned]), clients, asks)

    def score_server(self, down: Downlink) -> Score:
        """See `Engine.score_server`."""
        seats = self._ready()
        return sum_scores(
            self._run_with_retries(down, [ServerScore((k, len(seats)), {}) for k in range(len(seats))], seats)
        )

    def restore(self, i: int, client: Client) -> None:
        """See `Engine.restore`."""
        self._ticket += 1
        super().restore(i, client)
        self._versions[i] = self._ticket

    def close(self) -> None:
        """Stop or release the workers. Clients can still be read."""
        for seat in self._seats if ray.is_initialized() else ():
            seat.forget()
        self._seats = []
        self._cluster.close()

    def _ready(self) -> list[Seat]:
        """Return the workers that are ready now. If there are none, wait for one."""
        until = time.monotonic() + START_S
        while time.monotonic() < until and not all(seat.is_gone for seat in self._seats):
            found = []
            for seat in self._seats:
                try:
                    found += [seat] if seat.is_ready() else []
                except ConfigError as error:
                    log.warning("%s; other workers take over its clients", error)
            if found:
                return found
            time.sleep(POLL_S)
        raise WorkerError("engine=ray: all workers are lost, and none has restarted")

    def _by_worker(self, clients: Sequence[int]) -> list[tuple[Seat, list[int]]]:
        """Return the positions in `clients` for each worker. A client always goes to the same worker while that worker is available."""
        ready, groups = self._ready(), dict[Seat, list[int]]()
        for place, i in enumerate(clients):
            seat = self._seats[i % len(self._seats)]
            groups.setdefault(seat if seat in ready else ready[i % len(ready)], []).append(place)
        return list(groups.items())

    def _wanted(self, clients: Iterable[int]) -> dict[int, int]:
        return {i: self._versions.get(i, 0) for i in clients}

    def _sent(self, clients: Iterable[int]) -> dict[int, tuple[int, Packed]]:
        """Return the committed clients with their versions."""
        return {i: (self._versions.get(i, 0), self._packer.pack(self.client(i)._asdict())) for i in clients}

    def _run_with_retries(self, down: Downlink, jobs: Sequence[RayJob], seats: Sequence[Seat]) -> list[Any]:
        """Distribute jobs that change no state over `seats`, and return their results.

        If a worker is lost, other workers repeat its jobs.
        """
        found: dict[int, Any] = {}
        for _ in range(ATTEMPTS):
            left = [place for place in range(len(jobs)) if place not in found]
            given = [(seats[place % len(seats)], jobs[place]) for place in left]
            for place, (seat, _), answer in zip(left, given, self._run(down, given), strict=True):
                if isinstance(answer, LostWorker):
                    log.warning(
                        "engine=ray: %s was lost while it scored clients; another worker repeats it: %s",
                        seat,
                        answer.reason,
                    )
                else:
                    found[place] = answer
            if len(found) == len(jobs):
                return [found[place] for place in range(len(jobs))]
            seats = self._ready()
        raise WorkerError(f"engine=ray: scoring failed {ATTEMPTS} times, each time because a worker was lost")

    def _run(self, down: Downlink, jobs: Sequence[tuple[Seat, RayJob]]) -> list[Any]:
        """Run jobs. Return each job's result or `LostWorker`, in order. Raise the first error that a job itself raised."""
        common, found = ray.put(self._packer.pack(down.common)), list[Any]([None] * len(jobs))
        waiting = {seat.start(common, job, {}): place for place, (seat, job) in enumerate(jobs)}
        until = time.monotonic() + self._deadline_s if self._deadline_s else None
        while waiting:
            done, _ = ray.wait(list(waiting), timeout=until and max(until - time.monotonic(), 0))
            if not done:
                break
            place = waiting.pop(done[0])
            seat, job = jobs[place]
            answer = seat.answer(done[0])
            if isinstance(answer, JobFailure):
                raise answer.error
            if isinstance(answer, Missing):
                waiting[seat.start(common, job, self._sent(answer.clients))] = place
            else:
                found[place] = answer
        for place in waiting.values():
            jobs[place][0].restart()
            found[place] = LostWorker(f"no answer in {self._deadline_s:g} s (engine.deadline_s)")
        return found


def _first_line(error: BaseException) -> str:
    """Return the message of a Ray error without tracebacks and identifiers."""
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0].partition('. ')[0] if lines else 'no reason given'}"


def _put(problem: Problem) -> Any:
    """Put the problem into the object store, and return a reference to it."""
    try:
        with _own_code_by_value():
            return ray.put(problem)
    except (TypeError, AttributeError, PicklingError) as error:
        raise ConfigError(
            f"engine=ray: this method or model cannot be sent to workers: {_first_line(error.__cause__ or error)}"
        ) from None


@contextmanager
def _own_code_by_value() -> Iterator[None]:
    """Pickle classes from the user's own files together with their code, because other machines and Ray's workers lack these files."""
    own = []
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name != "__main__" and file and is_own_code(str(Path(file))):
            own.append(module)
    for module in own:
        cloudpickle.register_pickle_by_value(module)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for module in own:
            cloudpickle.unregister_pickle_by_value(module)  # type: ignore[no-untyped-call]
