"""Metrics from scores and replies: one row per evaluated round, and a summary of all rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fedloom.engines import Reply
from fedloom.objectives import Metric, Objective, Score, sum_scores

Row = dict[str, Any]

VIEWS = ("personal", "general", "server")
"""The models that are scored: clients' own models on their own examples and on the common test set, and the server's model."""
MORE_VIEWS = ("shared_head", "changed")
"""Views that only some runs have: the classifier on shared features, on the common test set; and clients' own models, on their own
examples with another client factor."""
FITTED = "_fitted"  # suffix for the scores of clients' models in their state after the last local update


def headlines(metric: Metric) -> tuple[str, ...]:
    """Return the names of the primary metric's series, such as `personal_accuracy`."""
    personal, *others = (f"{view}_{metric.name}" for view in VIEWS)
    return (personal, personal + FITTED, *others)


def spread(
    objective: Objective,
    scores: Sequence[Score],
    view: str,
    trained: Sequence[bool] | None = None,
    *,
    suffix: str = "",
) -> Row:
    """Return the metrics on several clients' own examples.

    The primary metric, such as `personal_accuracy`, is computed over all examples. `_uniform` is its mean over clients, `_std` its
    population standard deviation over clients, `_worst10` its mean over the worst tenth of clients (at least one client), and `_trained`
    its value over the examples of clients that have trained at least once. Clients without examples are ignored. Other metrics are
    computed over all examples.
    """
    name = f"{view}_{objective.primary.name}{suffix}"
    each = np.array([objective.value(score) for score in scores if score.n_rows])
    if not each.size:
        return {}
    worst = _worst_first(each, objective.primary)[: max(1, math.ceil(each.size / 10))]
    total = objective.metrics(sum_scores(scores))
    row: Row = {
        name: number(total.pop(objective.primary.name)),
        f"{name}_uniform": number(float(each.mean())),
        f"{name}_std": number(float(each.std())),
        f"{name}_worst10": number(float(worst.mean())),
    }
    row |= {f"{view}_{other}{suffix}": number(value) for other, value in total.items()}
    if trained is not None and any(trained):
        known = sum_scores([s for s, t in zip(scores, trained, strict=True) if t])
        row[f"{name}_trained"] = number(objective.value(known))
    return row


def _worst_first(each: npt.NDArray[np.float64], metric: Metric) -> npt.NDArray[np.float64]:
    ordered = np.sort(each)  # NaN last
    return ordered if metric.better == "higher" else ordered[::-1]


def over_clients(objective: Objective, scores: Sequence[Score], view: str) -> Row:
    """Return the metrics of several clients' models on the same examples: means over clients, and the `_std` of the primary metric."""
    each = [objective.metrics(score) for score in scores]
    row: Row = {f"{view}_{name}": number(float(np.mean([m[name] for m in each]))) for name in each[0]}
    name = objective.primary.name
    return row | {f"{view}_{name}_std": number(float(np.std([m[name] for m in each])))}


def by_held(objective: Objective, scores: Sequence[Score], held: npt.NDArray[np.bool_], view: str) -> Row:
    """Split the primary metric on the common test set by whether a client holds training examples of a class.

    Return `_held` and `_not_held`, which are means over the clients that have such classes, or None if there are no such clients. `held`
    has the shape (clients, classes).
    """
    row: Row = {}
    for facet, classes in (("held", held), ("not_held", ~held)):
        parts = [Score({n: v * mine for n, v in s.sums.items()}) for s, mine in zip(scores, classes, strict=True)]
        each = [objective.value(part) for part in parts if part.n_rows]
        row[f"{view}_{objective.primary.name}_{facet}"] = number(float(np.mean(each))) if each else None
    return row


def alone(objective: Objective, score: Score, view: str) -> Row:
    """Return the metrics of one score."""
    return {f"{view}_{name}": number(value) for name, value in objective.metrics(score).items()}


def by_name(objective: Objective, scores: Sequence[Score], view: str) -> Row:
    """Return the recall of each class, or the F1 score of each label, over all scores, to four decimals; None without examples."""
    what, values = objective.by_name(sum_scores(scores))
    return {f"{view}_{what}": [None if math.isnan(v) else round(v, 4) for v in values]} if what else {}


