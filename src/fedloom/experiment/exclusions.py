"""Settings that exclude each other because of what a method does with uplinks. The table below contains all of these refusals.

docs/security.md contains the same table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from fedloom.combining.rules import Rule
from fedloom.config.settings import Settings, participation_range
from fedloom.errors import ConfigError
from fedloom.method import Method
from fedloom.wire.transforms import TopK, parse


class UplinkPlan(NamedTuple):
    """The settings that determine how the server combines uplinks."""

    settings: Settings
    method: Method
    max_cohort: int | None = None  # None: not known yet

    @property
    def rule(self) -> Rule | None:
        """The robust rule."""
        return self.settings.rule

    @property
    def private(self) -> bool:
        """Whether noise is added to the sum of uplinks."""
        return self.settings.privacy.on

    @property
    def least(self) -> int:
        """The size of the smallest cohort with which the rule keeps its guarantee."""
        return self.rule.cohort if self.rule else 1


class Exclusion(NamedTuple):
    """Two settings, or a setting and a property of the method, that exclude each other."""

    setting: str  # the setting with its key, as users write it
    other: str
    applies: Callable[[UplinkPlan], bool]
    reason: str  # may name the {method}, the {least} cohort of a rule, and the largest {cohort}


def _shares(method: Method) -> bool:
    return not method.pooled and bool(method.shared or method.also_travels)


def _has_range(settings: Settings) -> bool:
    low, high = participation_range(settings.participation)
    return settings.cohort is None and low < high


def _rule(plan: UplinkPlan, *names: str) -> bool:
    return plan.rule is not None and (not names or plan.rule.name in names)


def says_how_it_combines(method: type[Method]) -> bool:
    """Return whether a class that overrides `aggregate` also sets `combines`, or inherits both of them."""
    order = method.__mro__
    aggregates = next(place for place, cls in enumerate(order) if "aggregate" in vars(cls))
    return any("combines" in vars(cls) for cls in order[: aggregates + 1])


_CLOSING = "{method} has a final exchange (finish), in which the server uses each uplink; use another method"
_NO_STATEMENT = (
    "{method} overrides aggregate, but does not state what it needs of the uplinks;"
    ' set combines to "mean", "sums" or "individual" in the class'
)
EXCLUSIONS: tuple[Exclusion, ...] = (
    Exclusion(
        "privacy.noise=Z",
        "methods that use each uplink individually (`combines`), such as FedMR",
        lambda plan: plan.private and plan.method.combines == "individual",
        "{method} uses each uplink individually, so there is no sum to which noise could be added; use another method",
    ),
    Exclusion(
        "privacy.noise=Z",
        "methods without a mean of several uplinks (Local, Centralised)",
        lambda plan: plan.private and not _shares(plan.method),
        "{method} has no uplinks to add up; use another method",
    ),
    Exclusion(
        "privacy.noise=Z",
        "methods that override `aggregate` without setting `combines`",
        lambda plan: plan.private and not says_how_it_combines(type(plan.method)),
        _NO_STATEMENT,
    ),
    Exclusion(
        "privacy.noise=Z",
        "methods that choose their own cohorts (`Method.cohort`), because epsilon holds for independent draws",
        lambda plan: plan.private and type(plan.method).cohort is not Method.cohort,
        "{method} chooses its own cohorts, but epsilon holds only for cohorts that are drawn independently; use another method",
    ),
    Exclusion(
        "privacy.noise=Z",
        "methods with a final exchange (`Method.finish`), in which the server uses each uplink",
        lambda plan: plan.private and type(plan.method).finish is not Method.finish,
        _CLOSING,
    ),
    Exclusion(
        "privacy.noise=Z",
        "`aggregate=RULE`, because a rule depends on all uplinks in a way that no noise covers",
        lambda plan: plan.private and _rule(plan),
        "the result of a rule can change by more than the noise covers; leave aggregate empty (privacy.clip bounds each client, too)",
    ),
    Exclusion(
        "privacy.noise=Z",
        "`screen.norm` and `screen.max_share`, because screening one client depends on the others",
        lambda plan: plan.private and bool(plan.settings.screen.norm or plan.settings.screen.max_share),
        "screening depends on the other clients in a way that no noise covers; set screen.norm=0 and leave screen.max_share empty",
    ),
    Exclusion(
        "privacy.noise=Z",
        "`devices.stragglers=late`, because a client in flight cannot be drawn",
        lambda plan: plan.private and plan.settings.devices.stragglers == "late",
        "clients in flight cannot be drawn, but epsilon holds only for independent draws; use stragglers=wait, drop or partial",
    ),
    Exclusion(
        "privacy.noise=Z",
        "`min_clients` above 1, because a skipped round reveals how many clients there were",
        lambda plan: plan.private and plan.settings.min_clients > 1,
        "a skipped round would reveal the size of the cohort; leave min_clients at 1",
    ),
    Exclusion(
        "privacy.noise=Z",
        "a range of `participation`, because the accountant needs one probability",
        lambda plan: plan.private and _has_range(plan.settings),
        "needs one probability with which a client is drawn; set participation to a number, or set cohort",
    ),
    Exclusion(
        "privacy.noise=Z",
        "`stop.patience`, because the round in which the run stops depends on scores without noise",
        lambda plan: plan.private and plan.settings.stop.patience is not None,
        "the round in which the run stops would depend on scores without noise; remove stop.patience",
    ),
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
        "methods that use each uplink individually (`combines`), such as FedMR",
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
        lambda plan: _rule(plan) and not _shares(plan.method),
        "{method} has no uplinks to combine; leave aggregate empty",
    ),
    Exclusion(
        "aggregate=RULE",
        "methods that override `aggregate` without setting `combines`",
        lambda plan: _rule(plan) and not says_how_it_combines(type(plan.method)),
        _NO_STATEMENT,
    ),
    Exclusion(
        "aggregate=RULE",
        "methods with a final exchange (`Method.finish`), in which the server uses each uplink",
        lambda plan: _rule(plan) and type(plan.method).finish is not Method.finish,
        _CLOSING,
    ),
    Exclusion(
        "aggregate=RULE",
        "`screen.max_share`, because all clients have the same weight",
        lambda plan: _rule(plan) and plan.settings.screen.max_share is not None,
        "gives all clients the same weight; leave screen.max_share empty",
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
    """Raise ConfigError for the first entry of the table that applies to the settings."""
    plan = UplinkPlan(settings, method, max_cohort)
    for one in EXCLUSIONS:
        if one.applies(plan):
            key = one.setting.partition("=")[0]
            reason = one.reason.format(method=settings.method.name, least=plan.least, cohort=max_cohort)
            raise ConfigError(f"{_words(settings, key)}: {reason}")


def _words(settings: Settings, key: str) -> str:
    value: object = settings
    if key == "privacy.noise" and settings.privacy.noise is None:
        key = "privacy.epsilon"
    for name in key.split("."):
        value = getattr(value, name)
    return f"{key}={','.join(value) if isinstance(value, tuple) else value}"
