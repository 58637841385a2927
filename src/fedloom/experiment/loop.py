"""One experiment: the round loop, scoring, checkpoints and resuming, once for all methods and engines."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from fedloom import accelerator, data, tree
from fedloom.config.parsing import read_toml
from fedloom.config.settings import Settings, make_method, make_settings, participation_range, to_toml
from fedloom.engines import Engine, Newcomers, Problem, Reply, Score
from fedloom.errors import RunFolderError
from fedloom.experiment import metrics
from fedloom.experiment.accounting import Accounting
from fedloom.experiment.arrivals import Arrivals, RoundRequest
from fedloom.experiment.build import arithmetic, engine_for, initial_weights, make_federation, make_problem
from fedloom.experiment.evaluation import Scores, Scoring
from fedloom.experiment.personal_model import PersonalModel
from fedloom.experiment.run_folder import DEPLOYED, RunFolder, environment
from fedloom.experiment.server_hooks import ServerSide
from fedloom.experiment.trackers import Tracker, check_trackers, make_trackers
from fedloom.experiment.uplink_check import require_finite
from fedloom.method import Client, Downlink, Method, Round
from fedloom.rng import Stream
from fedloom.tree import Tree, Weights

if TYPE_CHECKING:
    import pandas as pd

Row = dict[str, Any]
OnRound = Callable[[int, int, Row], None]  # (rounds done, rounds in all, the newest metrics)


@dataclass(frozen=True, kw_only=True)
class GivenObjects:
    """Objects from Python in place of what the settings name."""

    method: Method | None = None
    dataset: data.Dataset | None = None
    model: nn.Module | Callable[..., nn.Module] | None = None
    federation: data.Federation | None = None  # in place of `dataset` and the partition (rows on devices)
    engine: Callable[[Problem], Engine] | None = None


NOTHING = GivenObjects()


class Experiment:
    """A federation, a method and an engine, ready to run; everything it writes goes into its folder."""

    def __init__(self, settings: Settings, parts: GivenObjects = NOTHING, folder: RunFolder | None = None) -> None:
        check_trackers(settings.log)
        if folder is None and settings.out:
            RunFolder.check_free(settings.out)
        with arithmetic(settings):
            self.settings = settings
            self.place = accelerator.place(settings.engine.device, settings.engine.device_bytes)
            self.method = parts.method or make_method(settings.method)
            self.data = parts.federation or make_federation(settings, parts.dataset)
            self.partition = self.data.partition  # as it was dealt, whatever a reference method pools
            if self.method.pooled:
                self.data = self.data.pooled()
            self.problem = make_problem(settings, self.method, self.data, parts.model)
            weights = initial_weights(self.problem)
            self.hooks = ServerSide(self.problem)
            self.server = self.hooks.init(weights)
            self._buffers = _policy(self.method, weights)
            self.engine: Engine = (parts.engine or partial(engine_for, settings, self.place))(self.problem)
        self.done = self.saved = 0  # rounds, and rounds at the last checkpoint
        self.rows: list[Row] = []
        self.client_rows: list[Row] = []
        self.ledger = Accounting(self.problem)
        self.intake = Arrivals(self.problem, settings)
        self._has_run = False
        try:
            self.scoring = Scoring(self.problem, settings, self.engine)
            self.folder = self._open(folder)
            config = settings.model_dump(mode="json")
            self.trackers: list[Tracker] = make_trackers(settings.log, self.folder.path, config)
        except BaseException:
            self.engine.close()
            raise

    def _open(self, folder: RunFolder | None) -> RunFolder:
        """A new folder, or the given one, with the state that lies in it."""
        if folder is not None:
            self._restore(folder)
            return folder
        s = self.settings
        folder = RunFolder.create(s.out, f"{s.method.name.rpartition(':')[2]}-{s.data.name}")
        self._describe(folder)
        return folder

    @classmethod
    def resume(cls, path: str | Path, parts: GivenObjects = NOTHING) -> Experiment:
        """Take up a run from its last checkpoint (or from the start, where there is none yet)."""
        folder = RunFolder.open(Path(path))
        if (folder.path / "summary.json").exists():
            raise RunFolderError(f"{path}: this run is finished; there is nothing to resume")
        _refuse_deployed(folder)
        experiment = cls(make_settings(read_toml(folder.path / "config.toml")), parts, folder)
        experiment.forget_unsaved()
        return experiment

    @classmethod
    def reopen(cls, path: str | Path, parts: GivenObjects = NOTHING) -> Experiment:
        """A run as its last checkpoint left it, finished or not, to look at: sequential, on the CPU; its folder stays as it is."""
        folder = RunFolder.open(Path(path))
        if not folder.has_checkpoint():
            raise RunFolderError(f"{path}: this run has no checkpoint (checkpoint_every=0, or it ended too early)")
        _refuse_deployed(folder)
        settings = make_settings(read_toml(folder.path / "config.toml"))
        engine = settings.engine.model_copy(update={"name": "sequential", "device": "cpu"})
        return cls(settings.model_copy(update={"engine": engine, "log": ()}), parts, folder)

    def forget_unsaved(self) -> None:
        """Make the folder that of a run which goes on from its last checkpoint."""
        if not self.folder.has_checkpoint():  # the run may have ended before its description was whole
            self._describe(self.folder)
        self.folder.keep_rows(self.done)

    def run(self, on_round: OnRound | None = None) -> Row:
        """Run what is left of the rounds, once; returns the summary.

        Raises:
            RunFolderError: it was called before. What a broken round left behind is not what the last checkpoint holds.
        """
        rounds = self.settings.rounds
        if self._has_run:
            raise RunFolderError(f"{self.folder.path}: this experiment has run already; resume the folder in a new one")
        self._has_run = True
        try:
            with arithmetic(self.settings):
                for number in range(self.done, rounds):
                    self._round(number)
                    if on_round:
                        on_round(self.done, rounds, self.rows[-1] if self.rows else {})
                return self._finish(self._join(on_round))
        finally:
            self.engine.close()
            for tracker in self.trackers:
                tracker.close()

    # one round

    def _round(self, number: int) -> None:
        started = time.perf_counter()
        cohort = self._cohort(number)
        down = self.hooks.downlink(self.server, number, cohort)
        self.problem.codec.check_downlink(down)
        sent = self.problem.codec.send(down)
        roster = self.intake.roster(number, cohort, self.engine.busy())
        replies = self._train(number, cohort, sent, roster.working)
        taken = self.intake.take(RoundRequest(number, cohort, sent, roster.working), replies, self.engine.busy())
        rng = Stream(self.settings.seed, "server", number)
        uplinks = self.hooks.exchange(taken.uplinks, number, rng.child("exchange")) if taken.uplinks else []
        before, round = self.server, Round(number, self.problem.task.n_clients, taken.arrivals, rng)
        if uplinks:
            server = self.hooks.aggregate(before, uplinks, round)
            require_finite(server, number, self.saved)
            self.server = tree.copy_shared(server, uplinks)  # FedMR's slots are the uplinks themselves
        working = [cohort[slot] for slot in roster.working]
        away = set(working).difference(self.engine.asked(working))
        reached = {cohort[slot]: sent.to(slot) for slot in roster.sent if cohort[slot] not in away}
        self._record_round(number, reached, replies, taken.refused)
        self.done = number + 1
        self.ledger.train_seconds += time.perf_counter() - started
        last = self.done == self.settings.rounds
        if last or self.done % self.settings.eval_every == 0:
            logs = self.hooks.logs(before, uplinks, round) if uplinks else {}
            good = [reply for reply in replies if reply.client not in taken.refused]
            self._evaluate(good, len(uplinks), logs)
        every = self.settings.checkpoint_every
        if every and (last or self.done % every == 0):
            self._checkpoint()

    def _cohort(self, number: int) -> Sequence[int]:
        rng = Stream(self.settings.seed, "cohort", number)
        low, high = participation_range(self.settings.participation)
        fraction = low + (high - low) * float(rng.child("size").numpy.random())
        size = self.settings.cohort or max(int(fraction * self.problem.task.n_clients + 1e-9), 1)
        return self.hooks.cohort(self.server, number, size)

    def _train(self, number: int, cohort: Sequence[int], down: Downlink, working: Sequence[int]) -> list[Reply]:
        """The turns of those members of the cohort who work."""
        if not working and not self.engine.busy():
            return []
        theirs = Downlink(down.common, None if down.each is None else [down.each[slot] for slot in working])
        return self.engine.train(number, [cohort[slot] for slot in working], theirs)

    def _record_round(
        self, number: int, messages: Mapping[int, Tree], replies: Sequence[Reply], refused: Collection[int]
    ) -> None:
        """Note the events, bytes and turns of a round; `messages`: what clients were sent; `refused`: whose reply was not taken in."""
        for event in self.intake.events:
            self.folder.append(event, "events.jsonl")
        self.intake.events.clear()
        sent = {i: self.ledger.count("downlink", message) for i, message in messages.items()}
        replied = {reply.client for reply in replies}
        for i, n_bytes in sent.items():
            if i not in replied:
                self.client_rows.append({"round": number + 1, "client": i, "downlink_bytes": n_bytes})
        for reply in replies:
            flops = self.ledger.turn(reply, number, reply.client not in refused)
            relayed = 0  # what clients exchange goes through a relay: up once, and down to others
            if self.method.exchanges:
                relayed = self.ledger.count("uplink", reply.uplink, "exchange")
                self.ledger.count("downlink", reply.uplink, "exchange")
            self.client_rows.append(
                {
                    "round": number + 1,
                    "client": reply.client,
                    "examples": reply.examples,
                    "steps": sum(reply.steps.values()),
                    "uplink_bytes": self.ledger.count("uplink", reply.uplink) + relayed,
                    # a late reply's downlink was counted when it was sent
                    "downlink_bytes": sent.get(reply.client, 0) + relayed,
                    "flops": flops,
                    "seconds": reply.seconds,
                    **{f"seconds.{phase}": seconds for phase, seconds in reply.phase_seconds.items()},
                    **reply.logs,
                }
            )

    # scoring

    def _evaluate(self, replies: Sequence[Reply], n_arrived: int, server_logs: Mapping[str, float]) -> None:
        started = time.perf_counter()
        every = self.settings.eval.general_every
        general = self.done == self.settings.rounds or bool(every and self.done % every == 0)
        down = self.hooks.deploy(self.server, self.done)
        found = self.scoring.score(self.done, down, general)
        row: Row = {"round": self.done, **self.scoring.row(found, down, self.ledger.trained)}
        self.ledger.eval_seconds += time.perf_counter() - started
        row |= {f"{way}_bytes": self.ledger.total(way) for way in ("uplink", "downlink")}
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

    def _record_scores(self, found: Scores) -> None:
        latest = takewhile(lambda row: row["round"] == self.done, reversed(self.client_rows))
        now = {row["client"]: row for row in latest}
        for place, i in enumerate(self.scoring.clients):
            if i not in now:
                now[i] = {"round": self.done, "client": i}
                self.client_rows.append(now[i])
            for name in ("personal_accuracy", "general_accuracy"):
                if name in found:
                    now[i][name] = found[name][place].accuracy

    # newcomers

    def _join(self, on_round: OnRound | None) -> Row:
        """Let those join who took no part in training: nothing of theirs reaches the server. What the summary says of them."""
        if not self.settings.join.clients:
            return {}
        started, joining = time.perf_counter(), Newcomers(self.problem, self.place)
        down = self.problem.codec.through(self.hooks.deploy(self.server, self.done))
        ask, turns = self.scoring.asks(general=False)[0], self.settings.join.turns
        before, after = list[Score](), list[Score]()
        newcomers = range(self.problem.task.n_clients, self.data.n_clients)
        for i in newcomers:
            before.append(joining.score_received(i, down, ask))
            self.engine.restore(i, joining.join(i, down, turns))
            after.append(joining.score(self.done, down, [i], [ask])[0][ask.name])
            if on_round:
                on_round(self.done, self.settings.rounds, {"joined": f"{len(after)}/{len(newcomers)}"})
        if self.settings.checkpoint_every:
            self._checkpoint()
        each = [metrics.newcomer(i, *scores) for i, *scores in zip(newcomers, before, after, strict=True)]
        scores = metrics.spread(before, "received") | metrics.spread(after, "joined")
        return {
            "new_clients": {"clients": len(newcomers), "turns": turns, **scores, "each": each},
            "join_seconds": time.perf_counter() - started,
        }

    # files

    def _describe(self, folder: RunFolder) -> None:
        folder.write("config.toml", to_toml(self.settings))
        folder.write_json(
            "environment.json", environment() | {"device": accelerator.describe_device(self.place.device)}
        )
        folder.write("partition.json", json.dumps(self._dealt()))

    def _dealt(self) -> Row:
        """Who got which rows."""
        labels, n_classes = self.data.dataset.labels, self.data.n_classes
        counts = {split: self.partition.counts(labels, n_classes, split).tolist() for split in ("train", "test")}
        return {"classes": list(self.data.dataset.classes), "class_counts": counts, **self.partition.content()}

    def _checkpoint(self) -> None:
        clients = {i: self.engine.client(i)._asdict() for i in self.engine.changed()}
        self.folder.write_clients(_table(self.client_rows))
        late = {i: flight.message for i, flight in self.intake.flights.items()}
        state = {"round": self.done, **self.ledger.state(), **self.intake.state()}
        self.folder.save_checkpoint(state, self.server, clients, late)
        self.saved = self.done

    def _restore(self, folder: RunFolder) -> None:
        self._check_partition(folder)
        saved = folder.load_checkpoint()
        state, server, clients = saved if saved else ({"round": 0}, {}, {})
        self.done = self.saved = state["round"]
        self.ledger = Accounting(self.problem, state)
        self.intake.restore(state, folder.load_late())
        self.rows = [row for row in folder.rows() if row["round"] <= self.done]
        self.client_rows = _without_nan(folder.read_clients(self.done))
        self.server = _restored(self.server, server, "server") if saved else self.server
        with arithmetic(self.settings):
            for i, client in clients.items():
                self.engine.restore(i, Client(**_restored(self.engine.client(i)._asdict(), client, f"client {i}")))

    def _check_partition(self, folder: RunFolder) -> None:
        """Refuse rows dealt otherwise than when the run began: what it trained on could be tested on."""
        begun, now = folder.partition(), self._dealt()
        if self.partition.scheme.get("name") == "devices":
            return  # they may hold other rows by now, and some may be away
        if any(begun[key] != now[key] for key in ("classes", "class_counts", "hash") if key in begun):
            raise RunFolderError(
                f"{folder.path}: its rows are not those that it began with; were the data or the partition's file changed?"
            )

    def _finish(self, joined: Row) -> Row:
        s = self.settings
        summary = {
            "method": s.method.name,
            "model": ",".join(a.name for a in self.problem.archs),
            "data": s.data.name,
            "clients": self.problem.task.n_clients,
            "rounds": self.done,
            "seed": s.seed,
            **metrics.summarise(self.rows),
            **joined,
            "uplink_bytes": self.ledger.total("uplink"),
            "downlink_bytes": self.ledger.total("downlink"),
            "bytes_by_kind": self.ledger.kinds,
            **self.intake.counts,
            **metrics.cost_to_target(self.rows, s.eval.target),
            "seconds": self.ledger.train_seconds + self.ledger.eval_seconds,
            "train_seconds": self.ledger.train_seconds,
            "seconds_by_phase": self.ledger.phase_seconds,
            "flops_per_round": self.ledger.flops / max(self.done, 1) or None,
            "peak_client_bytes": self.ledger.peak_client_bytes(),
            "buffers": self._buffers,
            "partition": self.partition.hash(),
            "finished": True,
        }
        self.folder.write_clients(_table(self.client_rows))
        self.folder.write_json("summary.json", summary)
        return summary

    def personal_model(self, i: int) -> PersonalModel:
        """Client `i`'s personal predictor as it would be used now, as a plain module in evaluation mode."""
        down = self.hooks.deploy(self.server, self.done)
        with arithmetic(self.settings):
            return PersonalModel(self.method, *self.engine.personal(self.done, self.problem.codec.through(down), i))


