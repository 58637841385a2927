"""What reaches the server in a round, and what it takes in: devices that are lost or slow, uplinks that are late or wrong.

A round, seen from here::

    roster    who of the cohort is sent the downlink, and whose work counts        (devices that are lost, busy, or dropped)
    screen    uplinks of the wrong form, or with numbers that are not finite, are rejected
    take      late uplinks go on their way, those that are due are folded in, shares are worked out

Every draw depends on (seed, round, client) alone: the same on every engine, and after an interruption.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch

from fedloom import tree
from fedloom.config.settings import Settings
from fedloom.engines import Problem, Reply
from fedloom.errors import ConfigError, DivergedError, WireError
from fedloom.experiment.uplink_forms import UplinkForm, UplinkForms
from fedloom.method import Arrival, Downlink, Method
from fedloom.nets import without_negative_variances
from fedloom.rng import Stream
from fedloom.tree import Tree
from fedloom.wire.messages import check_structure

Row = dict[str, Any]


def slowdowns(settings: Settings, method: Method, n_clients: int) -> tuple[float, ...]:
    """Each client's factor: `slowdown` for the slow part of them, drawn once from the seed, and 1 for the others."""
    devices = settings.devices
    n_slow = 0 if method.pooled else int(devices.slow * n_clients + 0.5)  # no device holds everybody's rows
    slow = set(Stream(settings.seed, "slow").permutation(n_clients)[:n_slow].tolist())
    return tuple(devices.slowdown if i in slow else 1.0 for i in range(n_clients))


def check_stragglers(settings: Settings, method: Method) -> None:
    """Raise ConfigError if the method cannot do with late uplinks what the settings say."""
    if settings.devices.stragglers == "late" and not method.accepts_late:
        raise ConfigError(
            f"devices.stragglers=late: {settings.method.name} cannot take in late uplinks; use wait, drop or partial"
        )


def check_rules(settings: Settings, method: Method, max_cohort: int) -> None:
    """Raise ConfigError for rules that this method or this federation can never follow."""
    check_stragglers(settings, method)
    least = settings.min_clients
    if least > max_cohort:
        raise ConfigError(f"min_clients={least}: a cohort has {max_cohort} members at most")


class Participants(NamedTuple):
    """Places in the cohort."""

    sent: list[int]  # those who are sent the downlink
    working: list[int]  # those whose turn is run


@dataclass(frozen=True, kw_only=True)
class LateUplink:
    """An uplink under way."""

    client: int
    slot: int
    examples: int
    sent: int  # the round of its downlink
    message: Tree  # the uplink; in place of its weights, what they gained over those of the downlink


class RoundRequest(NamedTuple):
    """What clients were asked in a round. A reply's slot is its place among those who work."""

    number: int
    cohort: Sequence[int]
    down: Downlink  # by place in the cohort; as it is sent, and once taken note of, as it arrives
    working: Sequence[int]  # places in the cohort


class AcceptedUplinks(NamedTuple):
    """What the server aggregates, in the order in which it does."""

    uplinks: list[Tree]
    arrivals: tuple[Arrival, ...]
    refused: frozenset[int]  # clients whose reply is not taken in, now or later


