"""Write the files of a run (description, checkpoints and summary), and resume from them."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from fedloom import accelerator, tree
from fedloom.config.settings import to_toml
from fedloom.data.preprocess import PREPROCESS
from fedloom.errors import RunFolderError
from fedloom.experiment import metrics
from fedloom.experiment.accounting import Accounting
from fedloom.experiment.build import arithmetic
from fedloom.experiment.environment import environment
from fedloom.experiment.manifest import MANIFEST
from fedloom.experiment.resuming import run_facts
from fedloom.experiment.run_folder import DEPLOYED, RunFolder
from fedloom.experiment.signing import SIGNATURE
from fedloom.method import Client
from fedloom.tree import Tree

if TYPE_CHECKING:
    import pandas as pd

    from fedloom.experiment.loop import Experiment

Row = dict[str, Any]


def describe_run(experiment: Experiment, folder: RunFolder) -> None:
    """Write the run's description: settings, environment, partition, and the conversion of raw values to model inputs."""
    folder.write("config.toml", to_toml(experiment.settings))
    folder.write_json(
        "environment.json", environment() | {"device": accelerator.describe_device(experiment.place.device)}
    )
    folder.write("partition.json", json.dumps(_partition_record(experiment), default=str))
    folder.write(PREPROCESS, experiment.data.preprocess.text())
    folder.facts = run_facts(experiment, folder)


def extend_run(experiment: Experiment, before: int) -> None:
    """Write the higher number of rounds, and remove the files of a finished run: its summary, manifest and signature."""
    folder = experiment.folder
    stopped = folder.summary().get("stopped_early")
    folder.write("config.toml", to_toml(experiment.settings))
    for name in ("summary.json", SIGNATURE, MANIFEST):
        (folder.path / name).unlink(missing_ok=True)
    if folder.resumption:
        was = f"it stopped early after {stopped['round']}" if stopped else f"was {before}"
        folder.resumption.noted.append(f"rounds={experiment.settings.rounds} ({was})")


def _partition_record(experiment: Experiment) -> Row:
    """Return the content of `partition.json`: the assignment of examples to clients, the primary metric and all hyper-parameters.

    Reports read the metric and the hyper-parameters from this file because unfinished runs have no summary.
    """
    strata = experiment.data.dataset.strata()
    n = len(strata.names)
    counts = {split: experiment.partition.counts(strata.of, n, split).tolist() for split in ("train", "test")}
    primary = experiment.problem.task.objective.metric._asdict()
    return {
        "classes": list(strata.names),
        "class_counts": counts,
        "primary": primary,
        "hyper_parameters": dataclasses.asdict(experiment.method),
        **experiment.partition.content(),
    }


def save_run(experiment: Experiment) -> None:
    """Write a checkpoint of the experiment."""
    clients = {i: experiment.engine.client(i)._asdict() for i in experiment.engine.changed()}
    experiment.folder.write_clients(_table(experiment.client_rows), experiment.client_rows)
    in_flight = {i: late.message for i, late in experiment.intake.flights.items()}
    state = {"round": experiment.done, **experiment.ledger.state(), **experiment.intake.state()}
    state |= experiment.combination.state()
    state |= {"failed_rounds": experiment.roll_back.failed, "stopped_early": experiment.stopped}
    previous = experiment.roll_back.previous
    experiment.folder.save_checkpoint(state, experiment.server, clients, in_flight, previous)
    experiment.saved = experiment.done


def restore_run(experiment: Experiment, folder: RunFolder) -> None:
    """Restore the experiment from the checkpoint in `folder`, if there is one."""
    _check_partition(experiment, folder)
    if folder.resumption:
        folder.resumption.check_data(experiment)
        folder.resumption.check_code(experiment)
    saved = folder.load_checkpoint()
    state, server, clients = saved if saved else ({"round": 0}, {}, {})
    experiment.done = experiment.saved = _checked_round(experiment, folder, state["round"])
    experiment.ledger = Accounting(experiment.problem, state)
    experiment.intake.restore(state, folder.load_late())
    experiment.combination.restore(state)
    experiment.rows = [row for row in folder.rows() if row["round"] <= experiment.done]
    experiment.client_rows = _without_nan(folder.read_clients(experiment.done))
    stopped = state.get("stopped_early")
    if stopped and experiment.settings.stop.after < stopped["round"]:  # unless the run is extended
        experiment.stopped, experiment.rounds = stopped, experiment.done
    if previous := folder.load_previous() if saved else None:
        experiment.roll_back.previous = _restored(experiment.server, previous, "server before its last round")
    experiment.roll_back.failed = state.get("failed_rounds", 0)
    experiment.server = _restored(experiment.server, server, "server") if saved else experiment.server
    with arithmetic(experiment.settings):
        for i, client in clients.items():
            if not 0 <= i < experiment.data.n_clients:
                raise RunFolderError(
                    f"{folder.path}: the checkpoint has client {i}, but there are {experiment.data.n_clients} clients"
                )
            template = experiment.engine.client(i)._asdict()
            experiment.engine.restore(i, Client(**_restored(template, client, f"client {i}")))


