"""The results of a tuning: `tune.json`, which reports read, and `tuned.toml`, the config file for `fedloom compare`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tomli_w

from fedloom.config.settings import Settings
from fedloom.experiment.run_folder import RunFolder
from fedloom.objectives import Metric
from fedloom.report.tuning import values_words
from fedloom.tools.compare_rows import variant_table
from fedloom.tools.tuning.cells import Tried, best_of
from fedloom.tools.tuning.plan import Tuning
from fedloom.tools.tuning.space import Contender

RESULT, TUNED, PAGE = "tune.json", "tuned.toml", "tune.html"


def write_results(tuning: Tuning, folder: Path, tried: Mapping[str, list[Tried]], metric: Metric) -> None:
    """Write `tune.json`, which reports read. If every method has a chosen candidate, also write `tuned.toml`."""
    best = {label: best_of(found, metric) for label, found in tried.items()}
    settings = tuning.settings
    content = {
        "measure": f"valid_{metric.name}",
        "primary": metric._asdict(),
        "data": settings.data.name,
        "search": tuning.rules.search,
        "candidates": tuning.size,
        "tune_seed": tuning.rules.seed,
        "rounds": settings.rounds,
        "rungs": tuning.rungs(),
        "valid": settings.eval.valid,
        "seeds": list(tuning.seeds),
        "methods": [
            _facts(contender, tried[contender.label], best[contender.label], tuning.size)
            for contender in tuning.contenders
        ],
    }
    to = RunFolder(folder)
    to.write_json(RESULT, content)
    if all(best.values()):
        to.write(TUNED, _tuned(tuning, content, {label: one for label, one in best.items() if one}))


def _facts(contender: Contender, tried: Sequence[Tried], best: Tried | None, n: int) -> dict[str, Any]:
    """Return the contents of `tune.json` for one method. `n` is the number of candidates that the search should have tried."""
    edges = dict(contender.edges(best.values)) if best else {}
    warnings = [
        f"{contender.label}: {_edge_words(key, best.values[key], which)}" for key, which in edges.items() if best
    ]
    if best is None:
        warnings.append(f"{contender.label}: no candidate has a score; {tried[0].failed}")
    if len(tried) < n:
        warnings.append(
            f"{contender.label}: only {len(tried)} of {n} candidates were tried, because the search proposed the same candidates again"
        )
    spread = [{**asdict(one), "mean": one.mean, "std": _std(one)} for one in tried]
    return {
        "label": contender.label,
        "method": contender.row.method["name"],
        "keys": list(contender.space),
        "tried": spread,
        "best": tried.index(best) if best else None,
        "warnings": warnings,
    }


def _edge_words(key: str, value: Any, which: str) -> str:
    other = {"smallest": "smaller", "largest": "larger"}[which]
    return f"{key}={value} is at the edge of what was tried; try {other} values"


def _std(one: Tried) -> float | None:
    return statistics.stdev(one.scores.values()) if len(one.scores) > 1 and not one.failed else None


def _tuned(tuning: Tuning, content: Mapping[str, Any], best: Mapping[str, Tried]) -> str:
    """Return the text of the config file for `fedloom compare`, with comments that list the candidates that were tried."""
    values = {key: value for key, value in tuning.values.items() if key not in ("tune", "method", "variant", "reading")}
    names = {contender.label: contender.row.method["name"] for contender in tuning.contenders}
    plain = {label: name for label, name in names.items() if label == name.rpartition(":")[2]}
    base = {key: value for key, value in values.items() if key in Settings.model_fields and key != "seed"}
    comments = _comments(tuning, content)
    if tuning.settings.stop.patience is None and "eval" in base:
        base["eval"] = {key: value for key, value in base["eval"].items() if key != "valid"}
    elif tuning.settings.stop.patience is not None:
        base["eval"] = {**base.get("eval", {}), "valid": tuning.settings.eval.valid}
    tables: dict[str, Any] = {"variant": {}}
    for contender in tuning.contenders:
        row = contender.row._replace(method={**contender.row.method, **best[contender.label].values})
        table = variant_table(row)
        if contender.label in plain:
            del table["method"]
            tables[contender.label] = table
        else:
            tables["variant"][contender.label] = table
    told = {"title": values["title"]} if "title" in values else {}
    listed = [plain.get(label, label) for label in names]
    body = {**told, "method": listed, "seed": list(tuning.seeds), **base, **{k: v for k, v in tables.items() if v}}
    return f"{comments}\n{tomli_w.dumps(body)}"


def _comments(tuning: Tuning, content: Mapping[str, Any]) -> str:
    """Return comments that list the candidates that were tried, with their scores."""
    held_out = (
        f"{100 * content['valid']:g} % of each client's training examples" if content["valid"] else "from the partition"
    )
    lines = [
        f"Tuned by fedloom tune on {content['measure']} ({held_out}) after {content['rounds']} rounds:",
        f"{content['search']} search, {content['candidates']} candidates of every method,"
        f" {'mean of seeds' if len(tuning.seeds) > 1 else 'seed'} {', '.join(map(str, tuning.seeds))}. Test examples were not used.",
        "",
        f"  fedloom compare {TUNED}",
        "",
    ]
    for facts in content["methods"]:
        lines.append(f"{facts['label']}:")
        lines += [
            f"  {_line(one, content)}{'  <- chosen' if place == facts['best'] else ''}"
            for place, one in enumerate(facts["tried"])
        ]
        lines += [f"  warning: {warning.partition(': ')[2]}" for warning in facts["warnings"]]
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)


def _line(one: Mapping[str, Any], content: Mapping[str, Any]) -> str:
    """Return a candidate and its score, such as `lr=0.1  0.8915 ±0.0344`."""
    score = one["failed"] or f"{one['mean']:.4f}" + ("" if one["std"] is None else f" ±{one['std']:.4f}")
    short = f" (stopped after {one['rounds']} rounds)" if one["rounds"] < content["rounds"] else ""
    return f"{values_words(one['values'])}  {score}{short}"
