"""The worker of a node, which trains or scores the requested clients and returns the answer.

The worker is a separate process that runs as long as the node, so torch is imported and data are read only once. It exchanges bytes with
the node's agent over a pipe. If it hangs or dies, the agent starts another worker; committed states are on disk.
"""

from __future__ import annotations

import hashlib
import logging
import signal
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fedloom.config.settings import Named, Settings, make_method, make_settings
from fedloom.data.preprocess import Given, Preprocess
from fedloom.deploy.budget import check_problem, check_settings
from fedloom.deploy.files import NodeFile, read_file
from fedloom.deploy.folder import weights_file
from fedloom.deploy.leash import hold
from fedloom.deploy.limits import request_limits
from fedloom.deploy.messages import (
    MAX_NOTES,
    Assignment,
    Call,
    Hello,
    Letter,
    NodeFailure,
    Present,
    Scored,
    ScoreMessage,
    SentScore,
    Trained,
    TrainMessage,
    Turned,
    open_envelope,
    seal,
)
from fedloom.deploy.rows import counts_of, read_own
from fedloom.deploy.store import NodeStore
from fedloom.engines.base import Problem, Reply, Score
from fedloom.engines.local import CohortMember as CohortMember
from fedloom.engines.sequential import Sequential
from fedloom.errors import ConfigError, UsageError, WireError
from fedloom.experiment.build import make_dataset, make_federation, make_problem
from fedloom.method import Downlink
from fedloom.methods.registry import halves
from fedloom.tools.error_report import one_line
from fedloom.tree import merge

log = logging.getLogger("fedloom.node")
SERVERS = "the server's preprocess.json"
LONGEST = 300  # maximum number of characters in a reason that is sent to the server


class NodeRun(NamedTuple):
    """A run on this node: the problem, its engine, and the store of client states."""

    problem: Problem
    engine: Sequential
    store: NodeStore


