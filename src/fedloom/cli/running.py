"""The commands `fedloom run`, `fedloom compare` and `fedloom demo`."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedloom import config
from fedloom.cli.mistakes import refuse_mistakes
from fedloom.cli.words import (
    Interrupted,
    Parser,
    accept_option,
    output_options,
    read_values,
    settings_words,
    sign_option,
)
from fedloom.errors import ConfigError

if TYPE_CHECKING:
    from fedloom.config.settings import Values
    from fedloom.tools.compare import Comparison

DEMO = ("fedrir", "fedvtc", "fedmr")  # config files in fedloom/config/demo
RUN_EXAMPLES = """\
  fedloom run                                          FedAvg on scikit-learn's digits, 10 clients with skewed labels
  fedloom run method=fedrir method.lr=1e-3 rounds=50 partition.alpha=0.5
  fedloom run configs/mnist-fedrir.toml seed=1 --json
  fedloom run method=my.py:Mine model=my.py:Net out=runs/mine
  fedloom run --resume runs/mine                       continue an interrupted run, with the same results bit for bit
  fedloom run --resume runs/mine rounds=40             go on longer, also if the run is finished
  fedloom run method=fedrir --sign ~/.ssh/id_ed25519   sign the finished run (fedloom verify --key checks it)

"""
COMPARE_EXAMPLES = """\
  fedloom compare method=local,fedavg,fedrir seed=0,1,2 rounds=20
  fedloom compare method=fedavg,fedprox method.lr=0.02 fedprox.mu=0.1
  fedloom compare method=fedavg,fedprox method.lr=0.1,0.01   a row for each value: fedavg-lr0.1, fedavg-lr0.01, ...
  fedloom compare configs/digits.toml out=runs/digits
  fedloom compare a.toml b.toml rounds=5               several comparisons, one report; each file may have title and reading
  fedloom compare --resume runs/digits                 continue; finished runs are kept

an ablation study (study.toml), each variant a row of the table:
  seed = [0, 1, 2]
  method = ["fedavg", "fedrir", "released"]            methods and variants; default: all variants
  [fedrir]                                             settings of fedrir and its variants
  lr = 1e-3
  [variant.released]
  method = "fedrir"
  idm_mode = "released"

method.KEY=VALUE sets a hyper-parameter of every method that has it; METHOD.KEY=VALUE sets it for one method. All other keys are
those of fedloom run, and apply to all methods.

"""
DEMO_EXAMPLES = """\
  fedloom demo                                         three comparisons, three to four minutes on two cores
  fedloom demo seed=0 rounds=5                         a first look, in half a minute
  fedloom demo out=runs/demo                           into this folder

