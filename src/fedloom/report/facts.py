"""Settings of runs in words."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedloom.report.groups import Group, flat_settings, group
from fedloom.report.read import RunRecord, printable

PLAIN = ("rounds", "batch_size", "seed", "buffers")  # settings that are self-explanatory
NAMES = {"batch_size": "batch size", "models": "model"}
OPTIMISERS = {"sgd": "SGD", "adam": "Adam"}
SCHEMES = {
    "iid": "IID",
    "dirichlet": "Dirichlet over {by}, alpha {alpha}",
    "pathological": "{classes_per_client} {by} per client",
    "extended": "{classes_per_client} main {by} per client, alpha {alpha}",
    "quantity": "sizes by Dirichlet, alpha {alpha}",
    "natural": "by owner (column {column})",
    "file": "from a file",
    "own": "the data set's own",
    "given": "given in Python",
}


def settings_in_words(records: Sequence[RunRecord]) -> dict[str, str]:
    """Return the settings of the runs in words, with all different values of each setting."""
    found = {
        "data": _listed(map(_data, records)),
        "partition": _listed(map(partition_words, records)),
        "held out per client": _listed(map(_held_out, records)),
        "model": _listed(_shown_list(r.fact("models")) or r.fact("model") for r in records),
        "common model": _listed(r.fact("common_model") for r in records),
        "clients": _listed(map(_clients, records)),
        **{NAMES.get(key, key): _listed(record.fact(key) for record in records) for key in PLAIN},
        "runs": _runs(records),
    }
    return {key: value for key, value in found.items() if value}


def shown(value: object) -> str:
    """Return a setting as text that can be printed."""
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return printable(text)


def scheme(record: RunRecord) -> str:
    """Return all settings of a run's partition, such as `dirichlet alpha=0.1`."""
    content = record.partition.get("scheme")
    if not isinstance(content, Mapping):
        return ""
    known = ("name", "seed", "clients", "data", "n_train", "n_rows")  # already shown elsewhere
    rest = {key: value for key, value in flat_settings(content).items() if key not in known}
    parts = [shown(content.get("name", "")), *(f"{key}={shown(value)}" for key, value in rest.items())]
    return " ".join(parts).strip()


def partition_words(record: RunRecord) -> str:
    """Return the partition of a run in words, such as `Dirichlet over classes, alpha 0.1`."""
    content = record.partition.get("scheme")
    if not isinstance(content, Mapping):
        return ""
    values = {key: shown(value) for key, value in content.items()} | {"by": shown(content.get("by") or _groups(record))}
    try:
        words = SCHEMES[str(content.get("name"))].format_map(values)
    except KeyError:  # a scheme from another version
        return scheme(record)
    return words + (", equal shares" if content.get("balance") is True else "")


def owners(record: RunRecord) -> list[str]:
    """Return the names of the clients' owners, in the order of the clients, or an empty list if they have no names."""
    found = record.partition.get("clients")
    return [shown(name) for name in found] if isinstance(found, list) else []


def local_training(groups: Sequence[Group]) -> str:
    """Return the learning rate, optimiser and local steps of every method: `Local training: SGD, lr 0.005, 1 epoch, 13 steps (fedavg)`."""
    owners: dict[str, list[str]] = {}
    for g in groups:
        if words := _local_words(g):
            owners.setdefault(words, []).append(g.label)
    parts = [words if len(owners) == 1 else f"{words} ({', '.join(labels)})" for words, labels in owners.items()]
    return f"Local training: {'; '.join(parts)}." if parts else ""


def training_facts(members: Group) -> dict[str, Any]:
    """Return `lr`, `optimizer`, `local_epochs` and `steps` (mean per client and round) of a group's runs, as far as they are known."""
    settings = hyper_parameters(members.records[0])
    found = {key: settings[key] for key in ("lr", "optimizer", "local_epochs") if key in settings}
    clients = [r.clients["steps"].mean() for r in members.counted if r.clients is not None and "steps" in r.clients]
    return found | ({"steps": float(sum(clients) / len(clients))} if clients else {})


def hyper_parameters(record: RunRecord) -> dict[str, Any]:
    """Return the hyper-parameters of a run's method, including defaults if the run folder has them."""
    known, given = record.partition.get("hyper_parameters"), record.config.get("method")
    return {**(known if isinstance(known, Mapping) else {}), **(given if isinstance(given, Mapping) else {})}


def _local_words(members: Group) -> str:
    known, method = training_facts(members), hyper_parameters(members.records[0])
    if "lr" not in known:
        return ""
    name = str(known.get("optimizer", ""))
    parts = [OPTIMISERS.get(name, name), f"lr {shown(known['lr'])}"]
    parts += [f"{word} {shown(method[key])}" for key, word in (("momentum", "momentum"), ("weight_decay", "weight decay"))
              if method.get(key)]  # fmt: skip
    parts += _schedule_words(members.records[0].config.get("schedule"))
    if "local_epochs" in known:
        parts.append(f"{shown(known['local_epochs'])} epoch{'' if known['local_epochs'] == 1 else 's'}")
    if "steps" in known:
        parts.append(f"{known['steps']:.3g} steps per client and round")
    return ", ".join(part for part in parts if part)


def _schedule_words(schedule: object) -> list[str]:
    """Return a schedule of the learning rate in words, such as `cosine schedule` and `warm-up 5 rounds`."""
    if not isinstance(schedule, Mapping):
        return []
    name, warmup = schedule.get("name", "constant"), schedule.get("warmup", 0)
    return [f"{shown(name)} schedule"] * (name != "constant") + [f"warm-up {shown(warmup)} rounds"] * bool(warmup)


def _groups(record: RunRecord) -> str:
    return "classes" if record.primary.name == "accuracy" else "groups of targets"


def _held_out(record: RunRecord) -> str:
    """Return the held-out fractions of each client's examples, such as `25 % for testing`."""
    content = record.partition.get("scheme")
    known = content if isinstance(content, Mapping) else {}
    parts = [(known.get("test_fraction"), "for testing"), (known.get("valid"), "for validation")]
    shares = [f"{100 * value:g} % {aim}" for value, aim in parts if isinstance(value, int | float) and value > 0]
    return ", ".join(shares)


def _data(record: RunRecord) -> str:
    content = record.partition.get("scheme")
    rows = content.get("rows", content.get("n_rows")) if isinstance(content, Mapping) else None
    size = f" ({rows:,} examples)" if isinstance(rows, int) else ""
    return f"{shown(record.fact('data') or '')}{size}"


def _clients(record: RunRecord) -> str:
    """Return the number of clients, and the number of clients in a round."""
    n, cohort, fraction = (record.fact(key) for key in ("clients", "cohort", "participation"))
    if cohort:
        rest = f", {shown(cohort)} in a round"
    elif fraction in (1, None):
        rest = ", all in every round" if fraction else ""
    elif isinstance(fraction, int | float):
        rest = f", {100 * fraction:g} % in a round"
    else:
        rest = f", a fraction of {shown(fraction)} in a round"
    return f"{shown(n)}{rest}" if n else rest.removeprefix(", ")


def _runs(records: Sequence[RunRecord]) -> str:
    methods, seeds = len(group(records)), len({record.seed for record in records})
    if len(records) == 1:
        return ""
    plural = [f"{n} {word}{'' if n == 1 else 's'}" for n, word in ((methods, "method"), (seeds, "seed"))]
    return f"{len(records)} ({', '.join(plural)})"


def _shown_list(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else ""


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys(shown(value) for value in values if value not in (None, "", [])))