class Arrivals:
    """The rules of one experiment, the uplinks under way, and counts of what did not go as it should."""

    def __init__(self, problem: Problem, settings: Settings) -> None:
        self._problem, self._rules = problem, settings.devices
        self._min_clients = settings.min_clients
        self._screen = UplinkCheck(problem)
        self._slowdown = slowdowns(settings, problem.method, problem.task.n_clients)
        self.flights: dict[int, LateUplink] = {}  # by client: a device does one turn at a time
        self._overdue: dict[int, RoundRequest] = {}  # clients whose devices really are late, which nobody simulates
        self.counts = {"lost": 0, "late": 0, "rejected": 0, "skipped": 0, "virtual_steps": 0.0}
        self.events: list[Row] = []  # since they were last taken away

    def roster(self, number: int, cohort: Sequence[int], at_work: Collection[int] = ()) -> Participants:
        """Who takes part: clients `at_work`, or whose uplink is still under way, are left alone; lost ones and stragglers do no work."""
        busy = [slot for slot, i in enumerate(cohort) if i in self.flights or i in at_work]
        sent = [slot for slot in range(len(cohort)) if slot not in busy]
        lost = [slot for slot in sent if self._is_lost(number, cohort[slot])]
        dropped = [slot for slot in sent if slot not in lost and self._is_late(cohort[slot], "drop")]
        self._note(number, "busy", [cohort[slot] for slot in busy])
        self._note(number, "lost", [cohort[slot] for slot in lost], reason="devices.dropout")
        self._note(number, "late", [cohort[slot] for slot in dropped], reason="dropped")
        return Participants(sent, [slot for slot in sent if slot not in lost and slot not in dropped])

    def take(self, now: RoundRequest, replies: Sequence[Reply], at_work: Collection[int] = ()) -> AcceptedUplinks:
        """What there is to aggregate, given what was asked in this round and the replies; nothing where too few arrived.

        `at_work`: clients whose reply may still come with a later round. Replies are as they travelled; what is taken is as the method
        wrote it.
        """
        now = now._replace(down=self._problem.codec.arrived(now.down))
        number, down = now.number, now.down
        asked = {now.cohort[slot]: now for slot in now.working} | self._overdue
        silent = asked.keys() - {reply.client for reply in replies}
        overdue = {i: asked[i] for i in sorted(silent) if i in at_work}
        self._note(number, "lost", sorted(silent - overdue.keys()), reason="no reply")
        self._note(number, "late", sorted(overdue.keys() - self._overdue.keys()), reason="still at work")
        self._overdue = overdue
        self._pass_time([reply for reply in replies if asked[reply.client] is now])
        fresh, landed, late, refused = list[Reply](), self._due(number), list[int](), set[int]()
        for reply in replies:
            then = asked[reply.client]
            reply = replace(reply, slot=then.working[reply.slot])
            try:
                reply = replace(reply, uplink=self._screen.opened(then.number, reply, then.down))
            except WireError as error:
                self._note(number, "rejected", [reply.client], reason=str(error))
                refused.add(reply.client)
                continue
            if then is not now:
                landed.append(_flight(then.number, reply, then.down))
            elif self._is_late(reply.client, "late"):
                self.flights[reply.client] = _flight(number, reply, down)
                late.append(reply.client)
            else:
                fresh.append(reply)
        landed.sort(key=lambda flight: (flight.sent, flight.slot))
        self._note(number, "landed", [f.client for f in landed], sent=[f.sent + 1 for f in landed])
        self._note(number, "late", late, reason=f"{self._age} rounds")
        if len(fresh) + len(landed) < self._min_clients:
            reason = f"{len(fresh) + len(landed)} arrived, min_clients={self._min_clients}"
            self._note(number, "skipped", reason=reason)
            return AcceptedUplinks([], (), frozenset(refused))
        uplinks = [reply.uplink for reply in fresh]
        uplinks += [self._screen.rebased(number, flight, down) for flight in landed]
        members = [(r.client, r.slot, r.examples, 0) for r in fresh]
        members += [(f.client, f.slot, f.examples, number - f.sent) for f in landed]
        return AcceptedUplinks(uplinks, _arrivals(members), frozenset(refused))

    @property
    def _age(self) -> int:
        """Rounds after which a slow client's uplink arrives: a round lasts as long as its turn on a device of normal speed."""
        return math.ceil(self._rules.slowdown) - 1

    def _is_lost(self, number: int, i: int) -> bool:
        if self._problem.method.pooled or not self._rules.dropout:
            return False
        return bool(Stream(self._problem.seed, "lost", number, i).numpy.random() < self._rules.dropout)

    def _is_late(self, i: int, rule: str) -> bool:
        return self._rules.stragglers == rule and self._slowdown[i] > 1

    def _pass_time(self, replies: Sequence[Reply]) -> None:
        """The server waits for the longest turn; it does not wait for uplinks that come in a later round."""
        waits = self._rules.stragglers in ("wait", "partial")
        turns = [sum(r.steps.values()) * (self._slowdown[r.client] if waits else 1.0) for r in replies]
        self.counts["virtual_steps"] += max(turns, default=0.0)

    def _due(self, number: int) -> list[LateUplink]:
        """Take the uplinks that are due off their way."""
        due = [flight for flight in self.flights.values() if flight.sent + self._age <= number]
        for flight in due:
            del self.flights[flight.client]
        return due

    def _note(self, number: int, event: str, clients: Sequence[int] | None = None, **facts: Any) -> None:
        """Note an event of round `number`; nothing where it befell nobody."""
        if clients is not None and not clients:
            return
        if event in self.counts:
            self.counts[event] += 1 if clients is None else len(clients)
        whom = {} if clients is None else {"clients": list(clients)}
        self.events.append({"round": number + 1, "event": event, **whom, **facts})

    # resuming

    def state(self) -> Row:
        """For the checkpoint, without the messages under way."""
        flights = [asdict(replace(flight, message={})) for flight in self.flights.values()]
        return {"counts": self.counts, "flights": flights}

    def restore(self, state: Mapping[str, Any], messages: Mapping[int, Tree]) -> None:
        """Put back what `state` gave, and the messages under way by client."""
        self.counts |= state.get("counts", {})
        flights = [LateUplink(**flight) for flight in state.get("flights", ())]
        self.flights = {f.client: replace(f, message=messages.get(f.client, {})) for f in flights}


