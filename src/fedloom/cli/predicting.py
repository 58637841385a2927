"""The command `fedloom predict`."""

from __future__ import annotations

import csv
import io
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedloom.cli.words import Parser, new_file, plain_and_options, save_text
from fedloom.errors import ConfigError

if TYPE_CHECKING:
    from fedloom.api.runs import Run

log = logging.getLogger(__name__)

EXAMPLES = """\
  fedloom predict runs/mine people.csv client=3        a table: one line per row, with the prediction of client 3's model
  fedloom predict runs/mine a.png b.png client=server  pictures, with the server's model
  fedloom predict runs/mine windows.npy client=ann     arrays; clients may have names (partition=natural)
  fedloom predict runs/mine people.csv client=0 out=predictions.csv

Files are read as in training: columns are found by name, values that did not occur in training count as unknown. The training data are
read only if the method adapts a model to the client's examples before it predicts; adapt=false predicts without this.
Probabilities: of the predicted class; for multilabel, of every label. Predictions of numbers are in the units of the data.
"""
KEYS = ("client", "out", "adapt")


def predict_command(words: Sequence[str]) -> int:
    """Run `fedloom predict` and return its exit code."""
    parser = Parser("predict", "Predict new files with a model of a run, and print the predictions as CSV.", EXAMPLES)
    parser.add_argument("words", nargs="*", metavar="RUN FILE ... key=value", help="a run folder, files, and client=I")
    parser.add_argument("--client", metavar="I", help="whose model predicts: a number, a name, or server (or client=I)")
    given = parser.read(words)
    plain, options = _divided(given.words, given.client)
    if len(plain) < 2:
        raise ConfigError("fedloom predict: give the folder of a run and files, such as runs/mine people.csv client=0")
    target = new_file(options["out"], "out") if "out" in options else None
    from fedloom.api.runs import open as open_run

    run = open_run(plain[0])
    if "client" not in options:
        raise ConfigError(f"client: set whose model predicts: client=0 to {run.n_clients - 1}, or client=server")
    if run.objective.task == "language":
        raise ConfigError(
            "fedloom predict: a language model predicts the next token; generate text in Python with run.generate"
        )
    text = _csv(list(_rows(run, plain[1:], options)))
    if target is None:
        sys.stdout.write(text)
    else:
        save_text(text, target, "out")
    return 0


def _divided(words: Sequence[str], client: str | None) -> tuple[list[str], dict[str, str]]:
    """Return the folder and files, and the options."""
    plain, options = plain_and_options(words, KEYS, "fedloom predict has no key")
    if client is not None:
        if "client" in options:
            raise ConfigError(f"--client {client}: client={options['client']} is given too; remove one of them")
        options["client"] = client
    if options.get("adapt", "true") not in ("true", "false"):
        raise ConfigError(f"adapt={options['adapt']}: must be true or false")
    return plain, options


def _rows(run: Run, files: Sequence[str], options: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Yield one row of the output for each example."""
    client = _client(run, options["client"])
    adapt = options.get("adapt", "true") == "true"
    pictures = run.preprocess.spec.is_picture
    for file in files:
        for i, answer in enumerate(_answers(run, client, file, adapt), start=1):
            row: dict[str, Any] = {"file": file} if pictures or len(files) > 1 else {}
            yield row | ({} if pictures else {"row": i}) | answer


def _client(run: Run, text: str) -> int | str:
    """Return the name of an owner or, if no owner has this name, a client's number, or a word such as server."""
    if text in run.owners:
        if text.isdecimal() and (number := run.owners.index(text)) != int(text):
            log.warning("client=%s: taken as the name of an owner, whose client has the number %d", text, number)
        return text
    return int(text) if text.isdecimal() else text


def _answers(run: Run, client: int | str, file: str, adapt: bool) -> Iterator[dict[str, str]]:
    names = run.objective.names
    if run.objective.task == "regression":
        for values in run.predict(client, file, adapt=adapt).reshape(-1, len(names)):
            shown = [f"{value:.6g}" for value in values]
            yield dict(zip(names if len(names) > 1 else ("prediction",), shown, strict=True))
        return
    for chances in run.predict_proba(client, file, adapt=adapt).to_numpy():
        if run.objective.task == "classification":
            best = int(chances.argmax())
            yield {"prediction": names[best], "probability": f"{chances[best]:.4f}"}
        else:
            found = ", ".join(name for name, p in zip(names, chances, strict=True) if p > 0.5)
            each = {f"probability of {name}": f"{p:.4f}" for name, p in zip(names, chances, strict=True)}
            yield {"prediction": found, **each}


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()
