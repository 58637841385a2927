"""Write one self-contained HTML page from run folders."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from fedloom.errors import UsageError
from fedloom.report import units
from fedloom.report.facts import hyper_parameters, scheme, settings_in_words, shown
from fedloom.report.generalisation import generalisation_grid
from fedloom.report.groups import flat_settings, headline, other_metrics, run_total
from fedloom.report.looked_at import analysis_grids, pictures
from fedloom.report.read import RunRecord, printable
from fedloom.report.tables import Cell, Grid, f1_grid, not_counted, paired_grid, recall_grid, summary_grid
from fedloom.report.waiting import Waiting, waiting_grid

MEASURES = {
    ("personal", ""): "personal",
    ("personal", "trained"): "personal, trained clients only",
    ("personal", "fitted"): "personal, after local training",
    ("general", ""): "general",
    ("server", ""): "server",
    ("shared_head", ""): "shared head",
    ("changed", ""): "client factor changed",
}
STATISTICS = {
    "final": "final",
    "last10": "mean of last 10",
    "chosen_on_validation": "chosen on validation",
    "best_on_test": "best on test",
    "uniform": "mean over clients",
    "std": "std over clients",
    "worst10": "worst 10 %",
    "held": "classes held",
    "not_held": "classes not held",
}


class Chapter(NamedTuple):
    """Runs that are compared with each other, with a title and a few sentences on how to interpret the numbers."""

    records: Sequence[RunRecord]
    title: str = ""
    reading: str = ""


@dataclass(frozen=True, kw_only=True)
class Detail:
    """The details of one run on the page."""

    title: str
    finished: bool
    progress: str
    command: str
    scores: Grid
    tables: Mapping[str, Mapping[str, str]]


def write_page(
    records: Sequence[RunRecord], path: str | Path, waiting: Waiting | None = None, baseline: str | None = None
) -> None:
    """Write a report of `records` to `path`, as one self-contained HTML file. The write is atomic.

    With `waiting`, the report also shows how long the runs would take on devices and networks. For `baseline`, see `paired_table`.

    Raises:
        UsageError: there are no records, they have different primary metrics, `baseline` is not among them, matplotlib or Jinja is not
            installed, or `path` cannot be written.
    """
    _write([Chapter(records)], path, waiting, baseline)


def write_chapters(chapters: Sequence[Chapter], path: str | Path) -> None:
    """Write one page for several comparisons, which may have different primary metrics. See `write_page`."""
    _write(chapters, path)


def _write(
    chapters: Sequence[Chapter], path: str | Path, waiting: Waiting | None = None, baseline: str | None = None
) -> None:
    if not all(chapter.records for chapter in chapters):
        raise UsageError("a report needs at least one run")
    target = Path(path)
    if target.is_dir():
        raise UsageError(f"cannot write the report to '{target}': it is a folder")
    several = len(chapters) > 1
    content = (
        _content(chapter, waiting, baseline, f"part{place}-" if several else "")
        for place, chapter in enumerate(chapters, start=1)
    )
    every = [record for chapter in chapters for record in chapter.records]
    write_content(content, f"{len(chapters)} comparisons" if several else chapters[0].title or _title(every), target)


def write_content(chapters: Iterable[Mapping[str, Any]], title: str, target: Path) -> None:
    """Write a page atomically from the values of its chapters (see `_content`). Raise UsageError if it cannot be written."""
    page = _render(chapters, title)
    draft = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(page, encoding="utf-8")
        draft.replace(target)
    except OSError as error:
        raise UsageError(f"cannot write the report to '{target}': {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()


def _render(chapters: Iterable[Mapping[str, Any]], title: str) -> str:
    try:
        import jinja2
    except ImportError as missing:
        raise UsageError("the report page needs Jinja: pip install 'fedloom[report]'") from missing
    source = resources.files("fedloom.report").joinpath("page.html").read_text(encoding="utf-8")
    jinja = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    content = list(chapters)
    return jinja.from_string(source).render(title=title, chapters=content, several=len(content) > 1)


def _content(chapter: Chapter, waiting: Waiting | None, baseline: str | None, prefix: str) -> dict[str, Any]:
    """Return the values of a chapter for the page's template. `prefix` makes the ids in its figures unique on the page."""
    from fedloom.report.page_figures import for_page, sections  # matplotlib is an extra

    records = chapter.records
    return {
        "title": chapter.title or _title(records),
        "reading": chapter.reading,
        "facts": settings_in_words(records),
        "unfinished": [record for record in records if not record.finished],
        "warnings": [],
        "grids": [
            summary_grid(records, digits=2),
            paired_grid(records, baseline, digits=2),
            generalisation_grid(records, digits=2),
            waiting_grid(records, waiting) if waiting else None,
            recall_grid(records),
            f1_grid(records),
            *analysis_grids(records),
        ],
        "sections": for_page(sections(records, waiting), prefix),
        "looked_at": [(record.name, list(pictures(record))) for record in records if record.analysis],
        "details": [_detail(record) for record in records],
    }


