"""The primary metric of runs: its name, whether higher or lower is better, and the format of its values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from fedloom.errors import RunFolderError
from fedloom.report import units

VIEWS = ("personal", "general", "server")
"""The models that are scored. They give the metrics of a run their names, such as `personal_accuracy`."""


class Primary(NamedTuple):
    """The primary metric of a run. The default is the metric of classification, also for run folders that do not name a metric."""

    name: str = "accuracy"
    better: str = "higher"  # or "lower"
    percent: bool = True  # whether values are fractions that are shown in percent
    unit: str = ""

    def measure(self, view: str, facet: str = "") -> str:
        """Return the name of a series of this metric, such as `personal_rmse` or, with a facet, `personal_rmse_worst10`."""
        return "_".join(part for part in (view, self.name, facet) if part)

    @property
    def is_lower_better(self) -> bool:
        """Whether smaller values are better."""
        return self.better == "lower"

    @property
    def sign(self) -> int:
        """1 if larger values are better, and -1 otherwise."""
        return -1 if self.is_lower_better else 1

    @property
    def scale(self) -> float:
        """The factor from stored values to displayed values: 100 for percent, and 1 otherwise."""
        return 100.0 if self.percent else 1.0

    def best(self, values: Iterable[float]) -> float:
        """Return the best value."""
        return min(values) if self.is_lower_better else max(values)

    def worst(self, values: Iterable[float]) -> float:
        """Return the worst value."""
        return max(values) if self.is_lower_better else min(values)

    @property
    def qualifier(self) -> str:
        """The text after the metric's name on an axis, such as `" (%)"` or `" (mg/dl, lower is better)"`."""
        parts = ["%" if self.percent else self.unit, "lower is better" if self.is_lower_better else ""]
        text = ", ".join(part for part in parts if part)
        return f" ({text})" if text else ""

    @property
    def label(self) -> str:
        """The label of an axis, such as `"accuracy (%)"` or `"rmse (lower is better)"`."""
        return self.name + self.qualifier

    @property
    def heading(self) -> str:
        """The metric in the title of a table, such as `"accuracy in percent"` or `"rmse (lower is better)"`."""
        return self.label if self.is_lower_better or not self.percent else f"{self.name} in percent"

    @property
    def difference_heading(self) -> str:
        """The unit of a difference in the title of a table, such as `"percentage points"` or `"rmse (mg/dl)"`."""
        if self.percent:
            return "percentage points" + ("" if self.name == "accuracy" else f" of {self.name}")
        return self.name + (f" ({self.unit})" if self.unit else "")

    def text(self, value: float, digits: int = 1) -> str:
        """Return a value in percent with `digits` decimal places, without the percent sign, or a value with four significant digits."""
        return units.points(value, digits) if self.percent else units.significant(value)

    def spread(self, deviation: float, value: float, digits: int = 1) -> str:
        """Return the standard deviation of a value, with as many decimal places as `text` uses for the value."""
        return units.points(deviation, digits) if self.percent else units.significant(deviation, value)

    def difference(self, value: float, largest: float, digits: int = 1) -> str:
        """Return a difference of displayed values with its sign. If values are not in percent, `largest` determines the decimal places."""
        return f"{value:+.{digits}f}" if self.percent else f"{'+' * (value >= 0)}{units.significant(value, largest)}"

    def target(self, value: float) -> str:
        """Return a target for personal models in words, such as `"90.0 % personal accuracy"` or `"a personal rmse of 54.3 mg/dl"`."""
        if self.percent:
            return f"{units.points(value)} % personal {self.name}"
        return f"a personal {self.name} of {value:.6g} {self.unit}".rstrip()


ACCURACY = Primary()


def read_primary(content: Any, where: str) -> Primary:
    """Return the primary metric that a file in a run folder describes. If `content` is None, return accuracy. `where` names the file.

    Raises:
        RunFolderError: the description is malformed.
    """
    if content is None:
        return ACCURACY
    known = content if isinstance(content, Mapping) else {}
    found = Primary(*(known.get(key) for key in Primary._fields))  # type: ignore[arg-type]
    texts = all(isinstance(text, str) and text.isprintable() for text in (found.name, found.unit))
    if texts and found.name.isidentifier() and found.better in ("higher", "lower") and type(found.percent) is bool:
        return found
    raise RunFolderError(f"{where}: 'primary' must give a metric's name, better (higher or lower), percent and unit")
