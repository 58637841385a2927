"""`fedloom run` and `fedloom compare`."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from fedloom.cli.keys import key_help
from fedloom.cli.words import Interrupted, Parser, output, read_values, settings_words
from fedloom.config.settings import Values, make_settings
from fedloom.errors import ConfigError, UsageError
from fedloom.experiment.loop import NOTHING_LEARNT, Experiment, OnRound, nothing_learnt
from fedloom.experiment.progress import live
from fedloom.experiment.run_folder import RunFolder
from fedloom.report import paired_table, read, summary_table, write_page
from fedloom.tools.compare import Comparison, Job, create, execute, plan, reopen

RUN_EXAMPLES = """\
  fedloom run                                          FedAvg on scikit-learn's digits, 10 skewed clients
  fedloom run method=fedrir method.lr=1e-3 rounds=50 partition.alpha=0.5
  fedloom run configs/mnist-fedrir.toml seed=1 --json
  fedloom run method=my.py:Mine model=my.py:Net out=runs/mine
  fedloom run --resume runs/mine                       goes on where it stopped, bit for bit

"""
COMPARE_EXAMPLES = """\
  fedloom compare method=local,fedavg,fedrir seed=0,1,2 rounds=20
  fedloom compare method=fedavg,fedprox method.lr=0.02 fedprox.mu=0.1
  fedloom compare configs/digits.toml out=runs/digits
  fedloom compare --resume runs/digits                 finished runs are kept

an ablation study (study.toml), each variant a row of the table:
  seed = [0, 1, 2]
  method = ["fedavg", "fedrir", "released"]            methods and variants; left out: all variants
  [fedrir]                                             for fedrir and its variants
  lr = 1e-3
  [variant.released]
  method = "fedrir"
  idm_mode = "released"

method.KEY=VALUE sets a hyper-parameter of every method that has it; METHOD.KEY=VALUE that of one. All other keys are those
of fedloom run, and are the same for all.

