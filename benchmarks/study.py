"""Save a study's final numbers and curves, by method and seed, in benchmarks/results/NAME.json, and plot them in NAME.png.

    python benchmarks/study.py NAME "the command that made all the runs" RUN [RUN ...]

A RUN is a run folder, or the folder of a comparison. Runs that are already in the file remain unless they are passed again. The script
prints a Markdown table of means over seeds and, if there are several seeds, of the spread (half the distance from minimum to maximum).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from fedloom.report.plots import metric_over_rounds
from fedloom.report.read import RunRecord, read

RESULTS = Path(__file__).parent / "results"
CURVES = (
    "personal_accuracy",
    "general_accuracy",
    "server_accuracy",
    "valid_accuracy",
    "server.slot_cosine",
    "server.prototype_cosine",
)
ENVIRONMENT = ("fedloom", "python", "torch", "numpy", "cpu", "cores", "threads")


def found(run: RunRecord) -> dict[str, Any]:
    """Return the numbers of one run: the accuracies of its last rounds, its bytes, its last logs and its curves (by evaluated round)."""
    rows, last = run.metrics, run.metrics.iloc[-1]
    ends = {
        "personal": last.personal_accuracy,
        "personal_last10": rows.personal_accuracy.tail(10).mean(),
        "personal_worst10": last.personal_accuracy_worst10,
        "general": last.general_accuracy,
        "server": last.server_accuracy,
        "valid": last.get("valid_accuracy"),
    }
    curves = {name: list(map(rounded, rows[name])) for name in CURVES if name in rows and rows[name].notna().any()}
    logs = {name: rounded(value) for name, value in last.items() if "." in str(name)}
    size = {
        "rounds": int(last["round"]),
        "uplink_bytes": int(last.uplink_bytes),
        "downlink_bytes": int(last.downlink_bytes),
    }
    return (
        {name: rounded(value) for name, value in ends.items()}
        | size
        | {"logs": logs, "round": rows["round"].tolist(), **curves}
    )


def rounded(value: Any) -> float | None:
    """Return a number, rounded to five digits, or None for a missing number."""
    return None if value is None or pd.isna(value) else float(f"{value:.5g}")


def table(runs: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Return a Markdown table of accuracies in percent, with one row per method."""
    columns = ("personal", "personal_last10", "personal_worst10", "general", "server", "valid")
    lines = ["| | " + " | ".join(columns) + " | MB up |", "|---" * (len(columns) + 2) + "|"]
    for method, seeds in runs.items():
        cells = [spread([run[column] for run in seeds.values()]) for column in columns]
        lines.append(f"| {method} | {' | '.join(cells)} | {next(iter(seeds.values()))['uplink_bytes'] / 1e6:.1f} |")
    return "\n".join(lines)


def spread(values: list[float | None]) -> str:
    """Return a text such as `71.3 ± 0.8`."""
    known = [100 * value for value in values if value is not None]
    if not known:
        return ""
    mean = f"{sum(known) / len(known):.1f}"
    return mean if len(known) == 1 else f"{mean} ± {(max(known) - min(known)) / 2:.1f}"


def record_of(label: str, seed: str, run: dict[str, Any]) -> RunRecord:
    """Return a record with the curves of a saved run, for plots."""
    curves = pd.DataFrame({name: run[name] for name in ("round", *CURVES) if name in run})
    return RunRecord(
        path=Path(label),
        name=label,
        config={"label": label, "seed": int(seed)},
        metrics=curves,
        clients=None,
        summary=None,
        environment={},
        partition={},
    )


def main(name: str, command: str, *folders: str) -> None:
    """Write the file and print the table."""
    file = RESULTS / f"{name}.json"
    runs: dict[str, dict[str, dict[str, Any]]] = json.loads(file.read_text())["runs"] if file.exists() else {}
    records = read(folders)
    for run in records:
        label = run.name.rsplit("-seed", 1)[0]
        runs.setdefault(label, {})[str(run.seed)] = found(run)
    runs = {label: dict(sorted(seeds.items())) for label, seeds in runs.items()}
    environment = {key: records[0].environment.get(key) for key in ENVIRONMENT}
    file.write_text(json.dumps({"command": command, "environment": environment, "runs": runs}) + "\n")
    drawn = [record_of(label, seed, run) for label, seeds in runs.items() for seed, run in seeds.items()]
    one_model = all("server_accuracy" in record.metrics for record in drawn)
    metric_over_rounds(drawn, "server" if one_model else "personal").savefig(RESULTS / f"{name}.png", dpi=100)
    print(table(runs))


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
