"""Metrics from scores and replies: one row per evaluated round, and a summary of all rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedloom.engines import Reply, Score, sum_scores

Row = dict[str, Any]


def spread(scores: Sequence[Score], name: str, trained: Sequence[bool] | None = None) -> Row:
    """Return the accuracy on several clients' own examples: `name` (mean over examples), `_uniform` (mean over clients), and more.

    `_std` is the population standard deviation over clients, `_worst10` the mean of the worst tenth of clients (at least one), and
    `_trained` the mean over the examples of clients that have trained at least once. Clients without examples are ignored.
    """
    each = np.array([score.accuracy for score in scores])
    each = each[~np.isnan(each)]
    if not each.size:
        return {}
    worst = np.sort(each)[: max(1, math.ceil(each.size / 10))]
    row: Row = {
        name: sum_scores(scores).accuracy,
        f"{name}_uniform": float(each.mean()),
        f"{name}_std": float(each.std()),
        f"{name}_worst10": float(worst.mean()),
    }
    if trained is not None and any(trained):
        row[f"{name}_trained"] = number(sum_scores([s for s, t in zip(scores, trained, strict=True) if t]).accuracy)
    return row


def over_clients(scores: Sequence[Score], name: str) -> Row:
    """Return the accuracy of several clients' models on the same examples: `name` (mean over clients) and `_std`."""
    each = np.array([score.accuracy for score in scores])
    return {name: number(float(each.mean())), f"{name}_std": number(float(each.std()))}


def recall(scores: Sequence[Score]) -> list[float | None]:
    """Return each class's recall over all scores, to four decimals; None for a class without examples."""
    right, rows = sum_scores(scores)
    return [round(float(r / n), 4) if n else None for r, n in zip(right, rows, strict=True)]


def mean_logs(replies: Sequence[Reply]) -> Row:
    """Return the means of the clients' logs, weighted by examples; each log is averaged over the clients that wrote it."""
    row: Row = {}
    for name in sorted({name for reply in replies for name in reply.logs}):
        having = [reply for reply in replies if name in reply.logs]
        row[name] = float(np.average([r.logs[name] for r in having], weights=[r.examples for r in having]))
    return row


def newcomer(client: int, received: Score, joined: Score) -> Row:
    """Describe a newcomer: accuracy on its own examples with the model it received, and after it joined."""
    return {"client": client, "received": number(received.accuracy), "joined": number(joined.accuracy)}


HEADLINES = ("personal_accuracy", "personal_accuracy_fitted", "general_accuracy", "server_accuracy")
RECALLS = ("personal_recall", "general_recall", "server_recall")
FACETS = ("uniform", "std", "worst10", "trained")


def summarise(rows: Sequence[Mapping[str, Any]]) -> Row:
    """Return four numbers per accuracy: `final`, `last10`, `best_on_test`, `chosen_on_validation`.

    `last10` is the mean of the last ten evaluations. `best_on_test` is biased upwards, because its round is chosen on test examples. The
    round of `chosen_on_validation` is the first with the best validation accuracy; without validation examples, the value is None.
    """
    valid = [row.get("valid_accuracy") for row in rows]
    best = max((v, -i) for i, v in enumerate(valid) if v is not None) if any(v is not None for v in valid) else None
    chosen = None if best is None else rows[-best[1]]
    found: Row = {}
    for name in HEADLINES:
        series = [row[name] for row in rows if row.get(name) is not None]
        if not series:
            found[name] = None
            continue
        found[name] = {
            "final": series[-1],
            "last10": float(np.mean(series[-10:])),
            "best_on_test": max(series),
            "chosen_on_validation": None if chosen is None else chosen.get(name),
            "chosen_round": None if chosen is None else chosen["round"],
        } | {facet: rows[-1][f"{name}_{facet}"] for facet in FACETS if rows[-1].get(f"{name}_{facet}") is not None}
    last = rows[-1] if rows else {}
    return found | {name: last[name] for name in RECALLS if name in last}


def cost_to_target(rows: Sequence[Mapping[str, Any]], target: float | None, name: str = "personal_accuracy") -> Row:
    """Return the first evaluated round in which `name` reached `target`, and the bytes in both directions up to it; None if never."""
    if target is None:
        return {}
    first = next((row for row in rows if row.get(name) is not None and row[name] >= target), None)
    sent = None if first is None else first["uplink_bytes"] + first["downlink_bytes"]
    return {"target": target, "rounds_to_target": first and first["round"], "bytes_to_target": sent}


def number(value: float) -> float | None:
    """Return the value, or None if there were no examples to score (NaN)."""
    return None if math.isnan(value) else value


NOTHING_LEARNT = "every round was skipped, so the model was never trained; see events.jsonl for the reasons"


def nothing_learnt(summary: Mapping[str, Any]) -> bool:
    """Return whether no round of a run had anything to aggregate."""
    return 0 < int(summary.get("rounds", 0)) <= int(summary.get("skipped", 0))
