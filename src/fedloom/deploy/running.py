"""Run an experiment on a running federation."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedloom.config.parsing import read_toml
from fedloom.config.settings import Settings, make_settings, to_toml
from fedloom.data import Federation
from fedloom.data.preprocess import Given
from fedloom.data.raw_targets import conformed
from fedloom.deploy.engine import AcceptedUpdates, FlowerEngine, Link, LostNode
from fedloom.deploy.folder import Deployment, deployable
from fedloom.deploy.limits import MAX_DESCRIPTION, limits
from fedloom.deploy.messages import (
    MAX_ROWS,
    Call,
    Hello,
    NodeFailure,
    Present,
    open_envelope,
    seal,
)
from fedloom.deploy.rows import Remote
from fedloom.engines.base import Problem
from fedloom.errors import ConfigError, DataError, RunFolderError, WireError
from fedloom.experiment.build import arithmetic, make_dataset, make_federation, make_preprocess
from fedloom.experiment.loop import Experiment, GivenObjects
from fedloom.experiment.resuming import resumable
from fedloom.experiment.run_folder import DEPLOYED, RunFolder

TURNS = "turns.json"  # file in the run folder with the record of accepted updates
Tell = Callable[[str], None]


def prepare(deployment: Deployment, values: Mapping[str, Any], link: Link, tell: Tell) -> Experiment:
    """Start a new run: request the clients and data of the nodes, and write the run folder."""
    settings = deployable(make_settings(values))
    run = secrets.token_hex(8)
    return _experiment(deployment, settings, run=run, link=link, tell=tell, folder=None)


def resume_deployed(
    deployment: Deployment, path: Path, link: Link, tell: Tell, accept_changes: bool = False
) -> Experiment:
    """Resume an interrupted run from its last checkpoint. The nodes restore the client states of that checkpoint.

    For `accept_changes`, see `Experiment.resume`.
    """
    with resumable(path, accept_changes) as folder:
        try:
            run = json.loads((path / DEPLOYED).read_text(encoding="utf-8"))["run"]
        except (OSError, ValueError, KeyError, TypeError):
            raise RunFolderError(
                f"{path}: this run was not made on devices; resume it with: fedloom run --resume {path}"
            ) from None
        settings = make_settings(read_toml(path / "config.toml"))
        experiment = _experiment(deployment, settings, run=run, link=link, tell=tell, folder=folder)
        experiment.forget_unsaved()
    return experiment


def _experiment(
    deployment: Deployment, settings: Settings, run: str, link: Link, tell: Tell, folder: RunFolder | None
) -> Experiment:
    deployment.check_complete()
    if settings.clients != deployment.n_clients:
        raise ConfigError(
            f"clients={settings.clients}: must be {deployment.n_clients}, the number of clients on the nodes of {deployment.path}"
        )
    if settings.engine.device != "cpu":
        raise ConfigError(
            f"engine.device={settings.engine.device}: nodes of a deployment compute on CPUs; remove this setting"
        )
    with arithmetic(settings):
        federation, call = _meet(deployment, settings, run, link, tell)

    def make(problem: Problem) -> FlowerEngine:
        late_s = deployment.file.late_s if settings.devices.stragglers == "late" else 0.0
        return FlowerEngine(problem, link, roster=deployment.file.nodes, call=call, tell=tell, late_s=late_s)

    experiment = Experiment(settings, GivenObjects(federation=federation, engine=make), folder)
    if folder is None:
        experiment.folder.write_json(DEPLOYED, {"run": run, "nodes": deployment.file.nodes})
    assert isinstance(experiment.engine, FlowerEngine)
    experiment.engine.turns = AcceptedUpdates(experiment.folder.path / TURNS)
    return experiment


def _meet(deployment: Deployment, settings: Settings, run: str, link: Link, tell: Tell) -> tuple[Federation, Call]:
    """Request the clients and data of the nodes.

    Return the server's view of the federation, and the part that all requests share.
    """
    _wait_for(deployment, link, tell)
    held = make_dataset(settings)
    if held.normalise == "own" and settings.data.normalise is None:
        settings = settings.model_copy(update={"data": settings.data.model_copy(update={"normalise": "own"})})
    described = held.preprocess() if settings.data.normalise == "own" else make_preprocess(settings, held)
    text = described.text(indent=None)
    if len(text) > MAX_DESCRIPTION:
        raise ConfigError(
            f"data: preprocess.json has {len(text) / 2**20:.1f} MiB, but at most {MAX_DESCRIPTION // 2**20} MiB can be sent to nodes; use "
            "a smaller data.vocabulary, or columns with fewer levels"
        )
    try:
        call = Call(
            run=run,
            config=to_toml(settings.model_copy(update={"out": None, "label": None, "log": ()})),
            preprocess=text,
            deadline_s=deployment.file.deadline_s,
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{first['loc'][0]} cannot be sent to nodes: {first['msg']}") from None
    present = _introductions(deployment, link, call, described.objective.shapes()["rows"], tell)
    own = {node for node, who in present.items() if who.own_rows}
    if not own:
        return make_federation(settings, held), call
    if own != present.keys():
        others = ", ".join(sorted(present.keys() - own))
        raise ConfigError(
            f"{', '.join(sorted(own))} have their own data, but {others} use the config's; set data in every node.toml or in none"
        )
    counts = {int(i): each for who in present.values() for i, each in who.counts.items()}
    held = conformed(held, Given(preprocess=described, where="data.preprocess"))
    return Remote(held, counts, settings), call


def _wait_for(deployment: Deployment, link: Link, tell: Tell) -> None:
    """Wait for all nodes for a limited time. Raise ConfigError if none is online."""
    for warning in deployment.expiring():
        tell(warning)
    for node in deployment.revoked():
        clients = ", ".join(map(str, deployment.file.nodes[node]))
        tell(f"{node} is revoked; its clients ({clients}) do not take part until another node is admitted with them")
    wanted, until, told = set(deployment.active()), time.monotonic() + deployment.file.join_s, False
    if not wanted:
        raise ConfigError(f"{deployment.path}: no node is admitted; see {deployment.path / 'README.md'}")
    while (missing := wanted - set(link.nodes())) and time.monotonic() < until:
        if not told:
            tell(f"waiting up to {deployment.file.join_s:g} s for {', '.join(sorted(missing))}")
            told = True
        time.sleep(0.5)
    if missing == wanted:
        raise ConfigError(
            f"no node is online; start the nodes with: fedloom deploy node {deployment.path / min(wanted)}"
        )
    if missing:
        tell(f"continuing without {', '.join(sorted(missing))}")


def _introductions(deployment: Deployment, link: Link, call: Call, n_groups: int, tell: Tell) -> dict[str, Present]:
    """Return the nodes' answers to a greeting. `n_groups` is the number of groups in which nodes count their examples."""
    hello, file = seal(Hello(call=call), {}), deployment.file
    found: dict[str, Present] = {}
    reasons: list[str] = []
    wait_s = max(file.join_s, file.deadline_s)  # nodes may be busy with a killed run until Flower drops the run
    for node, answer in link.exchange(dict.fromkeys(link.nodes(), hello), wait_s).items():
        try:
            found[node] = _introduction(deployment, node, answer, n_groups)
        except WireError as error:
            reasons.append(f"{node}: {error}")
            tell(reasons[-1])
    if not found:
        raise DataError(f"no node can take part; {'; '.join(reasons)}")
    return found


