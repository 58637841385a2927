"""Results of `fedloom analyse` in run folders: tables and images."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from fedloom.report import units
from fedloom.report.read import RunRecord, printable
from fedloom.report.tables import EMPTY, Cell, Grid

PNG = b"\x89PNG\r\n\x1a\n"
FEATURES = {
    "class_probe": "class\nfound",
    "class_chance": "class\nby chance",
    "client_probe": "client\nfound",
    "client_from_class": "client from\nclass only",
    "client_chance": "client\nby chance",
    "class_silhouette": "silhouette\nof classes",
    "client_silhouette": "silhouette\nof clients",
}
FACTOR = {
    "factor_linear": "factor\nlinear",
    "factor_mlp": "factor\nMLP",
    "factor_from_class": "factor from\nclass only",
    "factor_chance": "factor\nby chance",
    "class_linear": "class\nlinear",
    "class_mlp": "class\nMLP",
    "class_chance": "class\nby chance",
}
ROWS = {"own": "own examples", "same": "same examples"}


class Picture(NamedTuple):
    """A PNG file of an analysis, as a data URI."""

    uri: str
    title: str
    note: str


def analysis_grids(records: Sequence[RunRecord]) -> list[Grid]:
    """Return one table for each analysed part."""
    return [
        grid for grid in (_features(records), _factor(records), _samples(records), _sharpness(records)) if grid.rows
    ]


def pictures(record: RunRecord) -> Iterator[Picture]:
    """Yield the images of one run's analysis. Files that are missing or not PNG are skipped."""
    known = record.analysis.get("pictures")
    for name, about in known.items() if isinstance(known, Mapping) else ():
        file = record.path / "analysis" / str(name)
        content = file.read_bytes() if file.name == name and file.is_file() else b""
        if content.startswith(PNG) and isinstance(about, Mapping):
            uri = f"data:image/png;base64,{base64.b64encode(content).decode()}"
            yield Picture(uri, printable(str(about.get("title", name))), printable(str(about.get("note", ""))))


def part_of(record: RunRecord, *path: str) -> dict[str, Any]:
    """Return a table of `analysis.json`, or an empty one if it is missing."""
    found: Any = record.analysis
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return dict(found) if isinstance(found, Mapping) else {}


def _number(value: Any, text: Callable[[float], str]) -> Cell:
    return Cell(text(value), value) if isinstance(value, int | float) and not isinstance(value, bool) else EMPTY


def _percent(value: Any) -> Cell:
    return _number(value, lambda x: units.points(x, 1))


def _features(records: Sequence[RunRecord]) -> Grid:
    rows = []
    for record in records:
        for kind, words in ROWS.items():
            for name in part_of(record, "features", kind):
                found = part_of(record, "features", kind, name)
                label = Cell(f"{record.name} · {printable(name)} · {words}")
                cells = [
                    _number(found.get(key), lambda x: f"{x:.2f}") if "silhouette" in key else _percent(found.get(key))
                    for key in FEATURES
                ]
                rows.append((label, *cells))
    caption = (
        "Accuracy of linear probes in percent. Own examples: each client's test split in its own nets; "
        "same: the common test set in every client's nets."
    )
    return Grid(
        title="Linear probes on features", headers=("Features", *FEATURES.values()), rows=tuple(rows), caption=caption
    )


def _factor(records: Sequence[RunRecord]) -> Grid:
    rows = [
        (
            Cell(f"{record.name} · {printable(name)}"),
            *(_percent(part_of(record, "features", "factor", name).get(key)) for key in FACTOR),
        )
        for record in records
        for name in part_of(record, "features", "factor")
    ]
    caption = (
        "Accuracy in percent of probes for the known client factor and for the class, on common test examples in each client's nets; "
        "mean over clients."
    )
    return Grid(
        title="Client factor in features", headers=("Features", *FACTOR.values()), rows=tuple(rows), caption=caption
    )


def _samples(records: Sequence[RunRecord]) -> Grid:
    rows = []
    for record in records:
        judged = part_of(record, "samples", "classifier")
        if judged:
            likeness = [
                _number(part_of(record, "samples", side, key).get(what), form)
                for key, form in (("ssim", _two), ("psnr_db", _one))
                for what in ("mean", "max")
                for side in ("made", "held_out")
            ]
            keys = ("accuracy", "accuracy_held", "accuracy_not_held", "accuracy_on_test_rows")
            rows.append((Cell(record.name), *likeness, *(_percent(judged.get(key)) for key in keys)))
    sides = [
        f"{name} {what}\n{side}"
        for name in ("SSIM", "PSNR")
        for what in ("mean", "max")
        for side in ("made", "held out")
    ]
    headers = ("Images", *sides, "recognised\nall", "own\nclasses", "other\nclasses", "real test\nexamples")
    caption = (
        "SSIM and PSNR compare images with the client's nearest training image. Held out: the same number of real test images. "
        "Recognised: accuracy of a centrally trained CNN."
    )
    return Grid(title="Generated images", headers=headers, rows=tuple(rows), caption=caption)


def _sharpness(records: Sequence[RunRecord]) -> Grid:
    rows = []
    for record in records:
        found = part_of(record, "sharpness")
        if "eigenvalue" in found:
            settled = "" if found.get("eigenvalue_converged") else " (not converged)"
            top = _number(found["eigenvalue"], lambda x, settled=settled: f"{x:.3g}{settled}")  # type: ignore[misc]
            rows.append(
                (
                    Cell(record.name),
                    _number(found.get("loss"), _three),
                    top,
                    _number(found.get("loss_increase"), _three),
                )
            )
    headers = ("Server's model", "training\nloss", "Hessian's largest\neigenvalue", "loss increase\nby 10 % noise")
    caption = "On training examples of all clients. 10 % noise: every parameter times 1 + 0.1 N(0, 1)."
    return Grid(title="Sharpness", headers=headers, rows=tuple(rows), caption=caption)


def _one(x: float) -> str:
    return f"{x:.1f}"


def _two(x: float) -> str:
    return f"{x:.2f}"


def _three(x: float) -> str:
    return f"{x:.3f}"
