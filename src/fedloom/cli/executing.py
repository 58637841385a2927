"""Run experiments for `fedloom run` and `fedloom compare`, and show their results."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console

from fedloom.cli.tables import show
from fedloom.cli.words import output
from fedloom.config.parsing import read_toml
from fedloom.errors import UsageError
from fedloom.experiment.loop import Experiment
from fedloom.experiment.manifest import MANIFEST, combined_digest, read_manifest
from fedloom.experiment.metrics import NOTHING_LEARNT, nothing_learnt
from fedloom.experiment.progress import facts, live
from fedloom.experiment.run_folder import RunFolder
from fedloom.experiment.stopping import stopped_in_words
from fedloom.tools.compare import Comparison, PlannedRun, execute, progress_of, title_of

if TYPE_CHECKING:
    from fedloom.experiment.signing import Signer
    from fedloom.report import Chapter

DIGITS = 32  # number of digits of a digest that are shown, so that lines stay short


def run_one(experiment: Experiment, label: str, quiet: bool) -> None:
    """Run an experiment. Unless `quiet`, print its facts and show progress."""
    if quiet:
        experiment.run()
        return
    announce({"method": label, **facts(experiment)})
    with live(label, done=experiment.done) as progress:
        experiment.run(progress)


def run_all(wanted: Comparison, folder: Path, quiet: bool, accept_changes: bool = False) -> list[Path]:
    """Run the unfinished runs of a comparison. Unless `quiet`, print the plan and show progress."""
    if quiet:
        return execute(wanted, folder, accept_changes=accept_changes)
    jobs = wanted.jobs(folder)
    announce(_plan(wanted, jobs, folder))
    console = Console(stderr=True)
    finished = sum(job.settings.rounds for job in jobs if job.finished)
    with live("compare", console, done=finished) as progress:

        def on_start(job: PlannedRun, experiment: Experiment) -> None:
            about = facts(experiment)
            shown = "; ".join(f"{topic} {about[topic]}" for topic in ("data", "clients", "steps"))
            console.print(f"{title_of(jobs, job)}: {shown}", highlight=False, markup=False, soft_wrap=True)

        return execute(wanted, folder, progress_of(jobs, progress), on_start, accept_changes)


def sign(runs: Sequence[Path], signer: Signer | None, silent: bool) -> None:
    """Sign finished runs if there is a signer. Unless `silent`, print the fingerprint of the signer's key."""
    for folder in runs if signer else ():
        fingerprint = signer.sign(folder) if signer else ""
        if not silent:
            print(f"fedloom: {folder}: signed by {fingerprint}", file=sys.stderr)


def _digest(runs: Sequence[Path], folder: Path) -> str:
    """Return the first part of the digest of a run, or of all runs of a comparison, which `fedloom verify` prints completely."""
    records = {run.relative_to(folder).as_posix(): read_manifest(run / MANIFEST) for run in runs}
    digests = {name: str(record["digest"]) for name, record in records.items() if record}
    if len(digests) < len(runs):
        return "none, because an earlier version wrote some runs"
    return digests["."][:DIGITS] if list(runs) == [folder] else f"{combined_digest(digests)[:DIGITS]} (of all runs)"


def _plan(wanted: Comparison, jobs: Sequence[PlannedRun], folder: Path) -> dict[str, str]:
    n_finished = sum(job.finished for job in jobs)
    done = f", of which {n_finished} are done" if n_finished else ""
    return {
        "methods": ", ".join(row.label for row in wanted.rows),
        "seeds": ", ".join(map(str, wanted.seeds)),
        "runs": f"{len(jobs)} of {jobs[0].settings.rounds} rounds each{done}",
        "data": jobs[0].settings.data.name,
        "folder": str(folder),
    }


def announce(about: Mapping[str, str]) -> None:
    """Print a summary of a run to standard error, with one line per topic."""
    width = max(map(len, about))
    for topic, words in about.items():
        print(f"{topic:<{width}}  {words}", file=sys.stderr, flush=True)


class Finished(NamedTuple):
    """The folders of runs that are compared, with the title of the comparison and the text on how to read it."""

    runs: Sequence[Path]
    title: str = ""
    reading: str = ""


