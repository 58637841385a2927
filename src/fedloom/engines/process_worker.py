"""Worker processes of `engine=processes`: the code that runs in them, and the experiment's handle to each process.

A worker receives jobs through its pipe, and answers each job with its result or its error. With a deadline, it also sends the reply of
every client as soon as it is available.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from fedloom import tree
from fedloom.engines.base import Problem, Reply
from fedloom.engines.local import CohortMember, LocalEngine
from fedloom.engines.sequential import Sequential
from fedloom.engines.stores import Slab, TreeLayout, layout_of, views
from fedloom.engines.vectorised import Vectorised
from fedloom.errors import WorkerError
from fedloom.method import Downlink
from fedloom.tree import Tree

PR_SET_PDEATHSIG = 1
NAMED = 8  # maximum number of clients that a message lists
DONE, FAILED, PART = "done", "failed", "part"  # kinds of answers


class Message(NamedTuple):
    """The location of a tree: a slab's file and its layout."""

    file: str
    layout: TreeLayout


class Slabs:
    """This process's access to the message files. Each file is opened once for each size."""

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
        """Return the tree of a message. Its leaves are views of the file."""
        file, layout = message
        last = self._last.get(file)
        if last is None or last[0] != layout:
            slab = self._open.get(file)
            if slab is None or slab.n_bytes < layout.n_bytes:
                slab = self._open[file] = Slab(self._folder / file, layout.n_bytes)
            last = self._last[file] = layout, views(slab.data, layout)
        return last[1]


class CohortJob(NamedTuple):
    """The local updates of some members of a cohort."""

    number: int
    common: Message
    members: Sequence[
        tuple[int, int, Message | None]
    ]  # position in the cohort, client, and the client's own part of the downlink
    stream: bool  # whether every reply is sent as soon as it is available

    def __str__(self) -> str:
        """Return a description of the job, for messages."""
        return f"trained {listed([i for _, i, _ in self.members])} in round {self.number + 1}"


class ScoreJob(NamedTuple):
    """The scores of some clients on a piece of the examples."""

    number: int
    common: Message
    share: tuple[Any, ...]  # additional arguments of `LocalEngine.score_part`

    def __str__(self) -> str:
        """Return a description of the job, for messages."""
        return f"scored clients after round {self.number}"


class ServerJob(NamedTuple):
    """The score of the server on the k-th of n pieces of the examples."""

    common: Message
    part: tuple[int, int]

    def __str__(self) -> str:
        """Return a description of the job, for messages."""
        return "scored the server's model"


Job = CohortJob | ScoreJob | ServerJob


class Worker:
    """The experiment's handle to one worker process."""

    def __init__(self, problem: Problem, folder: Path, others: Sequence[Worker], lanes: int | None) -> None:
        """Start the process. `others` are the existing workers, whose pipes are closed in the new process."""
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe()
        self.job: Job | None = None
        self.parts: list[Reply] = []  # replies of the current job so far
        self.heard = 0.0  # time at which the current job was sent or its latest reply arrived
        ours = [self.pipe, *(worker.pipe for worker in others)]
        self._process = context.Process(target=_work, args=(problem, folder, lanes, theirs, ours), daemon=True)
        with warnings.catch_warnings():
            # Python 3.12 warns about forks while other threads exist. Workers use none of their locks.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._process.start()
        theirs.close()

    def send(self, job: Job) -> None:
        """Send a job."""
        self.job, self.parts, self.heard = job, [], time.monotonic()
        with self._alive():
            self.pipe.send(job)

    def receive(self) -> tuple[bool, Any]:
        """Return whether the job is finished, and its result. Raise the error of the job, if any."""
        with self._alive():
            kind, value = self.pipe.recv()
        if kind == FAILED:
            raise value
        if kind == PART:
            self.parts.append(value)
            self.heard = time.monotonic()
            return False, None
        return True, self.parts + value if self.parts else value

    @contextmanager
    def _alive(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, ConnectionError):
            self._process.join(5)
            code = self._process.exitcode
            raise WorkerError(
                f"a worker process ended while it {self.job} (exit code {code}; -9: killed);"
                " if it ran out of memory, use a smaller batch_size or fewer engine.workers"
            ) from None

    def end(self) -> None:
        """Stop the process, even if it is working."""
        self._process.kill()
        self._process.join(5)
        self.pipe.close()


