"""One experiment: the round loop, scoring and records, which are the same for all methods and engines."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from torch import nn

from fedloom import accelerator, data, tree
from fedloom.config.parsing import read_toml
from fedloom.config.settings import Settings, make_method, make_settings, participation_range
from fedloom.data.hub_repository import file_name_of
from fedloom.engines import Engine, Problem, Reply
from fedloom.errors import ConfigError, RunFolderError
from fedloom.experiment import metrics
from fedloom.experiment.accounting import Accounting
from fedloom.experiment.arrivals import Arrivals, RoundRequest
from fedloom.experiment.build import (
    arithmetic,
    buffers_policy,
    engine_for,
    initial_weights,
    make_dataset,
    make_federation,
    make_problem,
    resolved,
    training_clients,
)
from fedloom.experiment.evaluation import Scores, Scoring
from fedloom.experiment.joining import join_newcomers
from fedloom.experiment.personal_model import PersonalModel
from fedloom.experiment.private import combination_of, rounds_within_budget, with_noise
from fedloom.experiment.resuming import check_longer, longer, refuse_damage, refuse_missing_objects, resumable
from fedloom.experiment.roll_back import RollBack
from fedloom.experiment.run_folder import RunFolder
from fedloom.experiment.saving import describe_run, extend_run, refuse_deployed, restore_run, save_run, write_summary
from fedloom.experiment.server_hooks import ServerSide
from fedloom.experiment.stopping import check_stopping, reason_to_stop
from fedloom.experiment.trackers import Tracker, check_trackers, make_trackers
from fedloom.experiment.uplink_check import require_finite
from fedloom.method import Downlink, Method, Round
from fedloom.rng import Stream
from fedloom.tree import Tree

Row = dict[str, Any]
OnRound = Callable[[int, int, Row], None]  # (completed rounds, rounds in total, the newest metrics)


@dataclass(frozen=True, kw_only=True)
class GivenObjects:
    """Python objects that replace those named in the settings."""

    method: Method | None = None
    dataset: data.Dataset | None = None
    model: nn.Module | Callable[..., nn.Module] | None = None
    partition: Any = None  # see `data.given_partition`
    federation: data.Federation | None = None  # replaces `dataset` and the partition (examples on devices)
    engine: Callable[[Problem], Engine] | None = None

    @property
    def names(self) -> set[str]:
        """Names of the settings that are passed as objects."""
        given = {"data": self.dataset, "model": self.model, "partition": self.partition}
        whole = {"data", "partition"} if self.federation is not None else set[str]()
        return whole | {name for name, value in given.items() if value is not None}


NOTHING = GivenObjects()


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """The result of one exchange with a cohort."""

    round: Round
    uplinks: Sequence[Tree]  # the uplinks to aggregate
    down: Downlink  # the downlink as decoded by the cohort
    replies: Sequence[Reply]
    refused: frozenset[int]  # clients whose reply was rejected
    reached: Mapping[int, Tree]  # the message that each client received


class Experiment:
    """A federation, a method and an engine, ready to run. All output goes into the experiment's folder."""

    def __init__(self, settings: Settings, parts: GivenObjects = NOTHING, folder: RunFolder | None = None) -> None:
        check_trackers(settings.log)
        if folder is None and settings.out:
            RunFolder.check_free(settings.out)
        with arithmetic(settings):
            dataset = parts.dataset
            if parts.federation is None:
                dataset = make_dataset(settings) if dataset is None else dataset
                settings = resolved(settings, dataset)
            self.settings = settings
            self.place = accelerator.place(settings.engine.device, settings.engine.device_bytes)
            self.method = parts.method or make_method(settings.method)
            self.data = parts.federation or make_federation(settings, dataset, parts.partition)
            self.partition = self.data.partition  # the original one, even if a reference method pools the examples
            if self.method.pooled:
                self.data = self.data.pooled()
            n = training_clients(settings, self.method, self.data)
            self.settings = settings = with_noise(settings, self.method, n)
            self.rounds = rounds_within_budget(settings, n)
            brief = settings.model_copy(update={"rounds": self.rounds})
            self.problem = make_problem(brief, self.method, self.data, parts.model)
            check_stopping(settings, self.method, self.partition)
            weights = initial_weights(self.problem)
            self.hooks = ServerSide(self.problem)
            self.server = self.hooks.init(weights)
            self.combination = combination_of(settings, self.problem, lambda: self.hooks.downlink(self.server, 0, [0]))
            self._buffers = buffers_policy(self.server, weights)
            self.engine: Engine = (parts.engine or partial(engine_for, settings, self.place))(self.problem)
        self.done = self.saved = 0  # completed rounds, and rounds in the latest checkpoint
        self.stopped: Row | None = None  # the reason for early stopping; `rounds` is then the last completed round
        self.rows: list[Row] = []
        self.client_rows: list[Row] = []
        self.ledger = Accounting(self.problem)
        self.intake = Arrivals(self.problem, settings)
        self.roll_back = RollBack(self.intake.screen.on)
        self._has_run = False
        try:
            self.scoring = Scoring(self.problem, settings, self.engine, self.partition)
            self.folder = self._open(folder)
            config = settings.model_dump(mode="json")
            self.trackers: list[Tracker] = make_trackers(settings.log, self.folder.path, config)
        except BaseException:
            self.engine.close()
            raise

    def _open(self, folder: RunFolder | None) -> RunFolder:
        """Create a new folder, or restore the state from the given one."""
        if folder is not None:
            restore_run(self, folder)
            return folder
        s = self.settings
        folder = RunFolder.create(s.out, f"{s.method.name.rpartition(':')[2]}-{file_name_of(s.data.name)}")
        folder.lock()
        describe_run(self, folder)
        return folder

    @classmethod
    def resume(
        cls,
        path: str | Path,
        parts: GivenObjects = NOTHING,
        accept_changes: bool = False,
        rounds: int | None = None,
    ) -> Experiment:
        """Resume a run from its latest checkpoint, or from the start if there is no checkpoint yet.

        `accept_changes` accepts other settings, versions or code, and records them (`fedloom.experiment.resuming`). `rounds` is a higher
        number of rounds, to which a finished run is extended.
        """
        with resumable(path, accept_changes, rounds) as folder:
            refuse_deployed(folder)
            before = make_settings(read_toml(folder.path / "config.toml"))
            settings = longer(before, rounds, path)
            refuse_missing_objects(path, settings, parts.names, "resume it there with the same objects, {call}")
            experiment = cls(settings, parts, folder)
            check_longer(experiment, before.rounds)
            if rounds is not None:
                extend_run(experiment, before.rounds)
            experiment.forget_unsaved()
        return experiment

    @classmethod
    def reopen(cls, path: str | Path, parts: GivenObjects = NOTHING) -> Experiment:
        """Load a finished or unfinished run from its latest checkpoint, for inspection. Its engine is sequential and uses the CPU.

        The files of the run do not change.
        """
        folder = RunFolder.open(Path(path))
        if not folder.has_checkpoint():
            raise RunFolderError(f"{path}: this run has no checkpoint (checkpoint_every=0, or it ended too early)")
        refuse_deployed(folder)
        if record := folder.newest_manifest():
            refuse_damage(folder, record)
        settings = make_settings(read_toml(folder.path / "config.toml"))
        refuse_missing_objects(
            path,
            settings,
            parts.names,
            "open it in Python with the same objects, fedloom.open(FOLDER, data=...)",
        )
        engine = settings.engine.model_copy(update={"name": "sequential", "device": "cpu"})
        return cls(settings.model_copy(update={"engine": engine, "log": ()}), parts, folder)

    def forget_unsaved(self) -> None:
        """Remove everything that was written to the folder after the latest checkpoint."""
        if not self.folder.has_checkpoint():  # the run may have stopped before its description was complete
            describe_run(self, self.folder)
        elif self.folder.resumption:
            self.folder.facts = self.folder.resumption.facts(self)
        self.folder.keep_rows(self.done)

    def run(self, on_round: OnRound | None = None, until: int | None = None) -> Row:
        """Run the remaining rounds and return the summary. An experiment can be run only once.

        If `until` is set, write a checkpoint after this round, from which `resume` continues, and return an empty summary.

        Raises:
            RunFolderError: the experiment has already been run. Its state may differ from the latest checkpoint, e.g. after a failed
                round.
        """
        if self._has_run:
            raise RunFolderError(
                f"{self.folder.path}: this experiment has already run; to continue it, resume its folder"
            )
        self._has_run = True
        try:
            self.combination.announce()
            with arithmetic(self.settings):
                while self.done < self.rounds:
                    if until is not None and self.done >= until:
                        return self._pause()
                    self.run_round(self.done)
                    if on_round:
                        on_round(self.done, self.rounds, self.rows[-1] if self.rows else {})
                return write_summary(self, self._buffers, join_newcomers(self, on_round))
        finally:
            self.engine.close()
            for tracker in self.trackers:
                tracker.close()
            self.folder.unlock()

    def _pause(self) -> Row:
        if self.saved < self.done:
            save_run(self)
        return {}

    # one round

    def run_round(self, number: int) -> None:
        """Run round `number`: send the downlink, train, aggregate and record. Evaluate and save if these are due."""
        started, before = time.perf_counter(), self.server
        done = self._exchange(number, self.draw_cohort(number))
        if done.uplinks or self.combination.always:
            self._aggregate(*self.combination.combined(done.uplinks, done.round, done.down))
            self.intake.events += [{"round": number + 1, **facts} for facts in self.combination.events()]
        elif len(done.replies) == len(done.refused) > 1 and self.roll_back.on:
            self._restore(number, "every uplink was rejected")
        self._record_round(number, done)
        self.roll_back.check(number, done.refused)
        self.done = number + 1
        last = self.done == self.rounds
        if last and self.hooks.finishes:
            self._finish()
        self.ledger.train_seconds += time.perf_counter() - started
        if last or self.done % self.settings.eval_every == 0:
            shown = done.uplinks and self.combination.shows_uplinks
            logs = self.hooks.logs(before, done.uplinks, done.round) if shown else {}
            valid = [reply for reply in done.replies if reply.client not in done.refused]
            self._evaluate(valid, len(done.uplinks), logs)
        every = self.settings.checkpoint_every
        if every and (self.done == self.rounds or self.done % every == 0):
            save_run(self)

    def _exchange(self, number: int, cohort: Sequence[int]) -> Exchange:
        """Send the downlink to a cohort, run its local updates, and collect the uplinks that the server accepts."""
        down = self.hooks.downlink(self.server, number, cohort)
        self.problem.codec.check_downlink(down)
        sent = self.problem.codec.send(down)
        members = self.intake.roster(number, cohort, self.engine.busy())
        replies = self._train(number, cohort, sent, members.working)
        accepted = self.intake.take(RoundRequest(number, cohort, sent, members.working), replies, self.engine.busy())
        round = self.hooks.round("server", number, accepted.arrivals)
        uplinks = self.hooks.exchange(accepted.uplinks, number, round.rng.child("exchange")) if accepted.uplinks else []
        working = [cohort[slot] for slot in members.working]
        absent = set(working).difference(self.engine.asked(working))
        return Exchange(
            round=round,
            uplinks=uplinks,
            down=accepted.down,
            replies=self.intake.without_bad_logs(number, replies),
            refused=accepted.refused,
            reached={cohort[slot]: sent.to(slot) for slot in members.sent if cohort[slot] not in absent},
        )

    def _finish(self) -> None:
        """Run the final exchange with all clients, and let the method compute its final server state.

        Its costs are added to the last round.
        """
        task = self.problem.task
        done = self._exchange(task.rounds, range(task.n_clients))
        if done.uplinks:
            server = self.hooks.finish(self.server, done.uplinks, done.round)
            require_finite(server, self.done, self.saved)
            self.server = tree.copy_shared(server, done.uplinks)
        self._record_round(task.rounds, done)

    def _aggregate(self, uplinks: Sequence[Tree], round: Round) -> None:
        """Replace the server's state by the aggregate. If the aggregate is not finite, roll back or raise DivergedError."""
        before, server = self.server, self.hooks.aggregate(self.server, uplinks, round)
        if self.roll_back.on and (broken := tree.not_finite(server)):
            self._restore(round.number, f"the server's '{broken}' was not finite after aggregation")
            return
        require_finite(server, round.number, self.saved)
        self.server = tree.copy_shared(server, uplinks)  # FedMR's slots share memory with the uplinks
        self.roll_back.keep(before)

    def _restore(self, number: int, reason: str) -> None:
        """Return to the server's state before the latest aggregation, and record the reason."""
        self.server = self.roll_back.restored(self.server)
        self.intake.note(number, "rolled back", reason=reason)

    def draw_cohort(self, number: int) -> Sequence[int]:
        """Choose the cohort of round `number`. The size of the cohort is random if `participation` is a range."""
        if (drawn := self.combination.cohort(number)) is not None:
            return drawn
        rng = Stream(self.settings.seed, "cohort", number)
        low, high = participation_range(self.settings.participation)
        fraction = low + (high - low) * float(rng.child("size").numpy.random())
        size = self.settings.cohort or max(int(fraction * self.problem.task.n_clients + 1e-9), 1)
        return self.hooks.cohort(self.server, number, size)

    def _train(self, number: int, cohort: Sequence[int], down: Downlink, working: Sequence[int]) -> list[Reply]:
        """Run the local updates of the members at the positions `working` of the cohort."""
        if not working and not self.engine.busy():
            return []
        theirs = Downlink(down.common, None if down.each is None else [down.each[slot] for slot in working])
        return self.engine.train(number, [cohort[slot] for slot in working], theirs)

    def _record_round(self, number: int, done: Exchange) -> None:
        """Record the events, bytes and local updates of a round. Those of the final exchange are added to the rows of the last round."""
        replies, refused, row = done.replies, done.refused, min(number + 1, self.rounds)
        for event in self.intake.events:
            self.folder.append(event, "events.jsonl")
        self.intake.events.clear()
        sent = {i: self.ledger.count("downlink", message) for i, message in done.reached.items()}
        replied = {reply.client for reply in replies}
        for i, n_bytes in sent.items():
            if i not in replied:
                self._add_client_row({"round": row, "client": i, "downlink_bytes": n_bytes})
        for reply in replies:
            flops = self.ledger.turn(reply, number, number < self.rounds and reply.client not in refused)
            relayed = 0  # exchanged parts pass through a relay: once up, and once down to another client
            if self.method.exchanges:
                relayed = self.ledger.count("uplink", reply.uplink, "exchange")
                self.ledger.count("downlink", reply.uplink, "exchange")
            self._add_client_row(
                {
                    "round": row,
                    "client": reply.client,
                    "examples": reply.examples,
                    "steps": sum(reply.steps.values()),
                    "uplink_bytes": self.ledger.count("uplink", reply.uplink) + relayed,
                    # the downlink of a late reply was counted in the round that sent it
                    "downlink_bytes": sent.get(reply.client, 0) + relayed,
                    "flops": flops,
                    "seconds": reply.seconds,
                    **{f"seconds.{phase}": seconds for phase, seconds in reply.phase_seconds.items()},
                    **reply.logs,
                }
            )

    def _add_client_row(self, row: Row) -> None:
        """Append a client's row of a round. If this round already has a row (final exchange), add the numbers to it."""
        latest = takewhile(lambda other: other["round"] == row["round"], reversed(self.client_rows))
        known = (
            next((other for other in latest if other["client"] == row["client"]), None)
            if self.done == self.rounds
            else None
        )
        if known is None:
            self.client_rows.append(row)
            return
        for name, value in row.items():
            summed = name in known and name not in ("round", "client", "examples")
            known[name] = known[name] + value if summed else value

    # scoring

    def _evaluate(self, replies: Sequence[Reply], n_arrived: int, server_logs: Mapping[str, float]) -> None:
        """Score the clients and the server, and write a row of metrics."""
        started = time.perf_counter()
        down, found = self._scores()
        if self.done < self.rounds and self._stops(found):
            if self.hooks.finishes:
                self._finish()
            down, found = self._scores()  # with the scores of a last round
        row: Row = {"round": self.done, **self.scoring.row(found, down, self.ledger.trained)}
        self.ledger.eval_seconds += time.perf_counter() - started
        row |= {f"{way}_bytes": self.ledger.total(way) for way in ("uplink", "downlink")}
        if "shared_head" in found and self.scoring.head:
            row["shared_head_bytes"] = self.scoring.head.uplink_bytes
        row |= {
            "cohort": n_arrived,
            **self.intake.counts,
            "train_seconds": self.ledger.train_seconds,
            "eval_seconds": self.ledger.eval_seconds,
        }
        row |= metrics.mean_logs(replies) | {f"server.{name}": value for name, value in server_logs.items()}
        self._record_scores(found)
        self.rows.append(row)
        self.folder.append(row)
        for tracker in self.trackers:
            tracker.log(self.done, row)

    def _scores(self) -> tuple[Downlink, Scores]:
        """Score the clients with the current state, and on the common test set if this is due. Return the downlink and the scores."""
        every = self.settings.eval.general_every
        general = self.done == self.rounds or bool(every and self.done % every == 0)
        down = self.hooks.deploy(self.server, self.done)
        return down, self.scoring.score(self.done, down, general)

    def _stops(self, found: Scores) -> bool:
        """Return whether the run ends early because of these scores. If so, make this round its last round."""
        rows = [*self.rows, {"round": self.done, **self.scoring.validation(found)}]
        self.stopped = reason_to_stop(rows, self.settings.stop, self.problem.task.objective.primary)
        if self.stopped:
            self.rounds = self.done
        return self.stopped is not None

    def _record_scores(self, found: Scores) -> None:
        """Add the scores to the clients' rows of this round."""
        latest = takewhile(lambda row: row["round"] == self.done, reversed(self.client_rows))
        now = {row["client"]: row for row in latest}
        for place, i in enumerate(self.scoring.clients):
            if i not in now:
                now[i] = {"round": self.done, "client": i}
                self.client_rows.append(now[i])
            objective = self.problem.task.objective
            for view in ("personal", "general", *metrics.MORE_VIEWS):
                if view in found:
                    now[i][f"{view}_{objective.primary.name}"] = objective.value(found[view][place])

    def personal_model(self, i: int, adapt: bool = True) -> PersonalModel:
        """Return client `i`'s personal predictor with the current state, as a plain module in evaluation mode.

        `adapt` states whether to run the method's `adapt` phases, which need the client's examples.
        """
        down = self.hooks.deploy(self.server, self.done)
        with arithmetic(self.settings):
            received = Downlink(self.problem.codec.through(down).to(i))
            found = self.engine.personal(self.done, received, i, adapt)
            return self._described(PersonalModel(self.method, *found), i)

    def server_model(self) -> PersonalModel:
        """Return the server's predictor with the current state, as a plain module. Raise RunFolderError if there is none."""
        if not self.problem.has_server_model:
            raise RunFolderError(
                f"client=server: {type(self.method).__name__} has no server model; name a client by its number"
            )
        down = self.hooks.deploy(self.server, self.done)
        with arithmetic(self.settings):
            found = self.engine.server(down)
            return self._described(PersonalModel(self.method, *found, self.method.predictors()["server"]), None)

    def _described(self, model: PersonalModel, client: int | None) -> PersonalModel:
        """Return the model with a description of how to convert raw values."""
        model.encode = partial(self.data.preprocess.encode, client=client)
        return model

    def shared_model(self, i: int) -> PersonalModel:
        """Return the body that client `i` receives, with one classifier for all clients (`eval.shared_head`), as a plain module.

        Raises:
            ConfigError: the run does not support this classifier.
        """
        if self.scoring.head is None:
            raise ConfigError(
                "eval.shared_head=false: the run fits no classifier on shared features; set eval.shared_head=true"
            )
        down = self.problem.codec.through(self.hooks.deploy(self.server, self.done))
        with arithmetic(self.settings):
            return self._described(self.scoring.head.model(self.done, down, i), i)