NOTHING_LEARNT = "every round was skipped, so the model is the initial one; events.jsonl says why"


def nothing_learnt(summary: Mapping[str, Any]) -> bool:
    """Whether no round of a run gave the server anything to aggregate."""
    return 0 < int(summary.get("rounds", 0)) <= int(summary.get("skipped", 0))


def _policy(method: Method, weights: Weights) -> str | None:
    """Whether running statistics travel ("shared") or stay ("private"); None where there are none."""
    if not weights["buffers"]:
        return None
    return "shared" if method.travelling(weights)["buffers"] else "private"


def _refuse_deployed(folder: RunFolder) -> None:
    if (folder.path / DEPLOYED).is_file():
        raise RunFolderError(
            f"{folder.path}: the clients of this run are on devices, and so is what they keep; go on with fedloom deploy run --resume"
        )


def _restored(template: Tree, saved: Tree, what: str) -> Tree:
    if tree.structure(template) != tree.structure(saved):
        raise RunFolderError(
            f"the checkpoint does not fit this method and model (at the {what}); was the method's file changed?"
        )
    return tree.merge(template, saved)  # in the template's order; branches without tensors come from it


def _table(rows: list[Row]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(rows)


def _without_nan(table: pd.DataFrame) -> list[Row]:
    import pandas as pd

    return [{str(k): v for k, v in row.items() if not pd.isna(v)} for row in table.to_dict("records")]
