"""The runs of a tuning, one for each setting and seed, and their validation scores.

A run that is finished, or has reached the rounds that it is given, is never repeated. A run that fails because of its hyper-parameters is
recorded, and does not end the tuning. Test examples are scored in the runs, but nothing here reads these scores.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from fedloom.config.settings import Values
from fedloom.errors import DivergedError, NoValidUplinkError, first_line
from fedloom.experiment.loop import GivenObjects, OnRound
from fedloom.experiment.manifest import MANIFEST, read_manifest
from fedloom.experiment.metrics import NOTHING_LEARNT, nothing_learnt
from fedloom.experiment.run_folder import RunFolder
from fedloom.objectives import Metric
from fedloom.tools.compare import PlannedRun, prepared
from fedloom.tools.compare_rows import Row
from fedloom.tools.tuning.plan import Tuning

FAILED = "failed.json"
OnRun = Callable[[PlannedRun, int], OnRound | None]  # (a run, the round at which it ends or pauses), before it starts


@dataclass(kw_only=True)
class Tried:
    """One setting of a method, and its validation scores."""

    label: str
    values: Values  # of the hyper-parameters that are tuned
    rounds: int = 0  # rounds that it was given
    scores: dict[int, float] = field(default_factory=dict)  # by seed; a seed whose run failed has none
    failed: str = ""  # why the run of a seed has no score

    @property
    def mean(self) -> float | None:
        """The mean over seeds, on which the choice is made; None if a run failed."""
        return None if self.failed or not self.scores else statistics.fmean(self.scores.values())


class Cells:
    """The runs of a tuning: each setting with each seed, up to a given round."""

    def __init__(
        self,
        tuning: Tuning,
        folder: Path,
        parts: GivenObjects,
        *,
        on_run: OnRun | None = None,
        accept_changes: bool = False,
    ) -> None:
        assert parts.dataset is not None
        self.tuning, self.metric = tuning, parts.dataset.objective.primary
        self._folder, self._parts, self._on_run, self._accept = folder, parts, on_run, accept_changes
        file = folder / FAILED
        self._failed: dict[str, str] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    def score(self, tried: Tried, row: Row, until: int) -> None:
        """Run a setting with every seed up to round `until`, unless this is done, and set its scores."""
        tried.rounds, tried.scores = until, {}
        for seed in self.tuning.seeds:
            job = self.tuning.job(row, seed, self._folder)
            try:
                self._run(job, until)
                tried.scores[seed] = self._score(job, until)
            except _FailedError as error:
                tried.failed = str(error)

    def _run(self, job: PlannedRun, until: int) -> None:
        if job.folder.name in self._failed:
            raise _FailedError(self._failed[job.folder.name])
        pause = until if until < job.settings.rounds else None
        if job.finished or (pause and rounds_reached(job.folder) >= pause):
            return
        on_round = self._on_run(job, until) if self._on_run else None
        try:
            prepared(job, self._parts, self._accept).run(on_round, pause)
        except (DivergedError, NoValidUplinkError) as error:
            self._fail(job, first_line(error))

    def _score(self, job: PlannedRun, until: int) -> float:
        """Return the latest validation score up to a round."""
        run = RunFolder.open(job.folder)
        row = [row for row in run.rows() if row["round"] <= until][-1]
        if nothing_learnt({"rounds": row["round"], "skipped": row["skipped"]}):
            self._fail(job, NOTHING_LEARNT)
        value = row.get(f"valid_{self.metric.name}")
        if value is None:
            self._fail(job, "the validation score is undefined, because outputs are not finite")
        return float(value)

    def _fail(self, job: PlannedRun, reason: str) -> NoReturn:
        """Record that a run has no score, so that it is not repeated, and raise."""
        self._failed[job.folder.name] = reason
        RunFolder(self._folder).write_json(FAILED, self._failed)
        raise _FailedError(reason)

    def ranked(self, tried: Sequence[Tried]) -> list[Tried]:
        """Return the settings from best to worst; equal ones in their order, and those without a score last."""
        sign = -1 if self.metric.better == "higher" else 1
        return sorted(tried, key=lambda one: math.inf if one.mean is None else sign * one.mean)


class _FailedError(Exception):
    """A run without a score; the message is the reason."""


def rounds_reached(folder: Path) -> int:
    """Return the round of the newest checkpoint of a run, 0 if there is none."""
    found = read_manifest(folder / "checkpoint" / MANIFEST)
    return int(found["round"]) if found else 0


def best_of(tried: Sequence[Tried], metric: Metric) -> Tried | None:
    """Return the chosen setting: the best mean score among those that were given the most rounds; None if all failed."""
    sign = 1 if metric.better == "higher" else -1
    known = [(one.rounds, sign * one.mean, one) for one in tried if one.mean is not None]
    return max(known, key=lambda known: known[:2])[2] if known else None
