"""Tables, plots and one HTML page from run folders, never from live objects.

`read.py` reads folders, `tables.py` and `plots.py` create tables and figures, and `page.py` writes the page. Tables need no extra; plots
and the page require `pip install 'fedloom[report]'`.
"""

from fedloom.report.generalisation import generalisation_table
from fedloom.report.groups import shared_primary
from fedloom.report.looked_at import analysis_grids
from fedloom.report.page import Chapter, write_chapters, write_page
from fedloom.report.read import RunRecord, read
from fedloom.report.tables import drawn, paired_table, summary_table
from fedloom.report.waiting import Waiting, waiting_table

__all__ = [
    "Chapter",
    "RunRecord",
    "Waiting",
    "analysis_grids",
    "drawn",
    "generalisation_table",
    "paired_table",
    "read",
    "shared_primary",
    "summary_table",
    "waiting_table",
    "write_chapters",
    "write_page",
]
