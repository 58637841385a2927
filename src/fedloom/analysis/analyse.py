"""Run the parts of an analysis and write their results."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fedloom._version import __version__
from fedloom.analysis import features, pictures, samples, sharpness
from fedloom.analysis.subject import Subject
from fedloom.errors import RunFolderError
from fedloom.experiment.build import arithmetic
from fedloom.experiment.loop import Experiment
from fedloom.experiment.run_folder import RunFolder
from fedloom.report.style import Figure, drawing

FILE = "analysis.json"
Tell = Callable[[str], None]  # receives the name of each part when it begins
Found = tuple[dict[str, Any], dict[str, tuple[Figure, str, str]]]  # numbers; (figure, title, note) by file name


def analyse(path: str | Path, parts: Sequence[str], tell: Tell) -> dict[str, Any]:
    """Analyse one run, write `analysis.json` and images to `RUN/analysis/`, and return the contents of the file.

    Results of earlier analyses are kept, except those of `parts`, which are replaced. If a part does not apply to the method (no
    generator, no server model) or to the data (no classes, tokens), the reason is recorded instead.

    Raises:
        RunFolderError: the run has no checkpoint, or its folder is not writable.
    """
    experiment = Experiment.reopen(path)
    folder = RunFolder(Path(path) / "analysis")
    try:
        folder.path.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=folder.path):  # fail before the analysis, not after it
            pass
    except OSError as error:
        raise RunFolderError(f"{folder.path} is not writable: {error.strerror}") from None
    file = folder.path / FILE
    record = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"pictures": {}}
    record |= {"fedloom": __version__, "round": experiment.done}
    with arithmetic(experiment.settings):
        subject = Subject(experiment)
        for part in parts:
            tell(part)
            reason = subject.unsuitable(classes=part != "sharpness")
            numbers, drawn = ({"left_out": reason}, {}) if reason else WORK[part](subject)
            _write_pictures(folder.path, drawn)
            kept = {name: about for name, about in record["pictures"].items() if about["part"] != part}
            new = {name: {"part": part, "title": title, "note": note} for name, (_, title, note) in drawn.items()}
            record |= {part: _finite(numbers), "pictures": kept | new}
    folder.write_json(FILE, record)
    return record


def _features(subject: Subject) -> Found:
    numbers: dict[str, Any] = {}
    drawn = {}
    kinds = (
        ("own", features.own_rows, "Each client's own test examples in its own nets"),
        ("same", features.same_rows, "The same common test examples in every client's nets"),
    )
    for kind, rows, title in kinds:
        table = rows(subject)
        if table is None:
            continue
        numbers[kind] = features.measure_features(table, subject.rng("probe", kind))
        planes = {name: features.plane(x) for name, x in table.features.items()}
        figure = pictures.feature_planes(table, planes, subject.data.dataset.classes, title)
        drawn[f"features-{kind}.png"] = (
            figure,
            title,
            "First two principal components, with the fraction of variance explained by each.",
        )
    if factor := features.measure_factor(subject):
        numbers["factor"] = factor
    return numbers or {"left_out": "fewer than two clients have test examples"}, drawn


def _samples(subject: Subject) -> Found:
    found = samples.measure_generators(subject, subject.clients)
    if found is None:
        return {"left_out": "the method has no image generator, or no input for it"}, {}
    grid = pictures.sample_grid(found.sheets, subject.data.dataset.classes)
    note = "Nearest: the client's training image at the smallest mean squared distance."
    histogram = pictures.nearness(found)
    about = "Generated images and as many held-out real images, compared with their client's training images; dotted: highest similarity."
    return found.numbers, {
        "samples.png": (grid, "Generated images", note),
        "nearest.png": (histogram, "Similarity to training images", about),
    }


def _sharpness(subject: Subject) -> Found:
    found = sharpness.measure_sharpness(subject)
    return ({"left_out": "the method has no server model"} if found is None else found), {}


WORK: Mapping[str, Callable[[Subject], Found]] = MappingProxyType(
    {"features": _features, "samples": _samples, "sharpness": _sharpness}
)
PARTS = tuple(WORK)


def _write_pictures(folder: Path, drawn: Mapping[str, tuple[Figure, str, str]]) -> None:
    for name, (figure, _, _) in drawn.items():
        draft = folder / f".{name}.tmp"
        with drawing():
            figure.savefig(draft, format="png")
        draft.replace(folder / name)


def _finite(value: Any) -> Any:
    """Return the value with None instead of numbers that are not finite, because JSON cannot represent these."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