def _checked_round(experiment: Experiment, folder: RunFolder, number: int) -> int:
    """Return the round of the checkpoint. Raise RunFolderError if the run cannot have reached this round."""
    rounds = experiment.settings.rounds
    if not 0 <= number <= rounds:
        raise RunFolderError(f"{folder.path}: the checkpoint is of round {number}, but rounds={rounds}; raise rounds")
    return number


def _check_partition(experiment: Experiment, folder: RunFolder) -> None:
    """Raise RunFolderError if the partition differs from that of the run, because training examples could become test examples."""
    if experiment.partition.scheme.get("name") == "devices" or not experiment.data.has_examples:
        return  # devices may hold other examples now, or may be absent
    at_start, now = folder.partition(), _partition_record(experiment)
    if any(at_start[key] != now[key] for key in ("classes", "class_counts", "hash") if key in at_start):
        raise RunFolderError(
            f"{folder.path}: its data or partition differ from those at its start; restore the data and the partition's file"
        )


def write_summary(experiment: Experiment, buffers: str | None, joined: Row) -> Row:
    """Write and return the summary of a finished run. `joined` is the part about newcomers."""
    s, objective = experiment.settings, experiment.problem.task.objective
    summary = {
        "method": s.method.name,
        "model": ",".join(a.name for a in experiment.problem.archs),
        "data": s.data.name,
        "clients": experiment.problem.task.n_clients,
        "rounds": experiment.done,
        "seed": s.seed,
        "objective": objective.content(),
        "primary": objective.metric._asdict(),
        **metrics.summarise(experiment.rows, objective.primary),
        **metrics.others(experiment.rows, objective),
        **({"shared_head_bytes": experiment.scoring.head.uplink_bytes} if experiment.scoring.head else {}),
        **joined,
        "uplink_bytes": experiment.ledger.total("uplink"),
        "downlink_bytes": experiment.ledger.total("downlink"),
        "bytes_by_kind": experiment.ledger.kinds,
        **experiment.intake.counts,
        **experiment.intake.screen.summary(),
        **experiment.combination.summary(),
        **metrics.cost_to_target(experiment.rows, s.eval.target, objective.primary),
        **({"stopped_early": experiment.stopped} if experiment.stopped else {}),
        "seconds": experiment.ledger.train_seconds + experiment.ledger.eval_seconds,
        "train_seconds": experiment.ledger.train_seconds,
        "seconds_by_phase": experiment.ledger.phase_seconds,
        "flops_per_round": experiment.ledger.flops / max(experiment.done, 1) or None,
        "peak_client_bytes": experiment.ledger.peak_client_bytes(),
        "buffers": buffers,
        "partition": experiment.partition.hash(),
        "finished": True,
    }
    accepted = [change for resumed in experiment.folder.facts["resumed"] for change in resumed["accepted"]]
    if accepted:
        summary["accepted_changes"] = accepted
    experiment.folder.write_clients(_table(experiment.client_rows), experiment.client_rows)
    experiment.folder.finish(summary, experiment.done)
    return summary


def refuse_deployed(folder: RunFolder) -> None:
    """Raise RunFolderError if the clients of a run are on devices."""
    if (folder.path / DEPLOYED).is_file():
        raise RunFolderError(
            f"{folder.path}: the clients of this run and their states are on devices; use fedloom deploy run --resume"
        )


def _restored(template: Tree, saved: Tree, what: str) -> Tree:
    if tree.structure(template) != tree.structure(saved):
        raise RunFolderError(
            f"the checkpoint does not match this method and model (at the {what}); restore the method's file"
        )
    if bad := tree.not_finite(saved):
        raise RunFolderError(
            f"the checkpoint holds numbers that are not finite (at the {what}, {bad}); restore a copy of the folder"
        )
    return tree.merge(template, saved)  # in the order of the template, including its branches without tensors


def _table(rows: list[Row]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(rows)


def _without_nan(table: pd.DataFrame) -> list[Row]:
    import pandas as pd

    return [{str(k): v for k, v in row.items() if not pd.isna(v)} for row in table.to_dict("records")]
