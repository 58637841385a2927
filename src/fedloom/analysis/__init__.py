"""Analyses of runs: what generators produce, what features contain, how sharp a minimum is.

Runs are read through `Experiment.reopen`. Results are written to `RUN/analysis/` as `analysis.json` and images, which the report shows.
To add an analysis, write a file here and add a part to `analyse.py`.
"""

from fedloom.analysis.analyse import PARTS, analyse

__all__ = ["PARTS", "analyse"]
