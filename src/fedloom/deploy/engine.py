"""Clients on devices: the server's side of a deployed federation.

The engine asks nodes over a `Link` (Flower's grid in `fedloom.deploy.grid`, a direct call in tests): one message per node and round, for
all of its clients. Clients' states never come here; a node keeps them by round, and every request names the last turn of a client that the
server *accepted*. A turn whose reply was lost, late or refused is therefore undone on the device when the client is asked next, and a
resumed run finds the states that belong to its checkpoint. What is lost costs its clients' part in the round and nothing else.
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
from fedloom.engines.base import Engine, Problem, Reply, Score, ScoreRequest
from fedloom.engines.scoring import none
from fedloom.engines.sequential import Sequential
from fedloom.errors import ConfigError, RunFolderError, WireError
from fedloom.method import Client, Downlink, trains_of
from fedloom.training.turn import Modules
from fedloom.tree import Tree

H = TypeVar("H")
WAIT_S = 1.0  # between two looks for nodes


class LostNode(NamedTuple):
    """No answer, and why."""

    reason: str


class Errand(NamedTuple):
    """What a node was asked to do: turns of a round, clients by their place among those who work in it."""

    number: int
    clients: Mapping[int, int]


class Link(Protocol):
    """How messages get to nodes and back."""

    def nodes(self) -> Sequence[str]:
        """The nodes that can be asked now, by name."""

    def exchange(
        self, requests: Mapping[str, bytes], deadline_s: float, late_s: float = 0.0
    ) -> Mapping[str, bytes | LostNode]:
        """Ask several nodes at once, and wait for their answers until the deadline.

        With `late_s` a node may answer for so long after it; `late` has its answer then.
        """

    def late(self) -> Mapping[str, bytes | LostNode]:
        """Answers that came after their exchange was over, and word of those that will never come, since the last look."""

    def close(self) -> None:
        """Hang up."""


class AcceptedUpdates:
    """Which turns were accepted in which round, by client, in a file; so that devices and server agree on every client's state."""

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        try:
            stored = json.loads(file.read_text(encoding="utf-8")) if file and file.is_file() else {}
            self._turns = {int(i): [(int(at), int(turn)) for at, turn in turns] for i, turns in stored.items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise RunFolderError(f"{file}: cannot be read as the record of turns: {error}") from None

    def base(self, client: int, number: int) -> int:
        """The client's last turn that was accepted before round `number`: its round, plus one; 0 where there is none."""
        return max((turn + 1 for at, turn in self._turns.get(client, ()) if at < number), default=0)

    def accept(self, number: int, turns: Mapping[int, int], keep: int) -> None:
        """Record what round `number` accepted, each client's turn by its round.

        What came after it is forgotten (undone by resuming), and all before round `keep` but the last.
        """
        for i in {*self._turns, *turns}:
            last = self.base(i, keep) - 1
            self._turns[i] = [(at, turn) for at, turn in self._turns.get(i, ()) if at < number and turn >= last]
        for i, turn in turns.items():
            self._turns[i].append((number, turn))
        if self._file:
            beside = self._file.with_name(f".{self._file.name}.tmp")
            beside.write_text(json.dumps(self._turns), encoding="utf-8")
            beside.replace(self._file)


class FlowerEngine(Engine):
    """Asks nodes; `fedloom.deploy` makes it, for it needs a federation that is up."""

    def __init__(
        self,
        problem: Problem,
        link: Link,
        roster: Mapping[str, Sequence[int]],
        call: Call,
        tell: Callable[[str], None],
        late_s: float = 0.0,
    ) -> None:
        """`roster`: the clients of each node; `call`: what every request says; `tell`: takes a line about whatever was lost or refused.

        `late_s`: how long after its round's deadline a node's answer may come, to be taken in by a later round.
        """
        super().__init__(problem)
        self._link, self._call, self._tell, self._late_s = link, call, tell, late_s
        self.turns = AcceptedUpdates()  # in memory, until the run has a folder
        self._roster, self._node_of = roster, {i: node for node, clients in roster.items() for i in clients}
        self._overdue: dict[str, Errand] = {}  # nodes that are late, and what they are at work on
        self._asked: set[int] = set()  # clients in the last round
        self._safe = self._pending = 0  # states before these rounds are no longer needed; after the next train
        self._done = 0
        missing = sorted(set(range(problem.task.n_clients)) - self._node_of.keys())
        if missing or len(self._node_of) != problem.task.n_clients:
            raise ConfigError(
                f"clients={problem.task.n_clients}: the federation's nodes hold {len(self._node_of)} clients"
                + (f", not client {missing[0]}" if missing else "")
            )

    @cached_property
    def _local(self) -> Sequential:
        """For what the server itself scores."""
        return Sequential(self.problem)

    def train(self, number: int, cohort: Sequence[int], down: Downlink) -> list[Reply]:
        """See `Engine.train`."""
        self._safe = self._pending  # the checkpoint of that round is whole by now
        asked = {
            node: Errand(number, {slot: cohort[slot] for slot in slots})
            for node, slots in self._by_node(cohort, number + 1).items()
        }
        self._asked = {i for errand in asked.values() for i in errand.clients.values()}
        call = self._call.model_copy(update={"deadline_s": self._call.deadline_s + self._late_s})
        requests = {}
        for node, (_, slots) in asked.items():
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
            for node, letter in self._letters({**fresh, **late}, Trained)
            for reply in self._replies(node, letter, errands[node])
        ]
        turns.sort(key=lambda turn: (-turn[0], turn[1].slot))
        self.turns.accept(number, {reply.client: at for at, reply in turns if not reply.diverged}, self._safe)
        self._done = number + 1
        return [reply for _, reply in turns]

    def busy(self) -> frozenset[int]:
        """See `Engine.busy`: all clients of a node that is late."""
        return frozenset(i for node in self._overdue for i in self._roster[node])

    def asked(self, cohort: Sequence[int]) -> Sequence[int]:
        """See `Engine.asked`."""
        return [i for i in cohort if i in self._asked]

    def _member(self, i: int, slot: int, number: int) -> Assignment:
        return Assignment(client=i, slot=slot, base=self.turns.base(i, number), keep=self.turns.base(i, self._safe))

    def _by_node(self, cohort: Sequence[int], rounds: int) -> dict[str, list[int]]:
        """Places in the cohort by node, for the nodes that are there; waits while there are none. `rounds`, this one included."""
        until = time.monotonic() + self._call.deadline_s
        wanted = {self._node_of[i] for i in cohort}
        while not (here := wanted & set(self._link.nodes())) and wanted and time.monotonic() < until:
            time.sleep(WAIT_S)
        for node in sorted(wanted - here):
            self._tell(f"round {rounds}: {node} is not there")
        return {node: [slot for slot, i in enumerate(cohort) if self._node_of[i] == node] for node in sorted(here)}

    def _answers(self, requests: Mapping[str, bytes], late_s: float = 0.0) -> dict[str, bytes | LostNode]:
        """What the nodes answered, in the order of the requests; without those who may still do so."""
        if not requests:
            return {}
        found = self._link.exchange(requests, self._call.deadline_s, late_s)
        if late_s:
            for node in requests.keys() - found.keys():
                self._tell(f"{node}: still at work after {self._call.deadline_s:g} s")
            return {node: found[node] for node in requests if node in found}
        return {node: found.get(node, LostNode("no answer")) for node in requests}

    def _late_answers(self, wait: bool) -> Mapping[str, bytes | LostNode]:
        """What came of nodes that are late; `wait`: for one of them, as there is nobody else to wait for."""
        until = time.monotonic() + self._call.deadline_s
        while self._overdue:
            if (found := self._link.late()) or not wait or time.monotonic() > until:
                return found
            time.sleep(WAIT_S)
        return {}

    def _letters(self, answers: Mapping[str, bytes | LostNode], kind: type[H]) -> Iterable[tuple[str, Letter]]:
        """The answers of the right kind; the others are reported."""
        for node, answer in answers.items():
            try:
                if isinstance(answer, LostNode):
                    raise WireError(answer.reason)
                letter = open_envelope(answer)
                if isinstance(letter.header, NodeFailure):
                    raise WireError(letter.header.reason)
                if not isinstance(letter.header, kind):
                    raise WireError(f"an answer of another kind ({letter.header.kind})")
            except WireError as error:
                self._tell(f"{node}: {error}")
                continue
            for note in getattr(letter.header, "notes", ()):
                self._tell(f"{node}: {note}")
            yield node, letter

    def _replies(self, node: str, letter: Letter, errand: Errand) -> Iterable[Reply]:
        """The turns of a node's answer that were asked for; what their uplinks hold is looked at where all engines' are."""
        left, where = dict(errand.clients), f"{node}: round {errand.number + 1}"
        for turn in letter.header.turns:
            try:
                if left.pop(turn.slot, None) != turn.client:
                    raise WireError("nobody asked for this turn")
                self._check(turn)
                yield _reply(letter, turn)
            except WireError as error:
                self._tell(f"{where}, client {turn.client}: {error}")
        for i in left.values():
            self._tell(f"{where}, client {i}: its turn is missing")

    def _check(self, turn: Turned) -> None:
        """Raise WireError for what cannot have come of a turn."""
        if turn.failure:
            raise WireError(turn.failure)
        n_rows, phases = self.problem.data.n_train(turn.client), self.problem.method.phases()
        # its share of the mean; of a node with rows of its own that was away at the start none are known
        if turn.examples < 1 or (n_rows and turn.examples != n_rows):
            raise WireError(f"it says that it trained on {turn.examples} rows, and has {n_rows or 'some'}")
        known = {phase.name for phase in phases} | {train.name for train in trains_of(phases)}
        of_logs = {name.partition(".")[0] for name in turn.logs}
        if strange := {*turn.steps, *turn.phase_seconds, *of_logs} - known:
            raise WireError(f"it tells of '{min(strange)}', which is none of the method's phases")

    def score(
        self, number: int, down: Downlink, clients: Sequence[int], asks: Sequence[ScoreRequest]
    ) -> list[dict[str, Score]]:
        """See `Engine.score`. Clients that cannot be asked count no rows."""
        n_classes = self.problem.task.n_classes
        found = {i: {ask.name: none(n_classes) for ask in asks} for i in clients}
        questions = [Question(name=ask.name, rows=ask.rows, fitted=ask.fitted) for ask in asks]  # type: ignore[arg-type]
        requests, asked = {}, {}
        for node, places in self._by_node(clients, number).items():
            asked[node] = [clients[place] for place in places]
            members = [self._member(i, place, number) for i, place in zip(asked[node], places, strict=True)]
            header = ScoreMessage(call=self._call, number=number, members=members, questions=questions)
            requests[node] = seal(header, {"common": down.common})
        for node, letter in self._letters(self._answers(requests), Scored):
            for i in asked[node]:
                try:
                    mine = letter.header.scores[str(i)]
                    found[i] = {ask.name: mine[ask.name].score(self._most_rows(ask, i)) for ask in asks}
                except (KeyError, WireError) as error:
                    reason = error if isinstance(error, WireError) else "its scores are missing"
                    self._tell(f"{node}: scores of client {i}: {reason}")
        return [found[i] for i in clients]

    def _most_rows(self, ask: ScoreRequest, i: int) -> npt.NDArray[np.int64]:
        """How many rows of each class client `i` can have been asked about; of a node that was away at the start nothing is known."""
        data = self.problem.data
        if not data.n_train(i):
            return np.full(data.n_classes, np.iinfo(np.int64).max)
        rows: npt.NDArray[np.int64] = self._rows[ask.rows][0 if ask.rows == "common" else i]
        return rows

    @cached_property
    def _rows(self) -> dict[str, npt.NDArray[np.int64]]:
        """Rows per class, by split; one line per client."""
        data = self.problem.data
        labels, n_classes = data.dataset.labels, data.n_classes
        own = {split: data.partition.counts(labels, n_classes, split) for split in ("valid", "test")}
        return own | {"common": np.bincount(labels[data.partition.common], minlength=n_classes)[None]}

    def score_server(self, down: Downlink) -> Score:
        """See `Engine.score_server`: here, on the rows that the server holds."""
        return self._local.score_server(down)

    def client(self, i: int) -> Client:
        """Refused: states of clients never leave their device."""
        raise ConfigError(f"client {i} lives on {self._node_of[i]}; what it keeps never leaves that device")

    def personal(self, number: int, down: Downlink, i: int) -> tuple[Modules, Client, Tree]:
        """Refused, like `client`."""
        raise ConfigError(f"client {i}'s model lives on {self._node_of[i]}; it never leaves that device")

    def changed(self) -> Iterable[int]:
        """Nobody: checkpoints hold no states of clients, which stay on the devices; from now on older ones are not needed."""
        self._pending = self._done
        return ()

    def restore(self, i: int, client: Client) -> None:
        """Refused, like `client`: this run began on another engine."""
        raise RunFolderError("this run's checkpoint holds clients' states: it was not made on devices")

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