def _title(records: Sequence[RunRecord]) -> str:
    methods = list(dict.fromkeys(record.method for record in records))
    return " · ".join(methods) if len(methods) <= 6 else f"{len(methods)} methods"


def _detail(record: RunRecord) -> Detail:
    primary = record.primary
    rows = [
        (Cell(label), *(_score_cell(record, measure, statistic) for statistic in STATISTICS))
        for place, label in MEASURES.items()
        if headline(record, measure := primary.measure(*place)) is not None and not _repeats(record, place)
    ]
    filled = [0, *(place for place in range(1, len(STATISTICS) + 1) if any(row[place].text for row in rows))]
    headers = (primary.label, *STATISTICS.values())
    scores = Grid(
        title="",
        headers=tuple(headers[place] for place in filled),
        rows=tuple(tuple(row[place] for place in filled) for row in rows),
        caption="",
    )
    tables = {
        "Result": _result(record),
        "Other metrics": _others(record),
        **({"Privacy": _pairs(privacy)} if (privacy := (record.summary or {}).get("privacy")) else {}),
        "Settings": _pairs(record.config),
        "Defaults of the method": _pairs(_defaults(record)),
        "Environment": _pairs(record.environment),
    }
    command = printable(str(record.environment.get("command", "")))
    return Detail(
        title=record.name,
        finished=record.finished,
        progress=record.progress,
        command=command,
        scores=scores,
        tables=tables,
    )


def _repeats(record: RunRecord, place: tuple[str, str]) -> bool:
    """Return whether this is the score over trained clients, and it equals the score over all clients."""
    same = headline(record, record.primary.measure(*place)) == headline(record, record.primary.measure("personal"))
    return place == ("personal", "trained") and same


def _pairs(tree: Mapping[str, Any]) -> dict[str, str]:
    known = {key: value for key, value in flat_settings(tree).items() if key != "command" and value not in ("", [])}
    return {printable(key): shown(value) for key, value in known.items()}


def _defaults(record: RunRecord) -> dict[str, Any]:
    """Return the hyper-parameters that the settings do not contain."""
    given = record.config.get("method")
    known = given if isinstance(given, Mapping) else {}
    return {key: value for key, value in hyper_parameters(record).items() if key not in known and value is not None}


def _score_cell(record: RunRecord, measure: str, statistic: str) -> Cell:
    value, final = headline(record, measure, statistic), headline(record, measure)
    if value is None:
        return Cell("")
    if statistic == "std" and final is not None:
        return Cell(record.primary.spread(value, final, 2), value)
    return Cell(record.primary.text(value, 2), value)


def _others(record: RunRecord) -> dict[str, str]:
    """Return all metrics after the last evaluation except the primary one, such as `personal mae`."""
    found = {key.replace("_", " ", 1): value for key, value in other_metrics(record).items()}
    return {printable(name): units.significant(value) for name, value in found.items()}


def _result(record: RunRecord) -> dict[str, str]:
    up, down, seconds = (run_total(record, key) for key in ("uplink_bytes", "downlink_bytes", "seconds"))
    flops, peak = (run_total(record, key) for key in ("flops_per_round", "peak_client_bytes"))
    stopped = f"stopped early after {record.progress}" if record.stopped else "finished"
    found = {
        "state": stopped if record.finished else f"unfinished, {record.progress}",
        "uplink": f"{units.size(up)} ({up:,.0f} bytes)" if up is not None else "",
        "downlink": f"{units.size(down)} ({down:,.0f} bytes)" if down is not None else "",
        "time": units.duration(seconds) if seconds is not None else "",
        "local training": f"{flops / 1e9:.3g} GFLOP a round" if flops else "",
        "not counted": not_counted([record]),
        "largest client": f"{units.size(peak)} of tensors at once" if peak else "",
        "partition": scheme(record),
        "partition hash": shown(record.partition.get("hash", "")),
        "digest": shown(record.manifest.get("digest", "")),
        "accepted changes": printable("; ".join(map(str, (record.summary or {}).get("accepted_changes", ())))),
    }
    return {key: value for key, value in found.items() if value}