def mean_logs(replies: Sequence[Reply]) -> Row:
    """Return the means of the clients' logs, weighted by examples. Each log is averaged over the clients that wrote it."""
    row: Row = {}
    for name in sorted({name for reply in replies for name in reply.logs}):
        having = [reply for reply in replies if name in reply.logs]
        row[name] = float(np.average([r.logs[name] for r in having], weights=[r.examples for r in having]))
    return row


def newcomer(objective: Objective, client: int, received: Score, joined: Score) -> Row:
    """Return the primary metric on a newcomer's own examples, with the model it received and with its model after it joined."""
    return {"client": client, "received": number(objective.value(received)), "joined": number(objective.value(joined))}


BY_NAME = tuple(f"{view}_{what}" for what in ("recall", "f1") for view in (*VIEWS, *MORE_VIEWS))
FACETS = ("uniform", "std", "worst10", "trained", "held", "not_held")


def summarise(rows: Sequence[Mapping[str, Any]], metric: Metric) -> Row:
    """Return the numbers `final`, `last10`, `best_on_test` and `chosen_on_validation` for each view of the primary metric.

    `last10` is the mean over the last ten evaluations. `best_on_test` is biased, because its round is chosen on test examples. The round
    of `chosen_on_validation` (`chosen_round`) is the first round with the best validation value; without validation examples, both are
    None. The result also contains the `FACETS` of each view, and the recalls or F1 scores, after the last evaluation.
    """
    best = max if metric.better == "higher" else min
    valid = [row.get(f"valid_{metric.name}") for row in rows]
    known = [value for value in valid if value is not None]
    chosen = rows[valid.index(best(known))] if known else None
    found: Row = {}
    more = [name for view in MORE_VIEWS if any((name := f"{view}_{metric.name}") in row for row in rows)]
    for name in (*headlines(metric), *more):
        series = [row[name] for row in rows if row.get(name) is not None]
        if not series:
            found[name] = None
            continue
        found[name] = {
            "final": series[-1],
            "last10": float(np.mean(series[-10:])),
            "best_on_test": best(series),
            "chosen_on_validation": None if chosen is None else chosen.get(name),
            "chosen_round": None if chosen is None else chosen["round"],
        } | {facet: rows[-1][f"{name}_{facet}"] for facet in FACETS if rows[-1].get(f"{name}_{facet}") is not None}
    last = rows[-1] if rows else {}
    return found | {name: last[name] for name in BY_NAME if name in last}


def others(rows: Sequence[Mapping[str, Any]], objective: Objective) -> Row:
    """Return all metrics after the last round, except the primary metric."""
    names = list(objective.metrics(objective.none()))[1:]
    last = rows[-1] if rows else {}
    wanted = (f"{view}_{name}" for view in VIEWS for name in names)
    return {name: last[name] for name in wanted if name in last}


def cost_to_target(rows: Sequence[Mapping[str, Any]], target: float | None, metric: Metric) -> Row:
    """Return the first evaluated round in which personal models reached `target`, and the number of bytes sent until then.

    The number of bytes includes both directions. Both results are None if the models never reached the target. Without a target, the
    result is empty.
    """
    if target is None:
        return {}
    name, sign = f"personal_{metric.name}", 1 if metric.better == "higher" else -1
    first = next((row for row in rows if row.get(name) is not None and sign * (row[name] - target) >= 0), None)
    sent = None if first is None else first["uplink_bytes"] + first["downlink_bytes"]
    return {"target": target, "rounds_to_target": first and first["round"], "bytes_to_target": sent}


def number(value: float) -> float | None:
    """Return the value, or None if it is NaN, which means undefined, for example because there were no examples to score."""
    return None if math.isnan(value) else value


NOTHING_LEARNT = "every round was skipped, so the model was never trained; see events.jsonl for the reasons"


def nothing_learnt(summary: Mapping[str, Any]) -> bool:
    """Return whether no round of a run had an uplink to aggregate."""
    return 0 < int(summary.get("rounds", 0)) <= int(summary.get("skipped", 0))
