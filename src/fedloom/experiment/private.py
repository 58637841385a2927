"""Runs with client-level differential privacy: Poisson cohorts, noisy sums, and the privacy budget that they spend (docs/security.md)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedloom import tree
from fedloom.combining.additive import Additive
from fedloom.combining.budget import Releases, noise_for, require_accountant
from fedloom.combining.privacy import BUFFERS, PARAMETERS, NoisySum, group_of
from fedloom.config.settings import Settings, participation_range
from fedloom.engines import Problem
from fedloom.errors import ConfigError
from fedloom.experiment.combination import Combination, RobustCombination, received_by_all
from fedloom.experiment.exclusions import refuse_exclusions
from fedloom.experiment.uplink_forms import UplinkForms
from fedloom.method import Arrival, Downlink, Method, Round
from fedloom.nets import read_weights
from fedloom.rng import Stream
from fedloom.tree import Tree

log = logging.getLogger(__name__)
FEW_CLIENTS, LOUD = 50, 10.0  # with fewer clients, or more noise, a line warns at the start
UNCOVERED = (
    "scores and losses of clients (clients.parquet) and their means (metrics.jsonl)",
    "numbers of examples, steps and seconds (clients.parquet) and who took part (events.jsonl)",
    "the partition (partition.json)",
    "the choice of hyper-parameters by earlier runs",
)


def cohort_size(settings: Settings, n: int) -> int:
    """Return the size of the largest cohort of `n` clients or, with privacy, the expected size of a cohort."""
    return settings.cohort or max(int(participation_range(settings.participation)[1] * n + 1e-9), 1)


def with_noise(settings: Settings, method: Method, n: int) -> Settings:
    """Return the settings of a private run of `n` clients, with values for the noise and delta if they are not set."""
    p = settings.privacy
    if not p.on:
        return settings
    refuse_exclusions(settings, method)
    require_accountant()
    delta = p.delta or n**-1.1
    noise = p.noise
    if noise is None and p.epsilon is not None:
        noise = noise_for(p.epsilon, cohort_size(settings, n) / n, delta, settings.rounds)
    return settings.model_copy(update={"privacy": p.model_copy(update={"noise": noise, "delta": delta})})


def rounds_within_budget(settings: Settings, n: int) -> int:
    """Return the number of rounds that the privacy budget allows. Without a budget, all rounds are allowed.

    Raise ConfigError if the budget does not allow a single round.
    """
    p = settings.privacy
    if not p.on or p.epsilon is None:
        return settings.rounds
    allowed = _releases(settings, n).within(p.epsilon, settings.rounds)
    if not allowed:
        raise ConfigError(
            f"privacy.epsilon={p.epsilon:g}: privacy.noise={p.noise:g} spends more in the first round; use more noise, or a smaller cohort"
        )
    return allowed


def _releases(settings: Settings, n: int) -> Releases:
    p = settings.privacy
    return Releases(p.noise or 0.0, cohort_size(settings, n) / n, p.delta or n**-1.1)


def combination_of(settings: Settings, problem: Problem, downlink: Callable[[], Downlink]) -> Combination:
    """Return how the settings combine the uplinks of a round.

    `downlink` is a function that returns a message to a cohort of one client.
    """
    if settings.privacy.on:
        return PrivateCombination(settings, problem, downlink())
    return RobustCombination(problem.method, settings.rule) if settings.rule else Combination()


class PrivateCombination(Combination):
    """Replaces the uplinks by their noisy sum, which is divided by the expected size of a cohort."""

    always = True  # a round without uplinks releases noise, so that it does not reveal this fact
    shows_uplinks = False

    def __init__(self, settings: Settings, problem: Problem, down: Downlink) -> None:
        self._problem, self._n = problem, problem.task.n_clients
        self._forms = UplinkForms(problem)
        self._releases = _releases(settings, self._n)
        self._rounds, self._budget = settings.rounds, settings.privacy.epsilon or math.inf
        received = received_by_all(problem.method, problem.codec.arrived(problem.codec.send(down)))
        sums = problem.method.sums(self._template(0, received))
        self._sum = NoisySum(
            noise=self._releases.noise,
            bounds=_bounds(settings, sums),
            expected=cohort_size(settings, self._n),
            quantile=settings.privacy.adapt,
        )
        self._scale, self._released = 1.0, 0
        self._turns = [0] * self._n  # number of releases to which each client has contributed
        self._arrived = 0
        self._numbers = sum(leaf.numel() for leaf in tree.leaves(sums) if leaf.is_floating_point())

    def announce(self) -> None:
        """Log facts about a private run that may surprise users: little protection, little learning, fewer rounds, no server logs."""
        method, rounds = self._problem.method, self._problem.task.rounds
        if self._n < FEW_CLIENTS:
            log.warning(
                "privacy: a guarantee that may fail with probability 1/%d is weak for %d clients", self._n, self._n
            )
        if rounds < self._rounds:
            log.warning("privacy.epsilon=%g: allows %d rounds of %d", self._budget, rounds, self._rounds)
        ratio = self._sum.noise_to_bound(self._numbers)
        if ratio > LOUD:
            log.warning(
                "privacy: the noise of a round has %.0f times the norm that a client may have at most, so little can be learnt; "
                "use more clients in a round (about %d), or fewer shared parameters",
                ratio,
                math.ceil(self._sum.expected * ratio / LOUD),
            )
        if BUFFERS in self._sum.bounds:
            log.warning(
                "privacy: running statistics are shared with noise; set method.buffers=private, or use GroupNorm"
            )
        if type(method).server_logs is not Method.server_logs:
            log.warning("privacy: the server's logs compare uplinks, and are left out")

    def cohort(self, number: int) -> list[int]:
        """Return a Poisson sample: each client is drawn independently, with the same probability."""
        drawn = Stream(self._problem.seed, "poisson cohort", number).numpy.random(self._n) < self._releases.rate
        return [i for i, is_in in enumerate(drawn.tolist()) if is_in]

    def combined(self, uplinks: Sequence[Tree], round: Round, down: Downlink) -> tuple[Sequence[Tree], Round]:
        """Return one uplink, repeated as often as the expected size of a cohort."""
        m, received = self._sum.expected, received_by_all(self._problem.method, down)
        vectors = Additive(self._problem.method, uplinks, received, like=self._template(round.number, received))
        mean, self._scale = self._sum.release(vectors, self._scale, round.rng.child("privacy"))
        self._released += 1
        self._arrived = len(uplinks)
        for arrival in round.arrivals:
            self._turns[arrival.client] += 1
        anonymous = tuple(Arrival(client=-1, slot=slot, share=1 / m) for slot in range(m))
        return [vectors.stand_in(mean, m)] * m, replace(round, arrivals=anonymous, examples=())

    def _template(self, number: int, received: Tree) -> Tree:
        return self._forms.of(number, 0, received).uplink

    def events(self) -> list[dict[str, Any]]:
        """Return a line with the clipping norms of the next release, and the number of uplinks in this one."""
        return [{"event": "released", "arrived": self._arrived, "bounds": self._bounds_now()}]

    def _bounds_now(self) -> dict[str, float]:
        return {group: self._scale * bound for group, bound in self._sum.bounds.items()}

    def state(self) -> dict[str, Any]:
        """Return the scale of the clipping norms, and the budget that has been spent."""
        return {"privacy": {"scale": self._scale, "released": self._released, "turns": self._turns}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore an earlier result of `state`."""
        if saved := state.get("privacy"):
            self._scale, self._released, self._turns = saved["scale"], saved["released"], list(saved["turns"])

    def summary(self) -> dict[str, Any]:
        """Return the budget that was spent, for whom it holds, and what it does not cover."""
        spent = self._releases.epsilon(self._released), self._releases.epsilon_known(max(self._turns))
        epsilon, known = (value if math.isfinite(value) else None for value in spent)
        facts = {
            "unit": "client: either all of its contributions are included, or they are all zero",
            "protects": "the models of others and of the server" if self._has_private_state else "every model",
            "epsilon": epsilon,
            "epsilon_known_cohorts": known,
            "delta": self._releases.delta,
            "noise": self._releases.noise,
            "rate": self._releases.rate,
            "releases": self._released,
            "bounds": self._bounds_now(),
            "epsilon_holds_if": "the seed, events.jsonl and clients.parquet stay secret",
            "epsilon_known_cohorts_holds_if": "the seed stays secret, because the noise follows from it",
            "uncovered": list(UNCOVERED),
            "stopped": "privacy budget" if self._released < self._rounds else None,
        }
        return {"privacy": facts}

    @property
    def _has_private_state(self) -> bool:
        """Whether clients keep weights that the server does not have.

        The users of a client can learn about its data from these weights.
        """
        weights = read_weights(self._problem.modules(0))
        shared = self._problem.method.travelling(weights)
        return sum(map(len, weights.values())) > sum(map(len, shared.values()))


def _bounds(settings: Settings, sums: Tree) -> dict[str, float]:
    """Return the clipping norm of each group of tensors."""
    given = dict(settings.privacy.clips)
    groups = list(dict.fromkeys(group_of(path) for path, leaf in tree.flatten(sums) if leaf.is_floating_point()))
    if unknown := sorted(given.keys() - set(groups) | given.keys() & {PARAMETERS}):
        raise ConfigError(
            f"privacy.clips.{unknown[0]}: {settings.method.name} adds up {', '.join(groups)}; the norm of weights is privacy.clip"
        )
    bounds = {PARAMETERS: settings.privacy.clip, BUFFERS: 1.0} | given
    if missing := [group for group in groups if group not in bounds]:
        raise ConfigError(
            f"privacy.clips: {settings.method.name} also adds up {', '.join(missing)}; set the largest norm that a client may have, "
            f"such as privacy.clips.{missing[0]}=10"
        )
    return {group: bounds[group] for group in groups}
