"""The command `fedloom analyse`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from fedloom.cli.tables import show
from fedloom.cli.words import Parser, new_picture, output, plain_and_options, save_picture
from fedloom.errors import ConfigError, suggest
from fedloom.experiment.progress import Overall, live
from fedloom.report import RunRecord, analysis_grids, drawn, read

EXAMPLES = """\
  fedloom analyse runs/digits                          one run, or all runs in a comparison's folder
  fedloom analyse runs/fedvtc --only samples
  fedloom analyse runs/fedmr runs/fedavg --only sharpness out=sharpness.png

parts (each is skipped for runs that it does not apply to):
  features   accuracy of linear probes that predict class and client from client features; plots of the features' principal components
  samples    images from client generators: nearest training images, SSIM and PSNR, accuracy of a classifier on them
  sharpness  loss around the server's model, largest eigenvalue of the Hessian, increase of the loss under noise on the weights

Results are written to RUN/analysis/, where they replace an earlier analysis of the same parts; `fedloom report` includes them. `out=FILE`
sets the file for the sharpness curves of all runs. Default: analysis-sharpness.png, in the folder if only one was given, otherwise in the
current folder.
"""
OPTIONS = ("out",)


def analyse_command(words: Sequence[str]) -> int:
    """Run `fedloom analyse` and return its exit code."""
    parser = Parser("analyse", "Analyse the models of finished runs (needs fedloom[analyse]).", EXAMPLES, OPTIONS)
    parser.add_argument("words", nargs="*", metavar="RUN", help="a run folder, or a folder of run folders")
    parser.add_argument("--only", metavar="PARTS", help="parts to analyse, such as features,samples; default: all")
    parser.add_argument("--quiet", action="store_true", help="print no progress and no tables")
    given = parser.read(words)
    from fedloom.analysis import PARTS  # matplotlib is an extra
    from fedloom.analysis import analyse as look_at

    folders, out = _folders(given.words)
    parts = _parts(given.only, PARTS)
    if out is not None and "sharpness" not in parts:
        raise ConfigError(
            f"out={out}: sets the file for the sharpness curves, but --only {given.only} excludes them; remove out"
        )
    records = read(folders)
    done, total = 0, len(records) * len(parts)
    with nullcontext() if given.quiet else live("analyse", unit="part") as progress:
        for record in records:

            def tell(part: str, name: str = record.name) -> None:
                nonlocal done
                if progress:  # called when a part begins, so this part is not complete yet
                    progress(done + 1, total, {}, f"{name}: {part}", Overall(done, total))
                done += 1

            look_at(record.path, parts, tell)
    records = read(folders)
    target = _write_curves(records, out or _default_target(folders)) if "sharpness" in parts else None
    _conclude(records, parts, target, given.quiet)
    return 0


def _folders(words: Sequence[str]) -> tuple[list[str], Path | None]:
    folders, options = plain_and_options(words, OPTIONS)
    if not folders:
        raise ConfigError("fedloom analyse: give the folder of a run, such as runs/digits")
    return folders, new_picture(options["out"], "out") if options else None


def _parts(only: str | None, known: Sequence[str]) -> list[str]:
    chosen = [part.strip() for part in only.split(",")] if only is not None else list(known)
    for part in chosen:
        if part not in known:
            raise ConfigError(f"--only {only}: unknown part '{part}'{suggest(part, known)}")
    return [part for part in known if part in chosen]


def _default_target(folders: Sequence[str]) -> Path:
    return (Path(folders[0]) if len(folders) == 1 else Path()) / "analysis-sharpness.png"


def _write_curves(records: Sequence[RunRecord], target: Path) -> Path | None:
    """Plot the sharpness curves of all runs in one figure, and return its file. Return None if no run has such curves."""
    from fedloom.report import plots

    if not plots.has_sharpness(records):
        return None
    figure = plots.sharpness(records)
    save_picture(figure, target, "out")
    return target


def _conclude(records: Sequence[RunRecord], parts: Sequence[str], curves: Path | None, quiet: bool) -> None:
    if quiet:
        return
    console = output()
    for grid in analysis_grids(records):
        show(console, drawn(grid))
        console.print()
    for record in records:
        for part in parts:
            reason = record.analysis.get(part, {}).get("left_out")
            if reason:
                console.print(f"{record.name}: skipped {part}: {reason}", soft_wrap=True)
        console.print(f"folder  {record.path / 'analysis'}", soft_wrap=True)
    if curves:
        console.print(f"curves  {curves}", soft_wrap=True)
