"""Analyses of runs: the images that generators produce, the information in features, and the sharpness of a minimum.

Runs are read through `Experiment.reopen`. Results are written to `RUN/analysis/` as `analysis.json` and images, which the report shows. To
add an analysis, write a file in this package and add a part to `analyse.py`.
"""

from fedloom.analysis.analyse import PARTS, analyse

__all__ = ["PARTS", "analyse"]
