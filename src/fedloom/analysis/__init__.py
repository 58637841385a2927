"""Analysis of finished runs: generated images, information in features, sharpness of the minimum.

Runs are read with `Experiment.reopen`. Results are written to `RUN/analysis/`: `analysis.json` and pictures, which the report includes.
"""

from fedloom.analysis.analyse import PARTS, analyse

__all__ = ["PARTS", "analyse"]
