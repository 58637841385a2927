"""An engine with one worker process per core, each with one thread. It gives the same numbers as the sequential engine with one thread.

Workers are forked once per experiment, so they inherit the data, the method and the models without copying or pickling. Messages and
clients are stored in memory-mapped files, preferably on a RAM disk; pipes carry only their locations. The longest local updates start
first, and each idle worker gets the next clients. Uplinks are returned in cohort order, not in the order in which they finish.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from fedloom import tree
from fedloom.engines.base import Problem, Reply, Score, ScoreRequest
from fedloom.engines.forwarding import ForwardingEngine
from fedloom.engines.local import LocalEngine
from fedloom.engines.process_worker import CohortJob, Job, ScoreJob, ServerJob, Slabs, Worker, listed
from fedloom.engines.scoring import merged, shares
from fedloom.engines.sequential import Sequential
from fedloom.engines.shared_folders import new_folder
from fedloom.errors import WorkerError
from fedloom.method import Client, Downlink
from fedloom.objectives import sum_scores

log = logging.getLogger(__name__)

FIRST_PIECE = 2  # clients are sent in pieces: each is a worker's share of those left, divided by this,
LEAST_PIECE = 16  # but at least a worker's share of all clients, divided by this


class Processes(ForwardingEngine):
    """Single-threaded worker processes, one per core by default."""

    def __init__(
        self,
        problem: Problem,
        workers: int | None = None,
        lanes: int | None = None,
        deadline_s: float | None = None,
    ) -> None:
        """Start the workers. With `lanes`, every worker trains that many clients side by side (`Vectorised`).

        `deadline_s` is the time limit in seconds of a worker for a client's local update (or for those of its lanes), or for its share of
        scoring.
        """
        local = Sequential(problem)
        super().__init__(problem, local)
        self._lanes, self._deadline_s = lanes, deadline_s
        self._folder = new_folder(self, _parent_folder(problem, local))
        local.share(self._folder)
        self._slabs = Slabs(self._folder)
        self._workers: list[Worker] = []
        self._before: dict[int, Client] = {}  # states of the cohort before this round, if there is a deadline
        for _ in range(min(workers or cores(), problem.task.max_cohort)):
            self._add_worker()

    def _add_worker(self) -> Worker:
        self._workers.append(Worker(self.problem, self._folder, self._workers, self._lanes))
        return self._workers[-1]

    def train(self, number: int, cohort: Sequence[int], down: Downlink) -> list[Reply]:
        """See `Engine.train`."""
        common = self._slabs.put("down", down.common)
        own = [self._slabs.put(f"down-{slot}", message) for slot, message in enumerate(down.each or ())]
        if self._deadline_s:
            self._before = {i: Client(**tree.clone(self.client(i)._asdict())) for i in cohort}
        sizes = [self.problem.data.n_train(i) for i in cohort]
        pieces = _pieces(sizes, len(self._workers), self._lanes or 1)
        jobs = [
            CohortJob(number, common, [(s, cohort[s], own[s] if own else None) for s in piece], bool(self._deadline_s))
            for piece in pieces
        ]
        replies: list[Reply] = [reply for done in self._share_out(jobs) for reply in done]
        replies = [replace(reply, uplink=self._slabs.get(reply.uplink)) for reply in replies]  # type: ignore[arg-type]
        return sorted(replies, key=lambda reply: reply.slot)

    def score(
        self, number: int, down: Downlink, clients: Sequence[int], asks: Sequence[ScoreRequest]
    ) -> list[dict[str, Score]]:
        """Score clients as described in `Engine.score`.

        Own test examples are split by client. Common test examples are split into pieces, unless clients adapt first.
        """
        common = self._slabs.put("down", down.common)
        n = len(self._workers)
        work = shares(asks, [clients[k::n] for k in range(n)], by_rows=not self.problem.method.adapt())
        done = self._share_out([ScoreJob(number, common, tuple(share)) for share in work])
        return merged(work, done, clients, asks)

    def score_server(self, down: Downlink) -> Score:
        """See `Engine.score_server`."""
        common = self._slabs.put("down", down.common)
        n = len(self._workers)
        return sum_scores(self._share_out([ServerJob(common, (k, n)) for k in range(n)]))

    def close(self) -> None:
        """Stop the workers. Clients can still be read; their files are removed together with this object."""
        for worker in self._workers:
            worker.end()
        self._workers = []

    def _share_out(self, jobs: Sequence[Job]) -> list[Any]:
        """Give each idle worker the next job. Return the results in the order of the jobs. The first error stops the distribution.

        If a worker exceeds the deadline, the rest of its job becomes a new job, whose result comes last.
        """
        results, waiting, numbers = dict[int, Any](), deque(enumerate(jobs)), count(len(jobs))
        idle, busy = list(self._workers), dict[Any, tuple[Worker, int]]()  # `busy`: by the worker's pipe
        while True:
            while idle and waiting:
                place, job = waiting.popleft()
                worker = idle.pop()
                worker.send(job)
                busy[worker.pipe] = worker, place
            if not busy:
                return [results[place] for place in sorted(results)]
            for ready in wait(list(busy), self._left([worker for worker, _ in busy.values()])):
                worker, place = busy[ready]
                finished, result = worker.receive()
                if finished:
                    results[place] = result
                    del busy[ready]
                    idle.append(worker)
            for worker, place in list(busy.values()) if self._deadline_s else ():
                if self._left([worker]) == 0 and not worker.pipe.poll():
                    del busy[worker.pipe]
                    results[place] = worker.parts
                    waiting += ((next(numbers), job) for job in self._give_up(worker))
                    idle.append(self._add_worker())

    def _left(self, workers: Sequence[Worker]) -> float | None:
        """Return the time in seconds until the first of these workers exceeds the deadline, or None if there is no deadline."""
        if not self._deadline_s:
            return None
        return max(min(worker.heard for worker in workers) + self._deadline_s - time.monotonic(), 0)

    def _give_up(self, worker: Worker) -> list[Job]:
        """Stop a worker that exceeds the deadline. Its current client is lost and keeps its previous state.

        Return a job with the clients that the worker had not started. The lanes of a worker stop together, so all of their clients are
        lost. Raise WorkerError if the job is not a local update, because scores cannot be skipped.
        """
        self._workers.remove(worker)
        worker.end()
        job, reason = worker.job, f"no answer in {self._deadline_s:g} s (engine.deadline_s)"
        if not isinstance(job, CohortJob):
            raise WorkerError(f"a worker {job}: {reason}; if it was only slow, raise engine.deadline_s")
        finished = {reply.slot for reply in worker.parts}
        left = [member for member in job.members if member[0] not in finished]
        lost, rest = (left, []) if self._lanes else (left[:1], left[1:])
        clients = [i for _, i, _ in lost]
        for i in clients:
            self.restore(i, self._before[i])
        log.warning("engine=processes: round %d continues without %s: %s", job.number + 1, listed(clients), reason)
        return [job._replace(members=rest)] if rest else []


def _pieces(sizes: Sequence[int], n_workers: int, lanes: int) -> list[list[int]]:
    """Split the positions in the cohort into pieces, each of which is sent as one message.

    Small pieces come last, so that workers finish at about the same time. Clients that a worker trains side by side stay in one piece.
    """
    places = sorted(range(len(sizes)), key=lambda place: -sizes[place])
    left = sum(sizes)
    least = left / (n_workers * LEAST_PIECE)
    pieces: list[list[int]] = []
    room = 0.0
    for start in range(0, len(places), lanes):
        block = places[start : start + lanes]
        work = sum(sizes[place] for place in block)
        if room < work:
            pieces.append([])
            room = max(left / (n_workers * FIRST_PIECE), least)
        pieces[-1] += block
        room -= work
        left -= work
    return pieces


def cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _parent_folder(problem: Problem, local: LocalEngine) -> Path:
    """Return the folder for clients and messages.

    It is on the RAM disk if they fit twice, and otherwise on disk, where it is mapped and therefore cached in memory.
    """
    arch_of, archs = problem.arch_of, sorted(set(problem.arch_of))
    needed = sum(tree.n_bytes(local.client(arch_of.index(a))._asdict()) * arch_of.count(a) for a in archs)
    needed += max(tree.n_bytes(local.initial(a)) for a in archs) * 2 * problem.task.max_cohort
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 2 * needed
    return memory if roomy else Path(tempfile.gettempdir())