class NodeWorker:
    """Answers requests one by one."""

    def __init__(self, folder: Path) -> None:
        """Create the worker for the node in `folder`."""
        self._folder = folder
        self._node = read_file(folder / "node.toml", NodeFile, "a node's folder")
        self._key = ""
        self._site: NodeRun | None = None

    def answer(self, data: bytes) -> bytes:
        """Return the answer to a request. An error becomes an answer that contains the reason."""
        try:
            letter = open_envelope(data, request_limits(len(self._node.clients)))
            match letter.header:
                case Hello():
                    return self._present(letter.header)
                case TrainMessage():
                    return self._train(letter, letter.header)
                case ScoreMessage():
                    return self._score(letter, letter.header)
            raise WireError(f"a message of kind '{letter.header.kind}' is not a request")
        except UsageError as error:
            log.error("the request was refused: %s", error)
            return seal(NodeFailure(reason=_reason(error)), {})
        except Exception as error:
            log.exception("the request failed")
            return seal(NodeFailure(reason=_reason(error)), {})

    def _present(self, header: Hello) -> bytes:
        site, mine = self._open(header.call), self._node.clients
        own = self._node.data != "config"
        counts = {str(i): c for i, c in counts_of(site.problem.data, mine).items()} if own else {}
        return seal(Present(clients=mine, own_rows=own, counts=counts), {})

    def _train(self, letter: Letter, request: TrainMessage) -> bytes:
        site = self._serve(request.call, request.number, request.members)
        if request.number >= site.problem.n_exchanges:
            raise WireError(f"round {request.number + 1}: the run has {site.problem.task.rounds} rounds")
        common = letter.tree("common")
        turns, uplinks = [], {}
        for member in request.members:
            try:
                own = f"each-{member.slot}"
                message = merge(common, letter.tree(own)) if own in letter.trees else common
                reply = site.engine.update(request.number, CohortMember(member.slot, member.client, message))
                turns.append(_turned(reply))
                uplinks[str(member.slot)] = reply.uplink
            except Exception as error:
                log.exception("client %d, round %d failed", member.client, request.number + 1)
                turns.append(Turned(client=member.client, slot=member.slot, failure=_reason(error)))
            log.info("round %d: client %d has finished", request.number + 1, member.client)
        return seal(Trained(turns=turns, notes=site.store.notes[:MAX_NOTES]), uplinks)

    def _score(self, letter: Letter, request: ScoreMessage) -> bytes:
        site = self._serve(request.call, request.number, request.members)
        clients = [member.client for member in request.members]
        asks = [question.request() for question in request.questions]
        found = site.engine.score(request.number, Downlink(letter.tree("common")), clients, asks)
        scores = {
            str(i): {name: _sent(score) for name, score in mine.items()} for i, mine in zip(clients, found, strict=True)
        }
        return seal(Scored(scores=scores, notes=site.store.notes[:MAX_NOTES]), {})

    def _serve(self, call: Call, number: int, members: Sequence[Assignment]) -> NodeRun:
        site = self._open(call)
        strangers = [member.client for member in members if member.client not in self._node.clients]
        if strangers:
            raise WireError(f"client {strangers[0]} is not on {self._node.name}")
        if len({m.client for m in members}) < len(members) or len({m.slot for m in members}) < len(members):
            raise WireError("the request names a client or a slot twice")
        site.store.turn_to(number, members)
        return site

    def _open(self, call: Call) -> NodeRun:
        """Return the run on this node. The run is created at the first request."""
        key = hashlib.blake2b(call.model_dump_json().encode()).hexdigest()
        if self._site is None or key != self._key:
            self._site, self._key = None, ""
            self._site, self._key = self._make(call), key
        return self._site

    def _make(self, call: Call) -> NodeRun:
        settings = self._settings(call.config)
        check_settings(self._node, self._folder, settings)
        torch.set_default_dtype(torch.float64 if settings.precision == "fp64" else torch.float32)
        torch.set_num_threads(settings.engine.threads)
        method = make_method(settings.method)
        described = Preprocess.parse(call.preprocess, SERVERS)
        given = Given(preprocess=described, where=SERVERS, accepts_unknown=True)
        if self._node.data == "config":
            read = given if settings.data.preprocess else None
            federation = make_federation(settings, make_dataset(settings, read))
        else:
            folder = self._folder / self._node.data
            federation = read_own(folder, self._node.clients, settings, given)
        if (federation.objective, federation.spec) != (described.objective, described.spec):
            raise ConfigError("this node's data differ from the server's in classes or input shape")
        if method.pooled:
            raise ConfigError(
                f"method={settings.method.name}: cannot be deployed, because it pools the examples of all clients"
            )
        problem = make_problem(settings, method, federation)
        check_problem(self._node.budget, problem, self._node.clients)
        engine, stores = Sequential(problem), list[NodeStore]()

        def keep(blank: Any) -> NodeStore:
            stores.append(NodeStore(blank, self._folder / "state" / call.run))
            return stores[0]

        engine.keep_in(keep)
        return NodeRun(problem, engine, stores[0])

    def _settings(self, text: str) -> Settings:
        """Return the run's settings. Python files and pretrained weights are read only from this node's own `code` folder."""
        import tomllib

        settings = make_settings(tomllib.loads(text))
        parts = [self._code(half) for half in halves(settings.method.name) if half]
        method = settings.method.model_copy(update={"name": "+".join(parts)})
        models = tuple(self._code(name) for name in settings.models)
        own = {"model": self._model(settings.model), "common_model": self._model(settings.common_model)}
        return settings.model_copy(update={"method": method, "models": models, **own})

    def _model(self, choice: Named) -> Named:
        own = {"name": self._code(choice.name)}
        if weights := weights_file(choice):
            own["weights"] = str(self._own_file(str(weights), weights))
        return Named(**{**choice.options, **own})

    def _code(self, name: str) -> str:
        path, colon, what = name.rpartition(":")
        if not colon:
            return name
        return f"{self._own_file(name, Path(path))}:{what}"

    def _own_file(self, name: str, path: Path) -> Path:
        """Return this node's own copy of a file that the settings name."""
        file = self._folder / "code" / path.name
        if not file.is_file():
            raise ConfigError(
                f"{name}: this node has no code/{file.name}; copy the file there (code is never received from the server)"
            )
        return file


def serve(folder: Path, pipe: Connection) -> None:
    """Run the worker process: answer requests until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):  # reset the handlers inherited from the agent
        signal.signal(number, signal.SIG_DFL)
    hold()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    worker = NodeWorker(folder)
    while True:
        try:
            data = pipe.recv_bytes()
        except (EOFError, OSError):
            return
        started = time.perf_counter()
        answer = worker.answer(data)
        log.info("answered %d bytes with %d in %.2f s", len(data), len(answer), time.perf_counter() - started)
        pipe.send_bytes(answer)


def _turned(reply: Reply) -> Turned:
    return Turned(
        client=reply.client,
        slot=reply.slot,
        examples=reply.examples,
        steps=dict(reply.steps),
        logs=dict(reply.logs),
        seconds=reply.seconds,
        phase_seconds=dict(reply.phase_seconds),
        diverged=reply.diverged,
    )


def _sent(score: Score) -> SentScore:
    return SentScore(sums={name: values.tolist() for name, values in score.sums.items()})


def _reason(error: BaseException) -> str:
    """Return the error as one line for the server. The node's log contains the full error."""
    return " ".join(one_line(error).split())[:LONGEST]
