"""Looking at runs that are over: what generators make, what features hold, how sharp a minimum is.

Everything is read through `Experiment.reopen`, and written into `RUN/analysis/`: `analysis.json` and pictures, which the report shows.
"""

from fedloom.analysis.analyse import PARTS, analyse

__all__ = ["PARTS", "analyse"]