"""


def run(words: Sequence[str]) -> int:
    """`fedloom run`."""
    parser = Parser("run", "Run one experiment and write its folder.", RUN_EXAMPLES + key_help())
    _options(parser, "an interrupted run's folder, to be continued")
    given = parser.read(words)
    if given.resume is not None:
        _nothing_else(given.words, "run")
        experiment = Experiment.resume(given.resume)
    else:
        values = read_values(given.words)
        refuse_several(values)
        experiment = Experiment(make_settings(values))
    folder = experiment.folder.path
    label = experiment.settings.label or experiment.settings.method.name
    until_interrupted(lambda: _run_one(experiment, label, given.quiet), f"fedloom run --resume {folder}")
    return conclude([folder], folder, given.json, given.quiet)


def compare(words: Sequence[str]) -> int:
    """`fedloom compare`."""
    description = "Run several methods on the same partition, initial weights and cohorts, and compare them."
    parser = Parser("compare", description, COMPARE_EXAMPLES + "keys: see fedloom run --help")
    _options(parser, "an interrupted comparison's folder, to be continued")
    given = parser.read(words)
    if given.resume is not None:
        _nothing_else(given.words, "compare")
        folder, wanted = Path(given.resume), reopen(given.resume)
    else:
        values = read_values(given.words)
        wanted = plan(values)
        folder = create(wanted, values.get("out"))
    done: list[Path] = []
    again = f"fedloom compare --resume {folder}"
    until_interrupted(lambda: done.extend(_run_all(wanted, folder, given.quiet)), again)
    return conclude(done, folder, given.json, given.quiet)


def _options(parser: Parser, resume: str) -> None:
    settings_words(parser)
    parser.add_argument("--resume", metavar="FOLDER", help=resume)
    parser.add_argument(
        "--json", action="store_true", help="print the summary as JSON on standard output, and nothing else"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress; print the folder alone")


def _nothing_else(words: Sequence[str], command: str) -> None:
    if words:
        raise ConfigError(f"'{words[0]}': fedloom {command} --resume takes its settings from the folder alone")


def refuse_several(values: Values) -> None:
    """Settings that only a comparison can have."""
    method = values.get("method", {})
    name = method.get("name") if isinstance(method, Mapping) else method
    several = {"method": name, "seed": values.get("seed")}
    for key, value in several.items():
        if isinstance(value, list) or (isinstance(value, str) and "," in value):
            shown = ",".join(map(str, value)) if isinstance(value, list) else value
            raise ConfigError(f"{key}={shown}: a run has one {key}; use fedloom compare for several")
    if "variant" in values:
        raise ConfigError("variant: variants are rows of a comparison; use fedloom compare")


def until_interrupted(work: Callable[[], Any], again: str) -> None:
    try:
        work()
    except KeyboardInterrupt:
        raise Interrupted(again) from None


def _run_one(experiment: Experiment, label: str, quiet: bool) -> None:
    if quiet:
        experiment.run()
        return
    with live(label) as show:
        experiment.run(show)


def _run_all(wanted: Comparison, folder: Path, quiet: bool) -> list[Path]:
    if quiet:
        return execute(wanted, folder)
    jobs = wanted.jobs(folder)
    rounds = [job.settings.rounds for job in jobs]
    with live("compare", Console(stderr=True)) as show:

        def on_run(job: Job) -> OnRound:
            place = jobs.index(job)
            before, name = sum(rounds[:place]), f"[{place + 1}/{len(jobs)}] {job.label}, seed {job.seed}"

            def on_round(done: int, n_rounds: int, row: Mapping[str, Any]) -> None:
                show(before + done, sum(rounds), row, name)

            return on_round

        return execute(wanted, folder, on_run)


def conclude(runs: Sequence[Path], folder: Path, as_json: bool, quiet: bool) -> int:
    """Tables, page and warnings for finished runs. Returns the exit code: 1 where a run learnt nothing."""
    records = read(runs)
    hint = _write_page(records, folder / "report.html")
    if as_json:
        _print_json(runs, folder)
    elif quiet:
        print(folder)
    else:
        console = output()
        console.print(summary_table(records))
        paired = paired_table(records) if len(records) > 1 else None
        if paired is not None:
            console.print("", paired, sep="\n")
        console.print(f"\nfolder  {folder}", soft_wrap=True)
        console.print(hint or f"report  {folder / 'report.html'}", soft_wrap=True)
    for run_folder in runs:
        _warn_of_divergence(run_folder)
    idle = [run_folder for run_folder in runs if nothing_learnt(RunFolder.open(run_folder).summary())]
    for run_folder in idle:
        print(f"fedloom: error: {run_folder}: {NOTHING_LEARNT}", file=sys.stderr)
    return int(bool(idle))


def _write_page(records: Sequence[Any], target: Path) -> str:
    """Write the page; where that takes packages that are missing, the line that says so."""
    try:
        write_page(records, target)
    except UsageError as error:
        return f"hint    {error}"
    return ""


def _print_json(runs: Sequence[Path], folder: Path) -> None:
    texts = [(run_folder / "summary.json").read_text(encoding="utf-8").strip() for run_folder in runs]
    if runs == [folder]:
        print(texts[0])
    else:
        print("[" + ",\n".join(texts) + "]")


def _warn_of_divergence(folder: Path) -> None:
    run = RunFolder.open(folder)
    found = [
        (row["round"], f"{key} was not finite")
        for row in run.rows()
        for key, value in row.items()
        if "." in key and (value is None or not math.isfinite(value))
    ]
    for event in run.rows("events.jsonl"):  # the losses of those that were rejected are in no metric
        if "not finite" in event.get("reason", ""):
            found.append((event["round"], f"an uplink was rejected ({event['reason']})"))
    if found:
        number, what = min(found, key=lambda one: one[0])
        line = f"{folder}: {what} in round {number}; where training diverges, a smaller method.lr helps"
        print(f"fedloom: warning: {line}", file=sys.stderr)
