"""Tables as files: numbers in CSV and JSON, and TeX and Markdown that other programs accept."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from synthetic_runs import Scene

from fedloom.errors import UsageError
from fedloom.report import read
from fedloom.report.exports import clients_text, summary_text


def test_json_has_numbers_of_every_seed(comparison: Path) -> None:
    content = json.loads(summary_text(read([comparison]), "json"))
    assert content["primary"]["name"] == "accuracy"
    rows = {row["label"]: row for row in content["methods"]}
    assert list(rows) == ["fedavg", "fedper", "fedprox", "fedrir"]
    fedrir = rows["fedrir"]
    assert fedrir["seeds"] == [0, 1]
    assert fedrir["lr"] == 0.005
    assert fedrir["local_epochs"] == 1
    assert fedrir["personal_final"]["values"] == pytest.approx([0.86, 0.88])
    assert fedrir["personal_final"]["mean"] == pytest.approx(0.87)
    assert fedrir["personal_final"]["std"] == pytest.approx(0.02 / 2**0.5)
    assert fedrir["uplink_bytes"]["mean"] == 30 * 1_900_000
    assert "server_final" not in fedrir
    assert rows["fedper"]["personal_final"]["std"] is None, "one finished run"
    difference = content["differences"]
    assert (difference["baseline"], difference["unit"]) == ("fedavg", "percentage points")
    assert {
        "label": "fedrir",
        "model": "personal",
        "n_seeds": 2,
        "mean": pytest.approx(16),
        "interval": None,
    } in difference["rows"]


def test_csv_has_one_row_per_method_with_numbers(comparison: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(summary_text(read([comparison]), "csv"))))
    assert [row["label"] for row in rows] == ["fedavg", "fedper", "fedprox", "fedrir"]
    assert float(rows[3]["personal_final"]) == pytest.approx(0.87)
    assert float(rows[3]["lr"]) == 0.005
    assert rows[1]["personal_final_std"] == ""
    assert [row["n_seeds"] for row in rows] == ["2", "1", "2", "2"]


def test_a_target_that_was_never_reached_is_null(tmp_path: Path) -> None:
    Scene(extra={"target": 0.99, "rounds_to_target": None, "bytes_to_target": None}).write(tmp_path / "a")
    (row,) = json.loads(summary_text(read([tmp_path]), "json"))["methods"]
    assert row["rounds_to_target"] == {"mean": None, "std": None, "values": [None]}


@pytest.mark.parametrize("kind", ["csv", "json", "md"])
def test_clients_have_one_row_each(tmp_path: Path, kind: str) -> None:
    scene = Scene(clients=3, rounds=6, owners=("north", "south", "west"))
    text = clients_text(read([scene.write(tmp_path / "a")]), kind)
    if kind == "md":
        assert text.count("\n| fedavg |") == 3
        assert "| 2 | west |" in text
        assert " 720000 |" in text
        return
    rows = json.loads(text)["clients"] if kind == "json" else list(csv.DictReader(io.StringIO(text)))
    assert [(int(row["client"]), row["owner"]) for row in rows] == [(0, "north"), (1, "south"), (2, "west")]
    assert [float(row["personal_accuracy"]) for row in rows] == pytest.approx(
        [scene.client_value(5, k) for k in range(3)]
    )
    assert {int(row["uplink_bytes"]) for row in rows} == {6 * 120_000}


def test_runs_without_clients_have_no_table_of_clients(tmp_path: Path) -> None:
    Scene(finished=False).write(tmp_path / "a")
    with pytest.raises(UsageError, match="no run has results per client"):
        clients_text(read([tmp_path]), "csv")


def test_markdown_marks_the_best_and_escapes_names(tmp_path: Path) -> None:
    for method, final in (("a|b*", 0.5), ("c", 0.9)):
        Scene(method=method, final=final).write(tmp_path / method.strip("*").replace("|", "_"))
    text = summary_text(read([tmp_path]), "md")
    assert "| a\\|b\\* | 50.00 |" in text
    assert "| c | **90.00** |" in text
    widths = {line.replace("\\|", "").count("|") for line in text.split("\n\n")[1].splitlines()}
    assert len(widths) == 1


@pytest.mark.parametrize("packages", ["", "\\usepackage{booktabs}\n"])
def test_tex_compiles_with_any_name(tmp_path: Path, packages: str) -> None:
    for place, method in enumerate(("100%_&$#{}~^\\", "[p] <x>|−1", "名前 ±…")):
        Scene(method=method, seed=place, final=0.5 + place / 10).write(tmp_path / "runs" / str(place))
    tables = "".join(make(read([tmp_path / "runs"]), "tex") for make in (summary_text, clients_text))
    assert "\\toprule" in tables
    assert "\\textbf{70.00}" in tables
    if shutil.which("pdflatex") is None:
        pytest.skip("needs pdflatex")
    if packages and subprocess.run(["kpsewhich", "booktabs.sty"], capture_output=True, check=False).returncode:
        pytest.skip("needs booktabs")
    whole = f"\\documentclass{{article}}\n{packages}\\begin{{document}}\n{tables}\\end{{document}}\n"
    (tmp_path / "table.tex").write_text(whole, encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "table.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace", check=False)
    assert done.returncode == 0, done.stdout[-1500:]
