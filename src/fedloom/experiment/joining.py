"""Newcomers: clients that are held out of training and join afterwards, one after another."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from fedloom.engines import Newcomers
from fedloom.experiment import metrics
from fedloom.experiment.saving import save_run
from fedloom.objectives import Score

if TYPE_CHECKING:
    from fedloom.experiment.loop import Experiment, OnRound, Row


def join_newcomers(experiment: Experiment, on_round: OnRound | None) -> Row:
    """Run the local updates of the clients that were held out of training. Return their part of the summary.

    A newcomer sends nothing to the server. `on_round` is called after each newcomer.
    """
    if not experiment.settings.join.clients:
        return {}
    started, joining = time.perf_counter(), Newcomers(experiment.problem, experiment.place)
    down = experiment.problem.codec.through(experiment.hooks.deploy(experiment.server, experiment.done))
    request, turns = experiment.scoring.asks(general=False)[0], experiment.settings.join.turns
    head, before, after, shared = experiment.scoring.head, list[Score](), list[Score](), list[Score]()
    with_head = head.fit(experiment.done, down) if head else down
    newcomers = range(experiment.problem.task.n_clients, experiment.data.n_clients)
    for i in newcomers:
        before.append(joining.score_received(i, down, request))
        shared += [joining.score_received(i, with_head, ask) for ask in (head.asks(request.rows) if head else ())]
        experiment.engine.restore(i, joining.join(i, down, turns))
        after.append(joining.score(experiment.done, down, [i], [request])[0][request.name])
        if on_round:
            on_round(experiment.done, experiment.rounds, {"joined": f"{len(after)}/{len(newcomers)}"})
    if experiment.settings.checkpoint_every:
        save_run(experiment)
    objective = experiment.problem.task.objective
    each = [metrics.newcomer(objective, i, *scores) for i, *scores in zip(newcomers, before, after, strict=True)]
    scores = metrics.spread(objective, before, "received") | metrics.spread(objective, after, "joined")
    scores |= metrics.spread(objective, shared, "shared_head")
    scores = {name.replace(f"_{objective.primary.name}", "", 1): value for name, value in scores.items()}
    return {
        "new_clients": {"clients": len(newcomers), "turns": turns, **scores, "each": each},
        "join_seconds": time.perf_counter() - started,
    }