def _introduction(deployment: Deployment, node: str, answer: bytes | LostNode, n_groups: int) -> Present:
    if isinstance(answer, LostNode):
        raise WireError(answer.reason)
    clients = deployment.file.nodes[node]
    header = open_envelope(answer, limits(len(clients), n_counts=3 * len(clients) * n_groups)).header
    if isinstance(header, NodeFailure):
        raise WireError(header.reason)
    if not isinstance(header, Present):
        raise WireError(f"the answer has an unexpected kind ({header.kind})")
    if header.clients != clients:
        raise WireError(f"it has clients {header.clients[:20]}, but federation.toml has {clients[:20]}")
    _check_counts(header, n_groups)
    return header


def _check_counts(header: Present, n_groups: int) -> None:
    wanted = {str(i) for i in header.clients} if header.own_rows else set()
    if header.counts.keys() != wanted:
        raise WireError("its example counts are not for its own clients")
    for splits in header.counts.values():
        if splits.keys() != {"train", "valid", "test"} or any(len(c) != n_groups for c in splits.values()):
            raise WireError("its example counts are not given by split and class")
    n_rows = sum(sum(each) for splits in header.counts.values() for each in splits.values())
    if n_rows > MAX_ROWS:
        raise WireError(f"it reports {n_rows} examples; at most {MAX_ROWS} are allowed")
