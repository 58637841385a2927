"""The engine for clients on devices, which is the server side of a deployed federation.

The engine sends requests to nodes over a `Link` (Flower's grid in `fedloom.deploy.grid`, a direct call in tests), with one message per
node and round for all clients of the node. Client states stay on the nodes, which store them by round. Every request names the last client
update that the server *accepted*. If a reply was lost, late or refused, the device therefore discards that update at the next request, and
a resumed run finds the states of its checkpoint. A lost message only excludes its clients from the round.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from fedloom import tree
from fedloom.deploy.budget import most_steps
from fedloom.deploy.limits import Limits, limits
from fedloom.deploy.messages import (
    Assignment,
    Call,
    Letter,
    NodeFailure,
    Question,
    Scored,
    ScoreMessage,
    Trained,
    TrainMessage,
    Turned,
    open_envelope,
    seal,
)
from fedloom.deploy.rows import example_groups
from fedloom.engines.base import Engine, Problem, Reply, Score, ScoreRequest
from fedloom.engines.sequential import Sequential
from fedloom.errors import ConfigError, RunFolderError, WireError
from fedloom.method import Client, Downlink, trains_of
from fedloom.nets import read_weights
from fedloom.training.turn import Modules
from fedloom.tree import Tree

H = TypeVar("H")
WAIT_S = 1.0  # interval between checks for nodes
CLOCK_S = 1.0  # tolerance in seconds for a node that reports more working time than the server waited


class LostNode(NamedTuple):
    """A node that did not answer, with the `reason`."""

    reason: str


class Errand(NamedTuple):
    """The local updates that are requested from a node in round `number`, for its clients by their position in the cohort."""

    number: int
    clients: Mapping[int, int]
    sent_s: float  # time of the request on the monotonic clock


class Link(Protocol):
    """The transport of messages between server and nodes."""

    def nodes(self) -> Sequence[str]:
        """Return the names of the nodes that are online."""

    def exchange(
        self, requests: Mapping[str, bytes], deadline_s: float, late_s: float = 0.0
    ) -> Mapping[str, bytes | LostNode]:
        """Send requests to several nodes at once, and wait for their answers until the deadline.

        With `late_s`, a node may answer up to `late_s` seconds after the deadline. `late` then returns its answer.
        """

    def late(self) -> Mapping[str, bytes | LostNode]:
        """Return the late answers since the last call, and the nodes whose late answer can no longer arrive."""

    def close(self) -> None:
        """Close the connection."""


class AcceptedUpdates:
    """A record of each client's accepted updates by round.

    It is kept in a file, so that devices and server agree on the state of every client.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        try:
            stored = json.loads(file.read_text(encoding="utf-8")) if file and file.is_file() else {}
            self._turns = {int(i): [(int(at), int(turn)) for at, turn in turns] for i, turns in stored.items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise RunFolderError(f"{file} cannot be read as the record of accepted updates: {error}") from None

    def base(self, client: int, number: int) -> int:
        """Return one plus the round of the client's last update that was accepted before round `number`, or 0 if there is none."""
        return max((turn + 1 for at, turn in self._turns.get(client, ()) if at < number), default=0)

    def accept(self, number: int, turns: Mapping[int, int], keep: int) -> None:
        """Record the updates accepted in round `number`. `turns` contains the round in which each client made its update.

        Later entries are removed, because a resumed run discards them. Of the entries before round `keep`, only the last one is kept.
        """
        for i in {*self._turns, *turns}:
            last = self.base(i, keep) - 1
            self._turns[i] = [(at, turn) for at, turn in self._turns.get(i, ()) if at < number and turn >= last]
        for i, turn in turns.items():
            self._turns[i].append((number, turn))
        if self._file:
            draft = self._file.with_name(f".{self._file.name}.tmp")
            draft.write_text(json.dumps(self._turns), encoding="utf-8")
            draft.replace(self._file)


class FlowerEngine(Engine):
    """An engine that sends requests to nodes. `fedloom.deploy` creates it, because it needs a running federation."""

    def __init__(
        self,
        problem: Problem,
        link: Link,
        roster: Mapping[str, Sequence[int]],
        call: Call,
        tell: Callable[[str], None],
        late_s: float = 0.0,
    ) -> None:
        """Start the engine.

        Args:
            roster: the clients of each node.
            call: the part that all requests share.
            tell: receives a line for each lost or refused message.
            late_s: time in seconds after the deadline within which an answer can still be used in a later round.
        """
        super().__init__(problem)
        self._link, self._call, self._tell, self._late_s = link, call, tell, late_s
        self.turns = AcceptedUpdates()  # in memory until the run has a folder
        self._roster, self._node_of = roster, {i: node for node, clients in roster.items() for i in clients}
        self._overdue: dict[str, Errand] = {}  # late nodes, with the updates that were requested from them
        self._asked: set[int] = set()  # clients that received a request in the last round
        self._safe = self._pending = (
            0  # states before round `_safe` are not needed; the next `train` replaces it by `_pending`
        )
        self._done = 0
        missing = sorted(set(range(problem.task.n_clients)) - self._node_of.keys())
        if missing or len(self._node_of) != problem.task.n_clients:
            raise ConfigError(
                f"clients={problem.task.n_clients}: the nodes of the federation have {len(self._node_of)} clients"
                + (f", and client {missing[0]} is missing; see federation.toml" if missing else "")
            )

    @cached_property
    def _local(self) -> Sequential:
        """The engine for evaluation on the server."""
        return Sequential(self.problem)

    def train(self, number: int, cohort: Sequence[int], down: Downlink) -> list[Reply]:
        """See `Engine.train`."""
        self._safe = self._pending  # the checkpoint of that round is now complete
        asked = {
            node: Errand(number, {slot: cohort[slot] for slot in slots}, time.monotonic())
            for node, slots in self._by_node(cohort, number + 1).items()
        }
        self._asked = {i for errand in asked.values() for i in errand.clients.values()}
        call = self._call.model_copy(update={"deadline_s": self._call.deadline_s + self._late_s})
        requests = {}
        for node, (_, slots, _) in asked.items():
            members = [self._member(i, slot, number) for slot, i in slots.items()]
            trees = {"common": down.common}
            if down.each is not None:
                trees |= {f"each-{slot}": down.each[slot] for slot in slots}
            requests[node] = seal(TrainMessage(call=call, number=number, members=members), trees)
        fresh = self._answers(requests, self._late_s)
        errands = self._overdue | asked
        self._overdue = {node: errand for node, errand in errands.items() if node not in fresh}
        late = self._late_answers(wait=not requests)
        self._overdue = {node: errand for node, errand in self._overdue.items() if node not in late}
        turns = [
            (errands[node].number, reply)
            for node, letter in self._letters(
                {**fresh, **late}, Trained, {node: limits(len(errands[node].clients), self._paths) for node in errands}
            )
            for reply in self._replies(node, letter, errands[node])
        ]
        turns.sort(key=lambda turn: (-turn[0], turn[1].slot))
        self.turns.accept(number, {reply.client: at for at, reply in turns if not reply.diverged}, self._safe)
        self._done = number + 1
        return [reply for _, reply in turns]

    def busy(self) -> frozenset[int]:
        """Return all clients of late nodes (see `Engine.busy`)."""
        return frozenset(i for node in self._overdue for i in self._roster[node])

    def asked(self, cohort: Sequence[int]) -> Sequence[int]:
        """See `Engine.asked`."""
        return [i for i in cohort if i in self._asked]

    def _member(self, i: int, slot: int, number: int) -> Assignment:
        return Assignment(client=i, slot=slot, base=self.turns.base(i, number), keep=self.turns.base(i, self._safe))

    def _by_node(self, cohort: Sequence[int], rounds: int) -> dict[str, list[int]]:
        """Return the positions in the cohort by node, for online nodes. Wait while no node is online.

        `rounds` is the number of this round, counted from 1.
        """
        until = time.monotonic() + self._call.deadline_s
        wanted = {self._node_of[i] for i in cohort}
        while not (here := wanted & set(self._link.nodes())) and wanted and time.monotonic() < until:
            time.sleep(WAIT_S)
        for node in sorted(wanted - here):
            self._tell(f"round {rounds}: {node} is not online")
        return {node: [slot for slot, i in enumerate(cohort) if self._node_of[i] == node] for node in sorted(here)}

    def _answers(self, requests: Mapping[str, bytes], late_s: float = 0.0) -> dict[str, bytes | LostNode]:
        """Return the nodes' answers in the order of the requests, without nodes that may still answer."""
        if not requests:
            return {}
        found = self._link.exchange(requests, self._call.deadline_s, late_s)
        if late_s:
            for node in requests.keys() - found.keys():
                self._tell(f"{node}: not finished after {self._call.deadline_s:g} s")
            return {node: found[node] for node in requests if node in found}
        return {node: found.get(node, LostNode("no answer")) for node in requests}

    def _late_answers(self, wait: bool) -> Mapping[str, bytes | LostNode]:
        """Return the answers of late nodes. With `wait`, wait for one answer, because no other node received a request."""
        until = time.monotonic() + self._call.deadline_s
        while self._overdue:
            if (found := self._link.late()) or not wait or time.monotonic() > until:
                return found
            time.sleep(WAIT_S)
        return {}

    @cached_property
    def _paths(self) -> list[str]:
        """Paths of at least as many tensors as a client can send: three times those of the largest architecture."""
        every = [tree.structure(read_weights(self.problem.modules(arch))) for arch in range(len(self.problem.archs))]
        return [f"weights/{path}" for path in max(every, key=len)] * 3

    def _letters(
        self, answers: Mapping[str, bytes | LostNode], kind: type[H], allowed: Mapping[str, Limits]
    ) -> Iterable[tuple[str, Letter]]:
        """Yield the answers of the expected kind, and report all others. `allowed` contains the limits of each node's answer."""
        for node, answer in answers.items():
            try:
                if isinstance(answer, LostNode):
                    raise WireError(answer.reason)
                letter = open_envelope(answer, allowed[node])
                if isinstance(letter.header, NodeFailure):
                    raise WireError(letter.header.reason)
                if not isinstance(letter.header, kind):
                    raise WireError(f"the answer has an unexpected kind ({letter.header.kind})")
            except WireError as error:
                self._tell(f"{node}: {error}")
                continue
            for note in getattr(letter.header, "notes", ()):
                self._tell(f"{node}: {note}")
            yield node, letter

    def _replies(self, node: str, letter: Letter, errand: Errand) -> Iterable[Reply]:
        """Yield the requested updates in a node's answer. Their uplinks are checked later, as with all engines."""
        left, where = dict(errand.clients), f"{node}: round {errand.number + 1}"
        for turn in letter.header.turns:
            try:
                if left.pop(turn.slot, None) != turn.client:
                    raise WireError("this update was not requested")
                self._check(turn, time.monotonic() - errand.sent_s)
                yield _reply(letter, turn)
            except WireError as error:
                self._tell(f"{where}, client {turn.client}: {error}")
        for i in left.values():
            self._tell(f"{where}, client {i}: its update is missing")

    def _check(self, turn: Turned, elapsed: float) -> None:
        """Raise WireError if an update that was requested `elapsed` seconds ago reports impossible values."""
        if turn.failure:
            raise WireError(turn.failure)
        n_rows, phases = self.problem.data.n_train(turn.client), self.problem.method.phases()
        # `examples` is the weight in the mean. With 0 rows, the node has its own data and was offline at the start.
        if turn.examples < 1 or (n_rows and turn.examples != n_rows):
            raise WireError(f"it reports {turn.examples} training examples, but has {n_rows or 'at least 1'}")
        known = {phase.name for phase in phases} | {train.name for train in trains_of(phases)}
        of_logs = {name.partition(".")[0] for name in turn.logs}
        if strange := {*turn.steps, *turn.phase_seconds, *of_logs} - known:
            raise WireError(f"it reports '{min(strange)}', which is not a phase of the method")
        most = most_steps(self.problem, turn.client, turn.examples)
        for name, steps in turn.steps.items():
            if steps > most.get(name, 0):
                raise WireError(
                    f"it reports {steps} steps of phase '{name}', but at most {most.get(name, 0)} are possible"
                )
        if max(turn.seconds, sum(turn.phase_seconds.values())) > 1.01 * elapsed + CLOCK_S:
            raise WireError(
                f"it reports {turn.seconds:.3g} seconds, but the request was sent {elapsed:.3g} seconds ago"
            )

    def score(
        self, number: int, down: Downlink, clients: Sequence[int], asks: Sequence[ScoreRequest]
    ) -> list[dict[str, Score]]:
        """Score clients as described in `Engine.score`. Clients of offline nodes contribute no examples."""
        objective = self.problem.task.objective
        found = {i: {ask.name: objective.none() for ask in asks} for i in clients}
        questions = [Question(name=ask.name, rows=ask.rows, fitted=ask.fitted) for ask in asks]  # type: ignore[arg-type]
        requests, asked = {}, {}
        for node, places in self._by_node(clients, number).items():
            asked[node] = [clients[place] for place in places]
            members = [self._member(i, place, number) for i, place in zip(asked[node], places, strict=True)]
            header = ScoreMessage(call=self._call, number=number, members=members, questions=questions)
            requests[node] = seal(header, {"common": down.common})
        n_sums = 2 * len(asks) * sum(objective.shapes().values())
        most = {node: limits(len(mine), n_counts=len(mine) * n_sums) for node, mine in asked.items()}
        for node, letter in self._letters(self._answers(requests), Scored, most):
            for i in asked[node]:
                try:
                    mine = letter.header.scores[str(i)]
                    found[i] = {ask.name: mine[ask.name].score(objective, self._most_rows(ask, i)) for ask in asks}
                except (KeyError, WireError) as error:
                    reason = error if isinstance(error, WireError) else "its scores are missing"
                    self._tell(f"{node}: scores of client {i}: {reason}")
        return [found[i] for i in clients]

    def _most_rows(self, ask: ScoreRequest, i: int) -> Score:
        """Return the maximum of `rows` in client `i`'s score.

        If the node of the client was offline at the start, no limit is known.
        """
        data = self.problem.data
        if not data.n_train(i):
            return Score({"rows": np.full(data.objective.shapes()["rows"], np.iinfo(np.int64).max)})
        return Score({"rows": self._rows[ask.rows][0 if ask.rows == "common" else i]})

    @cached_property
    def _rows(self) -> dict[str, npt.NDArray[np.int64]]:
        """Number of examples by split, with one row per client. A row has one number per class, or one number if there are no classes."""
        data = self.problem.data
        groups, n = example_groups(data.dataset)
        own = {split: data.partition.counts(groups, n, split) for split in ("valid", "test")}
        return own | {"common": np.bincount(groups[data.partition.common], minlength=n)[None]}

    def score_server(self, down: Downlink) -> Score:
        """Score the server's model as described in `Engine.score_server`. This is computed on the server, on the examples that it has."""
        return self._local.score_server(down)

    def client(self, i: int) -> Client:
        """Raise ConfigError, because client states never leave their device."""
        raise ConfigError(f"client {i} is on {self._node_of[i]}; its state never leaves that device")

    def personal(self, number: int, down: Downlink, i: int, adapt: bool = True) -> tuple[Modules, Client, Tree]:
        """Raise ConfigError, as `client` does."""
        raise ConfigError(f"client {i}'s model is on {self._node_of[i]}, and never leaves that device")

    def changed(self) -> Iterable[int]:
        """Return no clients, because checkpoints contain no client states. Mark the states of earlier rounds as no longer needed."""
        self._pending = self._done
        return ()

    def restore(self, i: int, client: Client) -> None:
        """Raise RunFolderError, because the run was started on another engine."""
        raise RunFolderError(
            "this run's checkpoint has client states, so it was not made on devices; resume it with fedloom run --resume"
        )

    def close(self) -> None:
        """See `Engine.close`."""
        self._link.close()


def _reply(letter: Letter, turn: Turned) -> Reply:
    return Reply(
        client=turn.client,
        slot=turn.slot,
        uplink=letter.tree(str(turn.slot)),
        examples=turn.examples,
        steps=turn.steps,
        logs=turn.logs,
        seconds=turn.seconds,
        phase_seconds=turn.phase_seconds,
        diverged=turn.diverged,
    )


__all__ = ["AcceptedUpdates", "FlowerEngine", "Link", "LostNode"]
