"""One worker process per core, each with one thread; the same numbers as the sequential engine with one thread.

Workers are forked once per experiment, so they inherit the data, the method and the models without copying or pickling.
Messages and clients are stored in memory-mapped files, preferably on a RAM disk; pipes carry only their locations. The longest local
updates start first, and an idle worker gets the next clients. Uplinks are returned in cohort order, not in the order in which they finish.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from fedloom import tree
from fedloom.engines.base import Problem, Reply, Score, ScoreRequest, sum_scores
from fedloom.engines.forwarding import ForwardingEngine
from fedloom.engines.local import CohortMember, LocalEngine
from fedloom.engines.scoring import merged, shares
from fedloom.engines.sequential import Sequential
from fedloom.engines.shared_folders import new_folder
from fedloom.engines.stores import Slab, TreeLayout, layout_of, views
from fedloom.engines.vectorised import Vectorised
from fedloom.errors import WorkerError
from fedloom.method import Downlink
from fedloom.tree import Tree

FIRST_PIECE = 2  # work is sent in pieces: each is a worker's share of the remaining work divided by this,
LEAST_PIECE = 16  # but at least its share of all work divided by this


class Message(NamedTuple):
    """The location of a tree: a slab's file and its layout."""

    file: str
    layout: TreeLayout


class Slabs:
    """This process's access to the message files. Each file is opened once per size."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[str, Slab] = {}
        self._last: dict[str, tuple[TreeLayout, Tree]] = {}  # the layout and views of the latest message in each file

    def put(self, name: str, value: Tree) -> Message:
        """Write a tree into the file `name`."""
        message = Message(name, layout_of(value))
        tree.map_tree(torch.Tensor.copy_, self.get(message), value)
        return message

    def get(self, message: Message) -> Tree:
        """Return the tree of a message; its leaves are views of the file."""
        file, layout = message
        last = self._last.get(file)
        if last is None or last[0] != layout:
            slab = self._open.get(file)
            if slab is None or slab.n_bytes < layout.n_bytes:
                slab = self._open[file] = Slab(self._folder / file, layout.n_bytes)
            last = self._last[file] = layout, views(slab.data, layout)
        return last[1]


class Processes(ForwardingEngine):
    """Single-threaded worker processes, one per core by default."""

    def __init__(self, problem: Problem, workers: int | None = None, lanes: int | None = None) -> None:
        """With `lanes`, every worker trains that many clients side by side (`Vectorised`)."""
        local = Sequential(problem)
        super().__init__(problem, local)
        self._lanes = lanes
        self._folder = new_folder(self, _parent_folder(problem, local))
        local.share(self._folder)
        self._slabs = Slabs(self._folder)
        self._workers: list[_Worker] = []
        for _ in range(min(workers or cores(), problem.task.max_cohort)):
            self._workers.append(_Worker(problem, self._folder, self._workers, lanes))

    def train(self, number: int, cohort: Sequence[int], down: Downlink) -> list[Reply]:
        """See `Engine.train`."""
        common = self._slabs.put("down", down.common)
        own = [self._slabs.put(f"down-{slot}", message) for slot, message in enumerate(down.each or ())]
        sizes = [self.problem.data.n_train(i) for i in cohort]
        pieces = _pieces(sizes, len(self._workers), self._lanes or 1)
        jobs = [("train", number, common, [(s, cohort[s], own[s] if own else None) for s in piece]) for piece in pieces]
        replies: list[Reply] = [reply for done in self._share_out(jobs) for reply in done]
        replies = [replace(reply, uplink=self._slabs.get(reply.uplink)) for reply in replies]  # type: ignore[arg-type]
        return sorted(replies, key=lambda reply: reply.slot)

    def score(
        self, number: int, down: Downlink, clients: Sequence[int], asks: Sequence[ScoreRequest]
    ) -> list[dict[str, Score]]:
        """See `Engine.score`. Own test examples are split by clients; common ones are split into pieces, unless clients adapt first."""
        common = self._slabs.put("down", down.common)
        n = len(self._workers)
        work = shares(asks, [clients[k::n] for k in range(n)], by_rows=not self.problem.method.adapt())
        done = self._share_out([("score", number, common, *share) for share in work])
        return merged(work, done, clients, asks)

    def score_server(self, down: Downlink) -> Score:
        """See `Engine.score_server`."""
        common = self._slabs.put("down", down.common)
        n = len(self._workers)
        return sum_scores(self._share_out([("server", 0, common, (k, n)) for k in range(n)]))

    def close(self) -> None:
        """Stop the workers. Clients can still be read; their files are removed together with this object."""
        for worker in self._workers:
            worker.end()
        self._workers = []

    def _share_out(self, jobs: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Give each idle worker the next job; return results in the order of the jobs. The first error stops the distribution."""
        results: list[Any] = [None] * len(jobs)
        waiting = iter(enumerate(jobs))
        idle, busy = list(self._workers), dict[Any, tuple[_Worker, int]]()  # `busy`: by the worker's pipe
        while True:
            while idle and (following := next(waiting, None)):
                worker = idle.pop()
                worker.send(following[1])
                busy[worker.pipe] = worker, following[0]
            if not busy:
                return results
            for ready in wait(list(busy)):
                worker, place = busy.pop(ready)
                results[place] = worker.receive()
                idle.append(worker)


