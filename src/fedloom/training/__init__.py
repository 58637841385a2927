"""Local updates of one client (`turn.py`), or of several clients at once (`lanes.py`).

Start with `turn.py`, which runs plain SGD as the contract describes it. Faster forms of a step are in `fast/`; `choose.py` selects one of
them. This package does not depend on engines, transport or files. Changes here must not change the golden numbers.
"""
