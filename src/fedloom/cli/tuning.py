"""The command `fedloom tune`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedloom.cli.mistakes import refuse_mistakes
from fedloom.cli.running import refuse_settings, until_interrupted
from fedloom.cli.words import Parser, accept_option, output_options, read_values, settings_words
from fedloom.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from fedloom.experiment.loop import OnRound
    from fedloom.experiment.progress import Show
    from fedloom.tools.compare import PlannedRun
    from fedloom.tools.tuning.plan import Tuning

EXAMPLES = """\
  fedloom tune method=fedavg,fedprox fedavg.lr=0.05,0.1,0.2,0.4 fedprox.lr=0.1,0.2 fedprox.mu=0.01,0.1 seed=0,1
  fedloom tune method=fedavg,fedrir method.lr=0.001..1 tune.candidates=8        8 candidates of each method, drawn at random
  fedloom tune method=fedavg,fedrir method.lr=0.001..1 tune.candidates=8 tune.search=halving
  fedloom tune configs/digits.toml fedavg.lr=0.1,0.2 local.lr=0.1,0.2 fedmr.lr=0.05,0.1 fedrir.lr=1e-3,4e-3 out=runs/tuned
  fedloom tune --resume runs/tuned                     continue; finished runs are kept
  fedloom compare runs/tuned/tuned.toml                compare the methods with the chosen values, on test examples

A candidate is one combination of values of a method's hyper-parameters. A hyper-parameter has several values (lr=0.1,0.2) or a range
(lr=0.001..1, on a logarithmic scale if the ends differ by a factor of ten). The command chooses the candidate with the best mean over
seeds of the primary metric on validation examples (eval.valid, default 0.2). Every method needs the same number of candidates.

keys in addition to those of fedloom compare:
"""


def tune_command(words: Sequence[str]) -> int:
    """Run `fedloom tune` and return its exit code."""
    from fedloom.cli.keys import key_text, keys
    from fedloom.config.tuning import TuneSettings

    own = "\n".join(key_text(key) for key in keys(TuneSettings, "tune."))
    parser = Parser("tune", "Choose hyper-parameters of several methods on validation examples.", EXAMPLES + own)
    settings_words(parser)
    parser.add_argument("--resume", metavar="FOLDER", help="folder of an interrupted tuning, to continue it")
    accept_option(parser)
    output_options(parser)
    given = parser.read(words)
    if given.accept_changes and given.resume is None:
        raise ConfigError(f"--accept-changes: applies only to {parser.prog} --resume FOLDER")
    from fedloom.tools.tuning.folder import create_tuning, reopen_tuning
    from fedloom.tools.tuning.plan import plan_tuning

    if given.resume is not None:
        refuse_settings(given.words, "tune")
        folder, tuning = Path(given.resume), reopen_tuning(given.resume)
    else:
        refuse_mistakes(given.words)
        values = read_values(given.words)
        tuning = plan_tuning(values)
        folder = create_tuning(tuning, values.get("out"))
    again = f"fedloom tune --resume {folder}"
    until_interrupted(lambda: _run(tuning, folder, given.quiet, given.accept_changes), again)
    return _conclude(folder, given)


def _run(tuning: Tuning, folder: Path, quiet: bool, accept_changes: bool) -> None:
    from fedloom.tools.tuning.folder import run_tuning

    if quiet:
        run_tuning(tuning, folder, accept_changes=accept_changes)
        return
    from fedloom.cli.executing import announce
    from fedloom.experiment.progress import live
    from fedloom.tools.tuning.cells import rounds_reached

    announce(
        {
            "methods": ", ".join(contender.label for contender in tuning.contenders),
            "search": f"{tuning.rules.search}, {tuning.size} candidates of every method",
            "seeds": ", ".join(map(str, tuning.seeds)),
            "rounds": ", ".join(map(str, tuning.rungs())),
            "data": tuning.settings.data.name,
            "folder": str(folder),
        }
    )
    done = sum(map(rounds_reached, folder.glob("*-seed*")))
    with live("tune", done=done) as shown:
        run_tuning(tuning, folder, TuningProgress(tuning, shown, done), accept_changes)


class TuningProgress:
    """Shows the progress of all runs of a tuning. Scores on test examples are not shown."""

    def __init__(self, tuning: Tuning, shown: Show, done: int) -> None:
        """`done` is the total number of rounds that the runs have already completed."""
        self._shown, self._done = shown, done
        self._total = len(tuning.contenders) * len(tuning.seeds) * tuning.budget

    def __call__(self, job: PlannedRun, until: int) -> OnRound:
        """Return the function that shows the progress of a run that ends or pauses at round `until`."""
        from fedloom.experiment.progress import Overall

        def on_round(done: int, rounds: int, row: Any) -> None:
            self._done += 1
            valid = {key: value for key, value in row.items() if key.startswith("valid_")}
            overall = Overall(self._done, max(self._total, self._done))
            self._shown(done, until, valid, f"{job.label}, seed {job.seed}", overall)

        return on_round


def _conclude(folder: Path, given: Any) -> int:
    """Write the page, print the tables and the warnings, and return the exit code, which is 1 if a method has no chosen setting."""
    from fedloom.cli.tables import show
    from fedloom.cli.words import output
    from fedloom.report import drawn
    from fedloom.report.tuning import read_tuning, tuning_grids, write_tuning_page
    from fedloom.tools.tuning.results import PAGE, RESULT, TUNED

    found = read_tuning(folder / RESULT)
    page = f"page    {folder / PAGE}"
    try:
        write_tuning_page(found, folder / PAGE)
    except UsageError as error:
        page = f"hint    {error}"
    tuned = all(method["best"] is not None for method in found["methods"])
    if given.json:
        print((folder / RESULT).read_text(encoding="utf-8").strip())
    elif given.quiet:
        print(folder)
    else:
        console = output()
        for grid in tuning_grids(found):
            show(console, drawn(grid))
            console.print()
        console.print(page, soft_wrap=True)
        if tuned:
            console.print(f"config  {folder / TUNED}  (fedloom compare {folder / TUNED})", soft_wrap=True)
    for method in found["methods"]:
        kind = "error" if method["best"] is None else "warning"
        for warning in method["warnings"]:
            print(f"fedloom: {kind}: {warning}", file=sys.stderr)
    return int(not tuned)