def conclude(parts: Sequence[Finished], folder: Path, as_json: bool, quiet: bool) -> int:
    """Write the report, print tables and warnings, and return the exit code, which is 1 if a run learnt nothing."""
    from fedloom.report import (
        Chapter,
        read,
        shared_primary,
    )  # imports pandas, which must happen after worker processes are forked

    chapters = [Chapter(read(part.runs), part.title, part.reading) for part in parts]
    for chapter in chapters:
        shared_primary(chapter.records)  # raises an error that `_write_page` would show as a hint
    hint = _write_page(chapters, folder / "report.html")
    runs = [run for part in parts for run in part.runs]
    if as_json:
        _print_json(runs, folder)
    elif quiet:
        print(folder)
    else:
        console = output()
        for chapter in chapters:
            _show_chapter(console, chapter)
        console.print(f"digest  {_digest(runs, folder)}", soft_wrap=True)
        console.print(f"folder  {folder}", soft_wrap=True)
        console.print(hint or f"report  {folder / 'report.html'}", soft_wrap=True)
    for run_folder in runs:
        _tell_early_stop(run_folder)
        _warn_of_divergence(run_folder)
        _warn_of_screening(run_folder)
    idle = [run_folder for run_folder in runs if nothing_learnt(RunFolder.open(run_folder).summary())]
    for run_folder in idle:
        print(f"fedloom: error: {run_folder}: {NOTHING_LEARNT}", file=sys.stderr)
    return int(bool(idle))


def _show_chapter(console: Console, chapter: Chapter) -> None:
    """Print a comparison: its title, its tables, and the text on how to read them."""
    from fedloom.report import generalisation_table, paired_table, summary_table

    if chapter.title:
        console.print(chapter.title, style="bold")
    show(console, summary_table(chapter.records))
    more = [paired_table(chapter.records), generalisation_table(chapter.records)] if len(chapter.records) > 1 else []
    for table in more:
        if table is not None:
            console.print()
            show(console, table)
    if chapter.reading:
        console.print(f"\n{chapter.reading}")
    console.print()


def _write_page(chapters: Sequence[Chapter], target: Path) -> str:
    """Write the report page. Return a hint if a required package is missing."""
    from fedloom.report import write_chapters

    try:
        write_chapters(chapters, target)
    except UsageError as error:
        return f"hint    {error}"
    return ""


def _print_json(runs: Sequence[Path], folder: Path) -> None:
    texts = [(run_folder / "summary.json").read_text(encoding="utf-8").strip() for run_folder in runs]
    if runs == [folder]:
        print(texts[0])
    else:
        print("[" + ",\n".join(texts) + "]")


def _tell_early_stop(folder: Path) -> None:
    """Print a line for a run that stopped early."""
    run = RunFolder.open(folder)
    if stopped := run.summary().get("stopped_early"):
        planned = read_toml(folder / "config.toml")["rounds"]
        print(f"fedloom: {folder}: {stopped_in_words(stopped, planned)}", file=sys.stderr)


def _warn_of_divergence(folder: Path) -> None:
    run = RunFolder.open(folder)
    found = [
        (row["round"], f"{key} was not finite")
        for row in run.rows()
        for key, value in row.items()
        if "." in key and (value is None or not math.isfinite(value))
    ]
    words = {"rejected": "an uplink was rejected", "unusable log": "a log was left out"}
    for event in run.rows("events.jsonl"):  # metrics do not include these
        if event["event"] in words and "not finite" in event.get("reason", ""):
            found.append((event["round"], f"{words[event['event']]} ({event['reason']})"))
    if found:
        number, what = min(found, key=lambda one: one[0])
        line = f"{folder}: {what} in round {number}; training diverges; try a smaller method.lr"
        print(f"fedloom: warning: {line}", file=sys.stderr)


def _warn_of_screening(folder: Path) -> None:
    """Print a line for each excluded client, and for each round that was rolled back."""
    for event in RunFolder.open(folder).rows("events.jsonl"):
        if event["event"] == "excluded":
            who = ", ".join(map(str, event["clients"]))
            what = f"clients {who} were excluded in round {event['round']}, because {event['reason']}"
        elif event["event"] == "rolled back":
            what = f"round {event['round']} was rolled back, because {event['reason']}"
        else:
            continue
        print(f"fedloom: warning: {folder}: {what}; see events.jsonl", file=sys.stderr)
