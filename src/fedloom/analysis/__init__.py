"""Analyses of runs: what generators produce, what features contain, how sharp a minimum is.

Runs are read through `Experiment.reopen`. Results go to `RUN/analysis/`, `analysis.json` and pictures, which the report shows. Add an
analysis as a file here and a part in `analyse.py`.
"""

from fedloom.analysis.analyse import PARTS, analyse

__all__ = ["PARTS", "analyse"]
