"""The page docs/verification.md shows the committed results."""

import json
from pathlib import Path

from fedloom.methods.registry import METHODS

HOME = Path(__file__).parents[2]
RESULTS = json.loads((HOME / "benchmarks" / "results" / "verify-pfllib.json").read_text())["methods"]


def test_the_table_shows_the_committed_results():
    page = (HOME / "docs" / "verification.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| `")
    ]
    shown = {row[0].strip("`"): row[1:] for row in rows}
    assert list(shown) == list(RESULTS)
    assert set(RESULTS) <= set(METHODS)
    for name, (result, differences, cause) in shown.items():
        found = RESULTS[name]
        assert differences == ", ".join(f"{what} {value:.0e}" for what, value in found["differences"].items())
        assert cause == found["cause"]
        assert result == ("differs" if not found["equal"] else "equal, with the change" if cause else "equal")
    n_equal = sum(found["equal"] for found in RESULTS.values())
    assert (
        f"contains {len(RESULTS)} of fedloom's methods in a form that can be compared exactly. {n_equal} of them"
        in page
    )


def test_equal_weights_are_not_those_of_the_start():
    assert all(found["moved"] > 0.01 for found in RESULTS.values())
    assert all(max(found["differences"].values()) < 1e-6 for found in RESULTS.values() if found["equal"])
