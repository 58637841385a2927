"""The worker's side of the Ray engine: an actor that stores experiments, and the jobs that it runs."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import ray
import torch
from ray import cloudpickle

from fedloom import tree
from fedloom._version import __version__
from fedloom.engines.base import Reply, Score
from fedloom.engines.local import CohortMember
from fedloom.engines.process_worker import portable
from fedloom.engines.ray.packing import Packed, Packer, unpack
from fedloom.engines.scoring import Share
from fedloom.engines.sequential import Sequential
from fedloom.method import Client, Downlink
from fedloom.tree import Tree


class Shared(NamedTuple):
    """The data that an experiment shares with all its workers."""

    key: str
    problem: Any  # a reference to a `Problem`
    dtype: torch.dtype


class Facts(NamedTuple):
    """A worker's machine, process and package versions."""

    host: str
    pid: int
    versions: Mapping[str, str]


class Missing(NamedTuple):
    """A worker's answer that it lacks the committed version of these clients."""

    clients: Sequence[int]


class JobFailure(NamedTuple):
    """A worker's answer that the job raised this error."""

    error: BaseException


class Done(NamedTuple):
    """The result of a local update: the reply with its packed uplink, and the client's state."""

    reply: Reply
    kept: Packed


Versions = Mapping[int, int]  # by client, the number of the local update that produced its state; 0 if it never changed


class RayJob(Protocol):
    """A job for one worker."""

    @property
    def versions(self) -> Versions:
        """The versions of the clients that the job needs."""

    def do(self, post: Post, common: Tree) -> Any:
        """Run the job on the worker."""


@dataclass(frozen=True, kw_only=True)
class UpdateJob:
    """The local updates of some members of the cohort. `ticket` is the version of the clients that they produce."""

    number: int
    ticket: int
    members: Sequence[tuple[int, int]]  # (slot, client)
    own: Sequence[Packed] | None  # for each member, its own part of the downlink
    versions: Versions

    def do(self, post: Post, common: Tree) -> list[Done]:
        """See `RayJob.do`."""
        found = []
        for place, (slot, i) in enumerate(self.members):
            started = time.perf_counter()
            message = tree.merge(common, unpack(self.own[place])) if self.own else common
            post.versions[i] = self.ticket
            reply = post.engine.update(self.number, CohortMember(slot, i, message))
            sent: Any = post.packer.pack(reply.uplink)
            kept = post.packer.pack(post.engine.client(i)._asdict())
            found.append(Done(replace(reply, uplink=sent, seconds=time.perf_counter() - started), kept))
        return found


@dataclass(frozen=True)
class Scores:
    """One worker's share of the scoring."""

    number: int
    share: Share
    versions: Versions

    def do(self, post: Post, common: Tree) -> list[dict[str, Score]]:
        """See `RayJob.do`."""
        return post.engine.score_part(self.number, Downlink(common), *self.share)


@dataclass(frozen=True)
class ServerScore:
    """The score of the server on the k-th of n pieces of the common test examples."""

    part: tuple[int, int]
    versions: Versions

    def do(self, post: Post, common: Tree) -> Score:
        """See `RayJob.do`."""
        return post.engine.score_server_part(Downlink(common), self.part)


class Post:
    """A worker's data for one experiment."""

    def __init__(self, shared: Shared) -> None:
        self.engine = Sequential(ray.get(shared.problem))
        self.packer = Packer()
        self.versions: dict[int, int] = {}

    def take(self, clients: Mapping[int, tuple[int, Packed]]) -> None:
        """Store these clients with their versions."""
        for i, (version, kept) in clients.items():
            self.engine.restore(i, Client(**unpack(kept)))
            self.versions[i] = version

    def missing(self, wanted: Versions) -> list[int]:
        """Return the clients for which this worker lacks the requested version."""
        return [i for i, version in wanted.items() if self.versions.get(i, 0) != version]


class RayWorker:
    """The actor. Several experiments may use it."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._posts: dict[str, Post] = {}

    def ready(self, shared: Shared) -> Facts:
        """Load the problem if it is not loaded yet. Return the facts about this worker."""
        self._post(shared)
        return Facts(socket.gethostname(), os.getpid(), package_versions())

    def do(self, shared: Shared, common: Packed, job: RayJob, clients: Mapping[int, tuple[int, Packed]]) -> Any:
        """Store the given clients, then run a job. Return its result, `Missing` or `JobFailure`."""
        post = self._post(shared)
        post.take(clients)
        missing = post.missing(job.versions)
        if missing:
            return Missing(missing)
        try:
            return job.do(post, unpack(common))
        except (
            Exception,
            SystemExit,
        ) as error:  # includes SystemExit, after which Ray would stop this worker permanently
            return JobFailure(portable(error, cloudpickle))

    def forget(self, key: str) -> None:
        """Remove an experiment that is over."""
        self._posts.pop(key, None)

    def _post(self, shared: Shared) -> Post:
        torch.set_default_dtype(shared.dtype)
        if shared.key not in self._posts:
            self._posts[shared.key] = Post(shared)
        return self._posts[shared.key]


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that must be the same on all machines to give the same numbers."""
    return {"fedloom": __version__, "torch": torch.__version__}
