"""Which settings exclude each other because of what a method does with uplinks. All of these refusals are in the table below.

docs/security.md shows the same table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from fedloom.combining.rules import Rule, parse_rule
from fedloom.config.settings import Settings
from fedloom.errors import ConfigError
from fedloom.method import Method
from fedloom.wire.transforms import TopK, parse


class UplinkPlan(NamedTuple):
    """What the server does with uplinks."""

    settings: Settings
    method: Method
    max_cohort: int | None = None  # None: not known yet

    @property
    def rule(self) -> Rule | None:
        """The robust rule."""
        return parse_rule(self.settings.aggregate) if self.settings.aggregate else None

    @property
    def least(self) -> int:
        """The smallest cohort with which the rule does what it promises."""
        return self.rule.cohort if self.rule else 1


class Exclusion(NamedTuple):
    """Two things that do not go together."""

    setting: str  # with its key, as users write it
    other: str
    applies: Callable[[UplinkPlan], bool]
    reason: str  # may name the {method}, the {least} cohort of a rule, and the largest {cohort}


def _rule(plan: UplinkPlan, *names: str) -> bool:
    return plan.rule is not None and (not names or plan.rule.name in names)


def says_how_it_combines(method: type[Method]) -> bool:
    """Return whether a class that overrides `aggregate` also sets `combines`, or inherits both."""
    order = method.__mro__
    aggregates = next(place for place, cls in enumerate(order) if "aggregate" in vars(cls))
    return any("combines" in vars(cls) for cls in order[: aggregates + 1])


EXCLUSIONS: tuple[Exclusion, ...] = (
    Exclusion(
        "devices.stragglers=late",
        "methods that cannot aggregate late uplinks (`accepts_late`)",
        lambda plan: plan.settings.devices.stragglers == "late" and not plan.method.accepts_late,
        "{method} cannot aggregate late uplinks; use wait, drop or partial",
    ),
    Exclusion(
        "uplink=TRANSFORM",
        "methods whose clients exchange parts of uplinks (`exchanges`)",
        lambda plan: bool(plan.settings.uplink) and plan.method.exchanges,
        (
            "{method} lets clients exchange parts of uplinks before the upload, so the server cannot"
            " determine the base of a difference; leave uplink empty"
        ),
    ),
    Exclusion(
        "aggregate=RULE",
        "methods that use each uplink individually (FedMR)",
        lambda plan: _rule(plan) and plan.method.combines == "individual",
        "{method} uses each uplink individually; set screen.norm, or use another method, such as fedavg",
    ),
    Exclusion(
        "aggregate=RULE",
        "methods that add up statistics by class (FedProto, FedVTC)",
        lambda plan: _rule(plan) and plan.method.combines == "sums",
        (
            "{method} adds up statistics of classes that only some clients have; set screen.norm and"
            " method.prototype_mean=uniform"
        ),
    ),
    Exclusion(
        "aggregate=RULE",
        "methods without a mean of several uplinks (Local, Centralised)",
        lambda plan: _rule(plan) and (plan.method.pooled or not (plan.method.shared or plan.method.also_travels)),
        "{method} has no uplinks to combine; leave aggregate empty",
    ),
    Exclusion(
        "aggregate=RULE",
        "methods that override `aggregate` without setting `combines`",
        lambda plan: _rule(plan) and not says_how_it_combines(type(plan.method)),
        (
            "{method} overrides aggregate, but does not state what it needs of the uplinks;"
            ' set combines to "mean", "sums" or "individual" in the class'
        ),
    ),
    Exclusion(
        "aggregate=krum:F, multikrum:F",
        "cohorts of fewer than 2 F + 3 clients",
        lambda plan: plan.max_cohort is not None and plan.max_cohort < plan.least,
        "needs {least} uplinks in a round, but the largest cohort is {cohort}; use another rule",
    ),
    Exclusion(
        "aggregate=median, trimmed:FRACTION",
        "uplink=topk:FRACTION, because most differences of a client are then 0, and so are their medians",
        lambda plan: _rule(plan, "median", "trimmed") and _sends_topk(plan.settings),
        "topk sends few differences of each client, so most medians are 0; use geometric, or no topk",
    ),
)  # fmt: skip


def _sends_topk(settings: Settings) -> bool:
    chains = parse(settings.uplink, "uplink")
    return any(isinstance(step, TopK) for chain in chains.values() for step in chain.steps)


def refuse_exclusions(settings: Settings, method: Method, max_cohort: int | None = None) -> None:
    """Raise ConfigError for the first two things in the settings that exclude each other."""
    plan = UplinkPlan(settings, method, max_cohort)
    for one in EXCLUSIONS:
        if one.applies(plan):
            key = one.setting.partition("=")[0]
            reason = one.reason.format(method=settings.method.name, least=plan.least, cohort=max_cohort)
            raise ConfigError(f"{_words(settings, key)}: {reason}")


def _words(settings: Settings, key: str) -> str:
    value: object = settings
    for name in key.split("."):
        value = getattr(value, name)
    return f"{key}={','.join(value) if isinstance(value, tuple) else value}"
