"""The runs of a tuning, one for each candidate and seed, and their validation scores.

A run that is finished, or that has reached its given number of rounds, is never repeated. If a run fails because of its hyper-parameters,
the failure is recorded, and the tuning continues. The runs also score test examples, but this module does not read these scores.
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
OnRun = Callable[[PlannedRun, int], OnRound | None]  # called before a run, with the round at which it ends or pauses


@dataclass(kw_only=True)
class Tried:
    """A candidate of a method, and its validation scores."""

    label: str
    values: Values  # of the hyper-parameters that are tuned
    rounds: int = 0  # number of rounds that it was allowed to run
    scores: dict[int, float] = field(default_factory=dict)  # by seed; there is no score if the run failed
    failed: str = ""  # the reason why a seed has no score

    @property
    def mean(self) -> float | None:
        """The mean score over seeds, by which candidates are ranked, or None if a run failed."""
        return None if self.failed or not self.scores else statistics.fmean(self.scores.values())


class Cells:
    """The runs of a tuning, with one run for each candidate and seed. Each run ends or pauses at a given round."""

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
        """Run a candidate with every seed up to round `until`, and set its scores. Runs that have reached this round are not repeated."""
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
        """Return the validation score of the latest scored round that is not after `until`."""
        run = RunFolder.open(job.folder)
        row = [row for row in run.rows() if row["round"] <= until][-1]
        if nothing_learnt({"rounds": row["round"], "skipped": row["skipped"]}):
            self._fail(job, NOTHING_LEARNT)
        value = row.get(f"valid_{self.metric.name}")
        if value is None:
            self._fail(job, "the validation score is undefined, because outputs are not finite")
        return float(value)

    def _fail(self, job: PlannedRun, reason: str) -> NoReturn:
        """Record that a run has no score, so that it is not repeated, and raise _FailedError."""
        self._failed[job.folder.name] = reason
        RunFolder(self._folder).write_json(FAILED, self._failed)
        raise _FailedError(reason)

    def ranked(self, tried: Sequence[Tried]) -> list[Tried]:
        """Return the candidates from best to worst. Candidates with equal scores keep their order, and those without a score are last."""
        sign = -1 if self.metric.better == "higher" else 1
        return sorted(tried, key=lambda one: math.inf if one.mean is None else sign * one.mean)


class _FailedError(Exception):
    """A run has no score. The message states the reason."""


def rounds_reached(folder: Path) -> int:
    """Return the round of the newest checkpoint of a run, or 0 if there is none."""
    found = read_manifest(folder / "checkpoint" / MANIFEST)
    return int(found["round"]) if found else 0


def best_of(tried: Sequence[Tried], metric: Metric) -> Tried | None:
    """Return the candidate with the best mean score among those with the most rounds, or None if all candidates failed."""
    sign = 1 if metric.better == "higher" else -1
    known = [(one.rounds, sign * one.mean, one) for one in tried if one.mean is not None]
    return max(known, key=lambda known: known[:2])[2] if known else None