"""


def run_command(words: Sequence[str]) -> int:
    """Run `fedloom run` and return its exit code."""
    from fedloom.cli.keys import key_help

    parser = Parser("run", "Run one experiment and write the results to its folder.", RUN_EXAMPLES + key_help())
    _options(parser, "folder of an interrupted run, to continue it")
    given = _read(parser, words)
    from fedloom.cli.executing import Finished, conclude, run_one, sign
    from fedloom.config.settings import make_settings
    from fedloom.experiment.loop import Experiment

    if given.resume is not None:
        experiment = Experiment.resume(
            given.resume, accept_changes=given.accept_changes, rounds=_more_rounds(given.words)
        )
    else:
        values = read_values(given.words)
        refuse_several(values)
        experiment = Experiment(make_settings(values))
    folder = experiment.folder.path
    label = experiment.settings.label or experiment.settings.method.name
    until_interrupted(lambda: run_one(experiment, label, given.quiet), f"fedloom run --resume {folder}")
    sign([folder], given.sign, given.quiet or given.json)
    return conclude([Finished([folder])], folder, given.json, given.quiet)


def compare_command(words: Sequence[str]) -> int:
    """Run `fedloom compare` and return its exit code."""
    description = "Run several methods on the same partition, initial weights and cohorts, and compare them."
    parser = Parser("compare", description, COMPARE_EXAMPLES + "keys: see fedloom run --help")
    _options(parser, "folder of an interrupted comparison, to continue it")
    given = _read(parser, words)
    from fedloom.cli.executing import Finished, conclude, run_all, sign
    from fedloom.tools.compare import create_folder, create_folders, reopen

    if given.resume is None:
        refuse_mistakes(given.words)
    files = [word for word in given.words if "=" not in word]
    if given.resume is not None:
        refuse_settings(given.words, "compare")
        folder, wanted = Path(given.resume), reopen(given.resume)
    elif len(files) > 1:
        wanted = create_folders(*_several(files, given.words))
        folder = next(iter(wanted)).parent
    else:
        comparison, out = _planned(given.words)
        folder = create_folder(comparison, out)
        wanted = {folder: comparison}
    done: list[Finished] = []

    def run_parts() -> None:
        for part, comparison in wanted.items():
            runs = run_all(comparison, part, given.quiet, given.accept_changes)
            done.append(Finished(runs, comparison.title, comparison.reading))

    until_interrupted(run_parts, f"fedloom compare --resume {folder}")
    sign([run for part in done for run in part.runs], given.sign, given.quiet or given.json)
    return conclude(done, folder, given.json, given.quiet)


def demo_command(words: Sequence[str]) -> int:
    """Run `fedloom demo`, which compares the three methods with their rivals on embedded data, and return its exit code."""
    description = (
        "Compare FedRIR, FedVTC and FedMR with simpler methods, on data that fedloom contains. "
        "key=value settings apply to all three comparisons."
    )
    parser = Parser("demo", description, DEMO_EXAMPLES + "keys: see fedloom run --help")
    parser.add_argument("words", nargs="*", metavar="key=value", help="settings that override the config files")
    output_options(parser)
    given = parser.read(words)
    for word in given.words:
        if "=" not in word:
            raise ConfigError(f"'{word}': fedloom demo has its own config files; expected key=value, such as seed=0")
    folder = Path(config.__file__).parent / "demo"
    return compare_command([*(str(folder / f"{name}.toml") for name in DEMO), *words])


def _several(files: Sequence[str], words: Sequence[str]) -> tuple[dict[str, Comparison], str | None]:
    """Return one comparison per config file, by file name, and `out`. The same `key=value` words override each file."""
    rest = [word for word in words if "=" in word]
    names = [Path(file).stem for file in files]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"'{name}': two config files have this name, but each comparison needs its own folder; rename one of them"
            )
    made = {name: _planned([file, *rest])[0] for name, file in zip(names, files, strict=True)}
    return made, read_values(rest).get("out")


def _planned(words: Sequence[str]) -> tuple[Comparison, str | None]:
    """Return a comparison and `out`. If arguments change the results, the `reading` in the config file no longer applies."""
    from fedloom.tools.compare import plan

    values = read_values(words)
    comparison, changes = plan(values), [w for w in words if "=" in w and not w.startswith(("out=", "engine", "log="))]
    if comparison.reading and changes and not any(word.startswith("reading=") for word in changes):
        left_out = f"The comment in the config file is not shown, because the command line changes its settings: {' '.join(changes)}."
        comparison = replace(comparison, reading=left_out)
    return comparison, values.get("out")


def _options(parser: Parser, resume: str) -> None:
    settings_words(parser)
    parser.add_argument("--resume", metavar="FOLDER", help=resume)
    accept_option(parser)
    sign_option(parser)
    output_options(parser)


def _read(parser: Parser, words: Sequence[str]) -> Any:
    """Parse the arguments of `run` or `compare`. `sign` becomes the object that signs, so that an invalid key is refused immediately."""
    given = parser.read(words)
    if given.accept_changes and given.resume is None:
        raise ConfigError(f"--accept-changes: applies only to {parser.prog} --resume FOLDER")
    if given.sign is not None:
        from fedloom.experiment.signing import Signer

        given.sign = Signer(given.sign)
    return given


def _more_rounds(words: Sequence[str]) -> int | None:
    """Return N from `rounds=N`, which is the only setting that a resumed run accepts."""
    refuse_settings([word for word in words if not word.startswith("rounds=")], "run")
    if not words:
        return None
    text = words[-1].removeprefix("rounds=")
    if len(words) > 1 or not text.isdecimal():
        raise ConfigError(f"{words[-1]}: must be one number of rounds")
    return int(text)


def refuse_settings(words: Sequence[str], command: str) -> None:
    """Raise ConfigError if there are settings next to `--resume`."""
    if words:
        but = ", except a higher rounds=N" if command == "run" else ""
        raise ConfigError(
            f"'{words[0]}': fedloom {command} --resume takes all settings from the folder{but}; remove this argument"
        )


def refuse_several(values: Values) -> None:
    """Raise ConfigError if there are settings that only a comparison can have."""
    from fedloom.config.hints import as_number
    from fedloom.tools.compare_rows import Row, grid_of, several

    method = values.get("method", {})
    name = method.get("name") if isinstance(method, Mapping) else method
    given = {key: found for key, value in (("method", name), ("seed", values.get("seed"))) if (found := several(value))}
    if isinstance(method, Mapping) and not given:
        grid = grid_of(Row("method", {**method, "name": name or "fedavg"}))
        # for `0,1`, the error about the value suggests 0.1
        given = {f"method.{key}": found for key, found in grid.items() if not as_number(method[key])}
    for key, found in given.items():
        shown = ",".join(map(str, found))
        raise ConfigError(f"{key}={shown}: a run takes one value; to use several, run fedloom compare")
    if "variant" in values:
        raise ConfigError("variant: applies only to comparisons; use fedloom compare")


def until_interrupted(work: Callable[[], Any], again: str) -> None:
    """Run `work`. Raise Interrupted on Ctrl-C, and on SIGTERM, which schedulers and service managers send.

    `again` is the command that continues the run.
    """
    ending: list[int] = []

    def end(number: int, frame: object) -> None:
        ending.append(number)
        signal.signal(number, signal.SIG_IGN)  # a second signal must not interrupt the clean-up
        raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()  # other threads cannot set signal handlers
    before = signal.signal(signal.SIGTERM, end) if main else None
    try:
        work()
    except KeyboardInterrupt:
        interrupted = Interrupted(again)
        interrupted.by_sigterm = bool(ending)
        raise interrupted from None
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)