def listed(clients: Sequence[int]) -> str:
    """Return the clients' numbers as text, such as "client 3" or "clients 1, 2"."""
    more = f" and {len(clients) - NAMED} more" if len(clients) > NAMED else ""
    return f"client{'s' if len(clients) > 1 else ''} {', '.join(map(str, clients[:NAMED]))}{more}"


def _work(problem: Problem, folder: Path, lanes: int | None, pipe: Connection, inherited: Sequence[Connection]) -> None:
    """Run jobs until the experiment stops this worker.

    If the experiment's process no longer exists, remove its memory-mapped files.
    """
    for end in inherited:  # the experiment's pipe ends; an open copy would hide the end of the experiment
        end.close()
    for number in (signal.SIGINT, signal.SIGTERM):  # the experiment handles these and stops its workers
        signal.signal(number, signal.SIG_IGN)
    _end_with_parent(folder)
    torch.set_num_threads(1)
    engine: LocalEngine = Vectorised(problem, lanes) if lanes else Sequential(problem)
    slabs = Slabs(folder)
    engine.share(folder)
    try:
        while True:
            job = pipe.recv()
            try:
                answer: tuple[str, Any] = DONE, _do(engine, slabs, job, lambda reply: pipe.send((PART, reply)))
            except Exception as error:
                answer = FAILED, portable(error, multiprocessing.reduction.ForkingPickler)
            pipe.send(answer)
    except (EOFError, ConnectionError):  # the experiment's process no longer exists
        shutil.rmtree(folder, ignore_errors=True)


def _end_with_parent(folder: Path) -> None:
    """End this process and remove `folder` when the experiment's process exits for any reason, even during a local update.

    Linux sends a signal. On other systems, a worker detects that the pipe is closed when it waits for its next job.
    """
    parent = multiprocessing.parent_process()

    def leave(*_: object) -> None:
        if (
            parent is not None and os.getppid() != parent.pid
        ):  # the signal is also sent when only the parent's thread ends
            shutil.rmtree(folder, ignore_errors=True)
            os._exit(1)

    if sys.platform == "linux":
        signal.signal(signal.SIGHUP, leave)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGHUP)
        leave()  # the parent may already have exited


def _do(engine: LocalEngine, slabs: Slabs, job: Job, tell: Callable[[Reply], None]) -> Any:
    """Return the result of a job, without the replies that were passed to `tell`."""
    down = Downlink(slabs.get(job.common))
    if isinstance(job, ScoreJob):
        return engine.score_part(job.number, down, *job.share)
    if isinstance(job, ServerJob):
        return engine.score_server_part(down, job.part)
    started = time.perf_counter()
    members = [
        CohortMember(slot, i, tree.merge(down.common, slabs.get(own)) if own else down.common)
        for slot, i, own in job.members
    ]
    replies = list[Reply]()
    for reply in engine.updates(job.number, members):  # one by one, because many models would use too much memory
        reply = replace(reply, uplink=slabs.put(f"up-{reply.slot}", reply.uplink))  # type: ignore[arg-type]
        if job.stream:
            tell(reply)
        else:
            replies.append(reply)
    around = (time.perf_counter() - started - sum(reply.seconds for reply in replies)) / len(members)
    return [replace(reply, seconds=reply.seconds + around) for reply in replies]


class Pickler(Protocol):
    """Serialises objects for other processes."""

    def dumps(self, obj: Any) -> Any:
        """Return an object as bytes."""

    def loads(self, data: Any) -> Any:
        """Return the object from its bytes."""


def portable(error: BaseException, pickler: Pickler) -> BaseException:
    """Return the error in a form that can be pickled. The worker's traceback is attached to it as a note."""
    error.add_note("".join(traceback.format_exception(error)))
    try:
        pickler.loads(pickler.dumps(error))
    except Exception:
        plain = RuntimeError(f"{type(error).__name__}: {error}")
        for note in getattr(error, "__notes__", ()):
            plain.add_note(note)
        return plain
    return error