class UplinkCheck:
    """Tells uplinks that can be aggregated from those that cannot."""

    def __init__(self, problem: Problem) -> None:
        self._problem, self._forms = problem, UplinkForms(problem)

    def opened(self, number: int, reply: Reply, down: Downlink) -> Tree:
        """The uplink as the method wrote it.

        Raises:
            WireError: why it cannot be aggregated.
        """
        if reply.examples < 1:
            raise WireError(f"examples={reply.examples}: must be at least 1")
        received = down.to(reply.slot)
        form = self._forms.of(number, reply.client, received)
        self._check_form(reply.uplink, form)
        # with branches that hold no tensors, which a device may have left out
        whole = tree.merge(form.travels, reply.uplink)
        uplink = self._problem.codec.opened(whole, received)
        known = reply.is_finite and not self._problem.codec.uplink
        broken = "" if known else tree.not_finite(uplink) or reply.diverged
        if broken:
            raise WireError(f"'{broken}' is not finite")
        return uplink

    def _check_form(self, uplink: Tree, form: UplinkForm) -> None:
        got, want = tree.structure(uplink), dict(form.structure)
        if got.keys() != want.keys():
            check_structure(dict.fromkeys(got), dict.fromkeys(want))
        for path, length in self._problem.method.ragged(uplink).items():
            for place in want.keys() & {path, f"{path}/int8"}:
                shape, dtype = want[place]
                want[place] = (length, *shape[1:]), dtype
        check_structure(got, want)

    def rebased(self, number: int, flight: LateUplink, down: Downlink) -> Tree:
        """A late uplink as if its client had started from the weights that the server holds now."""
        template = self._forms.of(number, flight.client, down.common).uplink
        message = tree.merge(template, flight.message)  # branches without tensors are lost in a checkpoint
        weights = tree.map_tree(torch.add, message["weights"], down.common["weights"])
        return {**message, "weights": without_negative_variances(weights)}


def require_finite(server: Tree, number: int, last: int) -> None:
    """Raise DivergedError if the server's state after round `number` is not finite; `last`: the checkpoint's rounds, 0 for none."""
    broken = tree.not_finite(server)
    if broken:
        kept = f"the checkpoint of round {last} is as it was" if last else "there is no checkpoint yet"
        raise DivergedError(
            f"round {number + 1}: the server's '{broken}' is not finite after aggregation; {kept}; try a smaller method.lr"
        )


def _flight(number: int, reply: Reply, down: Downlink) -> LateUplink:
    """An uplink on its way."""
    received = down.to(reply.slot)["weights"]
    gained = tree.map_tree(torch.sub, reply.uplink["weights"], received)
    rest = tree.clone({name: part for name, part in reply.uplink.items() if name != "weights"})
    return LateUplink(
        client=reply.client, slot=reply.slot, examples=reply.examples, sent=number, message={**rest, "weights": gained}
    )


def _arrivals(members: Sequence[tuple[int, int, int, int]]) -> tuple[Arrival, ...]:
    """`(client, slot, examples, age)` with shares: by examples, and by 1 / sqrt(1 + age) for those who are late; they sum to 1."""
    weights = [examples if age == 0 else examples / math.sqrt(1 + age) for _, _, examples, age in members]
    whole = sum(weights)
    return tuple(Arrival(i, slot, w / whole, age) for (i, slot, _, age), w in zip(members, weights, strict=True))
