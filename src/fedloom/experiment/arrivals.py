"""Select the uplinks that the server aggregates in a round. Handle lost, slow and busy devices, and late and invalid uplinks.

One round::

    roster    Choose the members that receive the downlink and run a local update. Busy clients (still at work, or with an uplink in
              flight) do not receive the downlink. Lost devices and dropped stragglers receive it, but run no local update.
    (the engine runs the local updates of all others)
    take      Check the replies. Reject invalid uplinks, and exclude clients that send them repeatedly. With `stragglers=late`, put the
              uplinks of slow clients in flight. Accept the uplinks that are on time and those in flight that are due, and compute
              their shares.

All random numbers depend only on (seed, round, client), so they are the same on every engine and after a resume.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

from fedloom.config.settings import Settings
from fedloom.engines import Problem, Reply
from fedloom.errors import ConfigError, WireError
from fedloom.experiment.screening import LARGEST_LOG, SPAN, STRIKES, Candidate, Screen, capped
from fedloom.experiment.uplink_check import LateUplink, UplinkCheck, late_uplink
from fedloom.method import Arrival, Downlink, Method
from fedloom.rng import Stream
from fedloom.tree import Tree

Row = dict[str, Any]


def slowdowns(settings: Settings, method: Method, n_clients: int) -> tuple[float, ...]:
    """Return each client's slowdown factor: `slowdown` for a fraction `slow` of the clients, chosen with the seed, and
    1 for all others.
    """
    devices = settings.devices
    n_slow = 0 if method.pooled else int(devices.slow * n_clients + 0.5)  # a pooled client is not a device
    slow = set(Stream(settings.seed, "slow").permutation(n_clients)[:n_slow].tolist())
    return tuple(devices.slowdown if i in slow else 1.0 for i in range(n_clients))


def check_min_clients(settings: Settings, max_cohort: int) -> None:
    """Raise ConfigError if no round can have `min_clients` uplinks."""
    least = settings.min_clients
    if least > max_cohort:
        raise ConfigError(f"min_clients={least}: must be at most {max_cohort}, the largest cohort")


class Participants(NamedTuple):
    """The members of the cohort that participate in a round, as positions in the cohort."""

    sent: list[int]  # members that receive the downlink
    working: list[int]  # members that run a local update


class RoundRequest(NamedTuple):
    """One round's downlink, and the clients that run a local update. A reply's slot is its index in `working`."""

    number: int
    cohort: Sequence[int]
    down: Downlink  # by position in the cohort; first encoded, then decoded by `Arrivals.take`
    working: Sequence[int]  # positions in the cohort of the members that run a local update


class AcceptedUplinks(NamedTuple):
    """The uplinks to aggregate, in the order of aggregation: those of this round in cohort order, then late ones, oldest first."""

    uplinks: list[Tree]
    arrivals: tuple[Arrival, ...]
    refused: frozenset[int]  # clients whose reply was rejected
    down: Downlink  # the decoded downlink of this round


class Arrivals:
    """The rules for arrivals in one experiment, its uplinks in flight, and its numbers of lost, late and rejected uplinks."""

    def __init__(self, problem: Problem, settings: Settings) -> None:
        self._problem, self._rules = problem, settings.devices
        self._min_clients = 0 if settings.privacy.on else settings.min_clients
        self._least, self._rule = settings.rule.least if settings.rule else 0, settings.aggregate
        self._check = UplinkCheck(problem)
        self.screen = Screen(problem, settings.screen)
        self._slowdown = slowdowns(settings, problem.method, problem.task.n_clients)
        self.flights: dict[
            int, LateUplink
        ] = {}  # uplinks in flight, by client; a device runs one local update at a time
        self._overdue: dict[
            int, RoundRequest
        ] = {}  # late clients on real devices, with the request that they are answering
        self.counts = {"lost": 0, "late": 0, "rejected": 0, "skipped": 0, "virtual_steps": 0.0}
        self.events: list[Row] = []  # events since the experiment last cleared this list

    def roster(self, number: int, cohort: Sequence[int], at_work: Collection[int] = ()) -> Participants:
        """Choose the members of the cohort that participate in round `number`.

        Excluded clients, clients `at_work` for an earlier round and clients with an uplink in flight do not receive the downlink. Lost
        devices and stragglers to be dropped receive the downlink, but run no local update.
        """
        members = [slot for slot, i in enumerate(cohort) if i not in self.screen.excluded]
        busy = [slot for slot in members if cohort[slot] in self.flights or cohort[slot] in at_work]
        sent = [slot for slot in members if slot not in busy]
        lost = [slot for slot in sent if self._is_lost(number, cohort[slot])]
        dropped = [slot for slot in sent if slot not in lost and self._is_late(cohort[slot], "drop")]
        self.note(number, "busy", [cohort[slot] for slot in busy])
        self.note(number, "lost", [cohort[slot] for slot in lost], reason="devices.dropout")
        self.note(number, "late", [cohort[slot] for slot in dropped], reason="dropped")
        return Participants(sent, [slot for slot in sent if slot not in lost and slot not in dropped])

    def take(self, now: RoundRequest, replies: Sequence[Reply], at_work: Collection[int] = ()) -> AcceptedUplinks:
        """Return the decoded uplinks to aggregate in this round, or none if fewer arrived than `min_clients` or the robust rule require.

        `now` is the request of this round. `replies` are encoded, and may answer earlier requests. Clients `at_work` may reply in a later
        round.
        """
        number, now = now.number, now._replace(down=self._problem.codec.arrived(now.down))
        requests = {now.cohort[slot]: now for slot in now.working} | self._overdue
        self._note_silent(number, requests, replies, at_work)
        self._pass_time([reply for reply in replies if requests[reply.client] is now])
        on_time, due, refused = self._sort(now, requests, replies)
        n_arrived = len(on_time) + len(due)
        if n_arrived < max(self._min_clients, self._least):
            needed = f"min_clients={self._min_clients}"
            if n_arrived >= self._min_clients:
                needed = f"aggregate={self._rule} needs {self._least}"
            self.note(number, "skipped", reason=f"{n_arrived} arrived, {needed}")
            return AcceptedUplinks([], (), refused, now.down)
        uplinks = [reply.uplink for reply in on_time] + [self._check.rebased(number, late, now.down) for late in due]
        equal = self._problem.method.equal_shares
        members = [(reply.client, reply.slot, 1 if equal else reply.examples, 0) for reply in on_time]
        members += [(late.client, late.slot, 1 if equal else late.examples, number - late.sent) for late in due]
        arrivals = _arrivals(members, self.screen.max_share(len(members)))
        return AcceptedUplinks(uplinks, arrivals, refused, now.down)

    def _note_silent(
        self, number: int, requests: Mapping[int, RoundRequest], replies: Sequence[Reply], at_work: Collection[int]
    ) -> None:
        """Record the clients that did not reply. Those that are still at work are overdue; all others are lost."""
        silent = requests.keys() - {reply.client for reply in replies}
        overdue = {i: requests[i] for i in sorted(silent) if i in at_work}
        self.note(number, "lost", sorted(silent - overdue.keys()), reason="no reply")
        self.note(number, "late", sorted(overdue.keys() - self._overdue.keys()), reason="still at work")
        self._overdue = overdue

    def _sort(
        self, now: RoundRequest, requests: Mapping[int, RoundRequest], replies: Sequence[Reply]
    ) -> tuple[list[Reply], list[LateUplink], frozenset[int]]:
        """Return the valid replies that are on time, the late uplinks that are due in this round, and the rejected clients.

        With `stragglers=late`, valid replies of slow clients are put in flight instead.
        """
        on_time, due, late = list[Reply](), self._due(now.number), list[int]()
        opened, refused = self._opened(now.number, requests, replies)
        for request, reply in opened:
            if request is not now:
                due.append(late_uplink(request.number, reply, request.down))
            elif self._is_late(reply.client, "late"):
                self.flights[reply.client] = late_uplink(now.number, reply, now.down)
                late.append(reply.client)
            else:
                on_time.append(reply)
        due.sort(key=lambda uplink: (uplink.sent, uplink.slot))
        self.note(now.number, "landed", [u.client for u in due], sent=[u.sent + 1 for u in due])
        self.note(now.number, "late", late, reason=f"{self._age} rounds")
        return on_time, due, refused

    def _opened(
        self, number: int, requests: Mapping[int, RoundRequest], replies: Sequence[Reply]
    ) -> tuple[list[tuple[RoundRequest, Reply]], frozenset[int]]:
        """Return the valid replies, decoded, with the requests that they answer, and the rejected clients."""
        opened, reasons = list[tuple[RoundRequest, Reply]](), dict[int, str]()
        for reply in replies:
            request = requests[reply.client]
            reply = replace(reply, slot=request.working[reply.slot])
            try:
                reply = replace(reply, uplink=self._check.opened(request.number, reply, request.down))
                opened.append((request, reply))
            except WireError as error:
                reasons[reply.client] = str(error)
        reasons |= self.screen.faults(
            [Candidate(r.client, r.examples, r.uplink, request.down.to(r.slot)) for request, r in opened]
        )
        for reply in replies:
            if reply.client in reasons:
                self.note(number, "rejected", [reply.client], reason=reasons[reply.client])
        if len(reasons) < len(replies) or len(replies) == 1:  # otherwise the server's state may be the cause
            self.note(
                number,
                "excluded",
                self.screen.strike(number, reasons),
                reason=f"{STRIKES} of their uplinks were rejected within {SPAN} rounds",
            )
        return [pair for pair in opened if pair[1].client not in reasons], frozenset(reasons)

    def without_bad_logs(self, number: int, replies: Sequence[Reply]) -> list[Reply]:
        """Return the replies without those logs that cannot be averaged, and record the removed logs."""
        found = []
        for reply in replies:
            bad = self.screen.bad_logs(reply.logs)
            found.append(replace(reply, logs={k: v for k, v in reply.logs.items() if k not in bad}) if bad else reply)
            reason = f"'{bad[0]}' is not finite, or above {LARGEST_LOG:g}" if bad else ""
            self.note(number, "unusable log", [reply.client] if bad else [], reason=reason)
        return found

    @property
    def _age(self) -> int:
        """The number of rounds until a slow client's uplink arrives.

        A round lasts as long as a local update on a device of normal speed.
        """
        return math.ceil(self._rules.slowdown) - 1

    def _is_lost(self, number: int, i: int) -> bool:
        if self._problem.method.pooled or not self._rules.dropout:
            return False
        return bool(Stream(self._problem.seed, "lost", number, i).numpy.random() < self._rules.dropout)

    def _is_late(self, i: int, rule: str) -> bool:
        return self._rules.stragglers == rule and self._slowdown[i] > 1

    def _pass_time(self, replies: Sequence[Reply]) -> None:
        """Add the longest local update to the virtual time, in steps.

        The server does not wait for uplinks that arrive in a later round.
        """
        waits = self._rules.stragglers in ("wait", "partial")
        turns = [sum(r.steps.values()) * (self._slowdown[r.client] if waits else 1.0) for r in replies]
        self.counts["virtual_steps"] += max(turns, default=0.0)

    def _due(self, number: int) -> list[LateUplink]:
        """Remove and return the uplinks in flight that arrive in round `number`."""
        due = [late for late in self.flights.values() if late.sent + self._age <= number]
        for late in due:
            del self.flights[late.client]
        return due

    def note(self, number: int, event: str, clients: Sequence[int] | None = None, **facts: Any) -> None:
        """Record an event of round `number`, unless `clients` is empty."""
        if clients is not None and not clients:
            return
        if event in self.counts:
            self.counts[event] += 1 if clients is None else len(clients)
        affected = {} if clients is None else {"clients": list(clients)}
        self.events.append({"round": number + 1, "event": event, **affected, **facts})

    # resuming

    def state(self) -> Row:
        """Return the state for the checkpoint, without the messages in flight."""
        flights = [asdict(replace(flight, message={})) for flight in self.flights.values()]
        screen = {"screen": self.screen.state()} if self.screen.on else {}
        return {"counts": self.counts, "flights": flights, **screen}

    def restore(self, state: Mapping[str, Any], messages: Mapping[int, Tree]) -> None:
        """Restore an earlier result of `state`. `messages` contains the uplinks in flight, by client."""
        self.counts |= state.get("counts", {})
        self.screen.restore(state.get("screen", {}))
        flights = [LateUplink(**flight) for flight in state.get("flights", ())]
        self.flights = {f.client: replace(f, message=messages.get(f.client, {})) for f in flights}


def _arrivals(members: Sequence[tuple[int, int, int, int]], max_share: float) -> tuple[Arrival, ...]:
    """Return arrivals for tuples `(client, slot, weight, age)`.

    Shares are proportional to weight / sqrt(1 + age), are at most `max_share`, and sum to 1.
    """
    weights = [weight if age == 0 else weight / math.sqrt(1 + age) for _, _, weight, age in members]
    weights = capped(weights, max_share)
    whole = sum(weights)
    return tuple(Arrival(i, slot, w / whole, age) for (i, slot, _, age), w in zip(members, weights, strict=True))
