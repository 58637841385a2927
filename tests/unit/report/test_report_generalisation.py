"""`fedloom.report.generalisation`: the columns that appear, and the fraction of clients that are worse off."""

import pytest
from synthetic_runs import Scene

from fedloom.report import read
from fedloom.report.generalisation import generalisation_grid
from fedloom.report.pairs import worse_off


def written(folder, **scenes):
    for name, scene in scenes.items():
        scene.write(folder / name)
    return read([folder])


def test_clients_below_the_rival_are_counted_one_by_one(tmp_path):
    low, high = written(tmp_path, a=Scene("fedper", final=0.6), b=Scene("local", final=0.8))
    assert (worse_off(low, high), worse_off(high, low), worse_off(low, low)) == (1.0, 0.0, 0.0)


def test_other_seeds_are_not_compared(tmp_path):
    one, other = written(tmp_path, a=Scene("fedper"), b=Scene("local", seed=1))
    assert worse_off(one, other) is None


def test_a_larger_error_is_worse(tmp_path):
    rmse = {"name": "rmse", "better": "lower", "percent": False, "unit": ""}
    one, other = written(
        tmp_path, a=Scene("fedper", final=9.0, primary=rmse), b=Scene("local", final=8.0, primary=rmse)
    )
    assert worse_off(one, other) == 1.0
    assert worse_off(other, one) == 0.0


def test_the_table_has_one_column_for_each_rival_and_measure(tmp_path):
    held = {"general_accuracy": {"final": 0.5, "held": 0.9, "not_held": 0.1}, "shared_head_accuracy": {"final": 0.7}}
    records = written(
        tmp_path, a=Scene("fedper", final=0.6, extra=held), b=Scene("local", final=0.8), c=Scene("fedavg", final=0.7)
    )
    grid = generalisation_grid(records)
    rows = {row[0].text: dict(zip(grid.headers, row, strict=True)) for row in grid.rows}
    assert rows["fedper"]["worse off\nthan local"].value == 1.0
    assert rows["fedavg"]["worse off\nthan local"].value == 1.0
    assert rows["local"]["worse off\nthan fedavg"].value == 0.0
    assert rows["local"]["worse off\nthan local"].value is None
    assert rows["fedper"]["general\nnot held"].value == pytest.approx(0.1)
    assert rows["fedper"]["shared head\ngeneral"].value == pytest.approx(0.7)
    assert "Worse off" in grid.caption


def test_without_classes_that_are_not_held_the_general_accuracy_is_not_repeated(tmp_path):
    held = {"general_accuracy": {"final": 0.5, "held": 0.5}}
    assert generalisation_grid(written(tmp_path, a=Scene("fedper", extra=held))) is None


def test_there_is_no_table_without_values(tmp_path):
    assert generalisation_grid(written(tmp_path, a=Scene("fedper"))) is None