class _Worker:
    """One worker process, seen from the experiment."""

    def __init__(self, problem: Problem, folder: Path, earlier: Sequence[_Worker], lanes: int | None) -> None:
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe()
        ours = [self.pipe, *(worker.pipe for worker in earlier)]
        self._process = context.Process(target=_work, args=(problem, folder, lanes, theirs, ours), daemon=True)
        with warnings.catch_warnings():
            # Python 3.12 warns about forking while other threads exist; workers use none of their locks
            warnings.simplefilter("ignore", DeprecationWarning)
            self._process.start()
        theirs.close()

    def send(self, job: Any) -> None:
        """Send a job."""
        with self._alive():
            self.pipe.send(job)

    def receive(self) -> Any:
        """Return the result of the job, or raise its error."""
        with self._alive():
            failed, value = self.pipe.recv()
        if failed:
            raise value
        return value

    @contextmanager
    def _alive(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, ConnectionError):
            self._process.join(5)
            code = self._process.exitcode
            raise WorkerError(
                f"a worker process ended before its work was done (exit code {code}; -9: killed); if memory is short, lower engine.workers"
            ) from None

    def end(self) -> None:
        """Stop the process, even if it is working."""
        self._process.terminate()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
        self.pipe.close()


def _work(problem: Problem, folder: Path, lanes: int | None, pipe: Connection, inherited: Sequence[Connection]) -> None:
    """Run jobs until the experiment stops this worker. If the experiment's process no longer exists, remove its memory-mapped files."""
    for end in inherited:  # the experiment's pipe ends: an open copy would hide that the experiment has exited
        end.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the experiment handles Ctrl-C and stops its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    engine: LocalEngine = Vectorised(problem, lanes) if lanes else Sequential(problem)
    slabs = Slabs(folder)
    engine.share(folder)
    try:
        while True:
            job = pipe.recv()
            try:
                answer: tuple[bool, Any] = False, _do(engine, slabs, job)
            except Exception as error:
                answer = True, portable(error, multiprocessing.reduction.ForkingPickler)
            pipe.send(answer)
    except (EOFError, ConnectionError):  # the experiment's process no longer exists
        shutil.rmtree(folder, ignore_errors=True)


def _do(engine: LocalEngine, slabs: Slabs, job: tuple[Any, ...]) -> Any:
    kind, number, common, *what = job
    down = Downlink(slabs.get(common))
    if kind == "score":
        clients, asks, part = what
        return engine.score_part(number, down, clients, asks, part)
    if kind == "server":
        return engine.score_server_part(down, what[0])
    (places,) = what
    started = time.perf_counter()
    members = [
        CohortMember(slot, i, tree.merge(down.common, slabs.get(own)) if own else down.common)
        for slot, i, own in places
    ]
    replies = [
        replace(reply, uplink=slabs.put(f"up-{reply.slot}", reply.uplink))  # type: ignore[arg-type]
        for reply in engine.updates(number, members)  # one by one: keeping many models would use too much memory
    ]
    around = (time.perf_counter() - started - sum(reply.seconds for reply in replies)) / len(replies)
    return [replace(reply, seconds=reply.seconds + around) for reply in replies]


class Pickler(Protocol):
    """Serialises objects for other processes."""

    def dumps(self, obj: Any) -> Any:
        """Return an object as bytes."""

    def loads(self, data: Any) -> Any:
        """Return the object from its bytes."""


def portable(error: BaseException, pickler: Pickler) -> BaseException:
    """Return the error in a form that can be pickled; the worker's traceback is attached as a note."""
    error.add_note("".join(traceback.format_exception(error)))
    try:
        pickler.loads(pickler.dumps(error))
    except Exception:
        plain = RuntimeError(f"{type(error).__name__}: {error}")
        for note in getattr(error, "__notes__", ()):
            plain.add_note(note)
        return plain
    return error


def _pieces(sizes: Sequence[int], n_workers: int, lanes: int) -> list[list[int]]:
    """Split the positions in the cohort into pieces, each sent as one message.

    Small pieces come last, so workers finish at about the same time. Clients that a worker trains side by side stay in one piece.
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
    """Return the folder for clients and messages: on the RAM disk if they fit twice, else on disk (mapped, so cached in memory)."""
    arch_of, archs = problem.arch_of, sorted(set(problem.arch_of))
    needed = sum(tree.n_bytes(local.client(arch_of.index(a))._asdict()) * arch_of.count(a) for a in archs)
    needed += max(tree.n_bytes(local.initial(a)) for a in archs) * 2 * problem.task.max_cohort
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 2 * needed
    return memory if roomy else Path(tempfile.gettempdir())
