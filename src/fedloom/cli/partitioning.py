"""The command `fedloom partition`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from fedloom.cli.tables import show
from fedloom.cli.words import Parser, new_file, new_picture, output, read_values, save_picture, settings_words
from fedloom.config.settings import make_settings
from fedloom.data import Federation
from fedloom.errors import DataError
from fedloom.experiment.build import make_federation
from fedloom.methods.registry import METHODS
from fedloom.objectives import Classification

EXAMPLES = """\
  fedloom partition clients=20 partition.alpha=0.1
  fedloom partition data=mnist partition=pathological clients=50 out=mnist.json plot=mnist.png
  fedloom partition configs/digits.toml
  fedloom run partition=file partition.path=mnist.json data=mnist

keys: data.*, partition.*, clients, seed, eval.valid (see fedloom run --help), and
  out=FILE.json   write the example numbers of every client (files are never overwritten)
  plot=FILE.png   plot the number of examples by client and class (.png, .svg, .pdf; needs fedloom[report])
"""
SHOWN = 30  # maximum number of clients in the table; of more clients, the first and the last are shown
LAST = 5


def partition_command(words: Sequence[str]) -> int:
    """Run `fedloom partition` and return its exit code."""
    parser = Parser("partition", "Split a data set across clients and show the partition, without training.", EXAMPLES)
    settings_words(parser)
    given = parser.read(words).words
    own = [word for word in given if word.partition("=")[0] in ("out", "plot")]
    named = dict(word.split("=", 1) for word in own)
    files = {key: (new_picture if key == "plot" else new_file)(text, key) for key, text in named.items()}
    values = read_values([word for word in given if word not in own])
    values = {key: value for key, value in values.items() if key not in ("out", "method", "variant", *METHODS)}
    match values.get("seed"):
        case [first, *_]:  # the config of a comparison; use its first seed
            values["seed"] = first
    federation = make_federation(make_settings(values))
    console = output()
    show(console, _table(federation))
    console.print(f"\nhash    {federation.partition.hash()}", soft_wrap=True)
    if "out" in files:
        _save(federation, files["out"])
        console.print(f"rows    {files['out']}", soft_wrap=True)
    if "plot" in files:
        _draw(federation, files["plot"])
        console.print(f"plot    {files['plot']}", soft_wrap=True)
    return 0


def _table(federation: Federation) -> Table:
    p, strata = federation.partition, federation.dataset.strata()
    counts = p.counts(strata.of, len(strata.names))
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    groups = ("classes", "largest class") if _has_classes(federation) else ("groups", "largest group")
    for header in ("client", "train", "valid", "test", *groups):
        table.add_column(header, justify="right" if header != groups[1] else "left")
    n = p.n_clients
    for i in range(n) if n <= SHOWN else [*range(SHOWN - LAST), *range(n - LAST, n)]:
        if n > SHOWN and i == n - LAST:
            table.add_row(*["…"] * 6)
        top, rows = int(counts[i].argmax()), counts[i].sum()
        share = f"{100 * counts[i][top] / rows:.0f} %  {strata.names[top]}" if rows else "–"
        sizes = (federation.n_train(i), federation.n_valid(i), federation.n_test(i), int((counts[i] > 0).sum()))
        table.add_row(str(i), *map(str, sizes), share)
    sums = [sum(map(len, split)) for split in (p.train, p.valid, p.test)]
    table.add_section()
    table.add_row(
        "all", *map(str, sums), str(int((counts.sum(0) > 0).sum())), f"common test set: {len(p.common)} examples"
    )
    return table


def _has_classes(federation: Federation) -> bool:
    """Return whether the groups of examples that the table and the plot show are classes."""
    return isinstance(federation.objective, Classification)


def _save(federation: Federation, out: Path) -> None:
    try:
        federation.partition.save(out)
    except OSError as error:
        raise DataError(f"out={out}: cannot be written: {error.strerror}") from None


def _draw(federation: Federation, plot: Path) -> None:
    from fedloom.report.partition_plots import partition_figure  # matplotlib is an extra

    strata = federation.dataset.strata()
    counts = federation.partition.counts(strata.of, len(strata.names))
    figure = partition_figure(counts, strata.names, "class" if _has_classes(federation) else "group")
    save_picture(figure, plot, "plot")
