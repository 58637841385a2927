"""Schedules of the learning rate over rounds, as one factor per round.

The factors are computed once and are part of `Task`, so all engines and devices use the same numbers. A factor depends only on the
settings and the number of the round, so a checkpoint does not contain it.
"""

from __future__ import annotations

import math

from fedloom.config.settings import ScheduleSettings


def lr_scales(schedule: ScheduleSettings, rounds: int) -> tuple[float, ...]:
    """Return the factor (0 to 1) on the learning rates in each of `rounds` rounds. An empty tuple means 1 in all rounds."""
    if schedule == ScheduleSettings():
        return ()
    return tuple(_warmed_up(schedule, number) * _planned(schedule, number, rounds) for number in range(rounds))


def _warmed_up(schedule: ScheduleSettings, number: int) -> float:
    """Return the factor of the warm-up: (number + 1) / (warmup + 1) in the rounds of the warm-up, and 1 after them."""
    return min((number + 1) / (schedule.warmup + 1), 1.0)


def _planned(schedule: ScheduleSettings, number: int, rounds: int) -> float:
    """Return the factor without the warm-up."""
    if schedule.name == "step":
        drops = number // schedule.every if schedule.every else sum(place <= number for place in schedule.at)
        return schedule.factor**drops
    if schedule.name == "cosine" and number >= schedule.warmup:
        passed = (number - schedule.warmup) / (rounds - schedule.warmup)
        return schedule.floor + (1 - schedule.floor) * (1 + math.cos(math.pi * passed)) / 2
    return 1.0
