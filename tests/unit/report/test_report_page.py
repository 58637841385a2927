"""The HTML page: complete, self-contained, escaped, and written atomically."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from synthetic_runs import Scene

from fedloom.errors import UsageError
from fedloom.report import read, write_page

VOID = {"meta", "br", "link", "input", "img", "hr"}


class Page(HTMLParser):
    """Collects the elements, ids and text of a page. It fails on tags that do not match."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.feed(self.source)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def written(records_at: Path, path: Path) -> Page:
    write_page(read([records_at]), path)
    return Page(path)


@pytest.fixture(scope="module")
def whole(comparison: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Page]:
    """Return the page of the comparison, in a folder that did not exist before."""
    path = tmp_path_factory.mktemp("page") / "new" / "report.html"
    return path, written(comparison, path)


def test_the_page_is_whole_and_needs_nothing_else(whole: tuple[Path, Page]) -> None:
    path, page = whole
    assert page.source.startswith("<!doctype html>")
    assert not re.search(r"(?i)https?:|//cdn|@import|<link|<img", page.source)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    targets = {value[1:] for name, value in page.attributes if name == "href" and value and value.startswith("#")}
    targets |= set(re.findall(r"url\(#([^)]*)\)", page.source))
    assert targets <= set(ids)
    assert all(value and value.startswith(("#", "data:")) for name, value in page.attributes if name in ("href", "src"))
    assert [file.name for file in path.parent.iterdir()] == ["report.html"], "no draft is left behind"


def test_the_page_tells_what_was_run_and_what_came_of_it(whole: tuple[Path, Page]) -> None:
    _, page = whole
    for expected in (
        "fedavg · fedper · fedprox · fedrir",
        "partition Dirichlet over classes, alpha 0.1",
        "runs 8 (4 methods, 2 seeds)",
        "Local training: lr 0.005, 1 epoch.",
        "Training examples by client. Partition: Dirichlet over classes, alpha 0.1. ",
        "Seed 0",
        "Seed 1",
        "87.00 ±1.41",
        "+16.00",
        "best on test",
    ):
        assert expected in page.words
    assert "Not finished: fedper-seed1 (round 15 of 30)." in page.words
    assert page.tags.count("details") == 8
    # three accuracies, traffic, spread, bytes, two partitions, three logs
    assert page.tags.count("svg") == 11
    assert "method.local_epochs" in page.words
    assert "0123abc" in page.words


def test_the_page_has_the_baseline_that_was_chosen(comparison: Path, tmp_path: Path) -> None:
    records = read([comparison / f"{method}-seed0" for method in ("fedavg", "fedper")])
    write_page(records, tmp_path / "report.html", baseline="fedper")
    assert "Difference to fedper" in Page(tmp_path / "report.html").words
    with pytest.raises(UsageError, match="baseline=fedpr: not among the runs"):
        write_page(records, tmp_path / "other.html", baseline="fedpr")
    assert not (tmp_path / "other.html").exists()


def test_the_page_reports_local_updates_that_did_not_count(tmp_path: Path) -> None:
    Scene(extra={"rejected": 12, "skipped": 3}).write(tmp_path / "a")
    assert "not counted 12 rejected, 3 rounds skipped" in written(tmp_path / "a", tmp_path / "report.html").words


def test_figures_follow_the_page_into_dark_mode(whole: tuple[Path, Page]) -> None:
    _, page = whole
    figures = "".join(re.findall(r"<svg.*?</svg>", page.source, flags=re.DOTALL))
    assert "var(--series-4)" in figures
    assert not re.search(r"(?:fill|stroke): #", figures), "a colour of its own would not follow"
    assert "prefers-color-scheme: dark" in page.source


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    name = "</script><script>alert(1)</script>"
    for seed in (0, 1):
        Scene(method=name, seed=seed, rounds=4, logs=("<b>loss</b>",)).write(tmp_path / "runs" / f"<i>{seed}")
    owners = ("north", "<u>south</u>")
    Scene(method='"x" onload="y', rounds=4, clients=2, owners=owners).write(tmp_path / "runs" / "b")
    page = written(tmp_path / "runs", tmp_path / "report.html")
    assert page.tags.count("script") == 1
    assert not {"b", "i", "u"} & set(page.tags)
    assert "Clients: 0 north, 1 <u>south</u>." in page.words
    assert "onload" not in dict(page.attributes)
    assert name in page.words


def test_the_command_is_shown_where_it_is_known(tmp_path: Path) -> None:
    folder = Scene(rounds=2).write(tmp_path / "run")
    (folder / "environment.json").write_text('{"command": "fedloom run method=fedavg seed=0"}')
    assert "fedloom run method=fedavg seed=0" in written(folder, tmp_path / "report.html").words


def test_replaced_settings_are_not_listed_as_facts(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    settings = 'method = "fedavg"\nparticipation = 0.1\ncohort = 2\nmodel = "cnn"\nmodels = ["mlp", "vgg"]\n'
    (tmp_path / "run" / "config.toml").write_text(settings)
    facts = (
        written(tmp_path / "run", tmp_path / "report.html").source.partition('class="facts"')[2].partition("</dl>")[0]
    )
    assert re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", facts) == [("model", "mlp, vgg"), ("clients", "2 in a round")]


def test_a_run_without_a_single_round_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text('method = "fedavg"\n')
    page = written(tmp_path / "run", tmp_path / "report.html")
    assert "run (round 0)" in page.words
    assert "svg" not in page.tags


def test_the_same_runs_give_the_same_page(comparison: Path, tmp_path: Path) -> None:
    one, two = (written(comparison / "fedrir-seed0", tmp_path / name).source for name in ("1.html", "2.html"))
    assert one == two


def test_a_report_needs_runs_and_a_file(comparison: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least one run"):
        write_page([], tmp_path / "report.html")
    with pytest.raises(UsageError, match="it is a folder"):
        write_page(read([comparison / "fedavg-seed0"]), tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot write the report to"):
        write_page(read([comparison / "fedavg-seed0"]), tmp_path / "file" / "report.html")


def test_a_missing_extra_is_one_line_and_tables_work_without(comparison: Path) -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = sys.modules['jinja2'] = None\n"
        "from fedloom.errors import UsageError\n"
        "from fedloom.report import read, summary_table, write_page\n"
        f"records = read([{str(comparison / 'fedavg-seed0')!r}])\n"
        "summary_table(records)\n"
        "for missing in ('jinja2', 'matplotlib'):\n"
        "    try: write_page(records, 'never.html')\n"
        "    except UsageError as error: print(error)\n"
        "    del sys.modules[missing]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=comparison)
    lines = done.stdout.splitlines()
    assert [line.partition(": ")[2] for line in lines] == ["pip install 'fedloom[report]'"] * 2
    assert len(set(lines)) == 2
    assert not (comparison / "never.html").exists()
