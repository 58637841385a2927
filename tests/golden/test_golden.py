"""The reviewed numbers of every method.

After an intended change of numbers, rewrite the files with `pytest tests/golden --regenerate-golden`, and review their diff.
"""

import json
from pathlib import Path

import pytest

from fedloom.methods.registry import METHODS

FOLDER = Path(__file__).parent
SETTINGS = {
    "data": {"name": "digits", "rows": 400}, "partition": {"name": "dirichlet", "alpha": 0.3}, "clients": 4, "rounds": 3,
    "batch_size": 20, "eval": {"general_every": 1, "fitted": True}, "seed": 0, "precision": "fp64",
}  # fmt: skip
MODELS = {"fedrir": "fedrir_cnn"}


def numbers(run):
    """Return everything except times and lists."""
    rows = [{key: v for key, v in row.items() if "seconds" not in key and not isinstance(v, list)} for row in run.rows]
    return {"rounds": rows, "bytes_by_kind": run.ledger.kinds, "partition": run.data.partition.hash()}


@pytest.mark.parametrize("name", METHODS)
def test_the_numbers_are_as_they_were(experiment, name, request):
    run = experiment(
        name, **SETTINGS, model=MODELS.get(name, "mlp"), **{"model.hidden": 16} if name not in MODELS else {}
    )
    run.run()
    found, file = json.loads(json.dumps(numbers(run))), FOLDER / f"{name}.json"
    if request.config.getoption("--regenerate-golden"):
        file.write_text(json.dumps(found, indent=1) + "\n")
        return
    assert file.is_file(), f"no golden file for {name}: run pytest tests/golden --regenerate-golden"
    expected = json.loads(file.read_text())
    assert found["bytes_by_kind"] == expected["bytes_by_kind"]
    assert found["partition"] == expected["partition"]
    for now, then in zip(found["rounds"], expected["rounds"], strict=True):
        assert now.keys() == then.keys()
        for key, value in then.items():
            same = value if value is None or isinstance(value, int) else pytest.approx(value, rel=1e-9, abs=1e-12)
            assert now[key] == same, f"round {then['round']}: {key}"


def test_there_is_no_file_without_a_method():
    assert {file.stem for file in FOLDER.glob("*.json")} <= set(METHODS)
