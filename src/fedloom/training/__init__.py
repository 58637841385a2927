"""One client's local update (`turn.py`), and the same for several clients at once (`lanes.py`).

Start with `turn.py`: plain SGD as the contract describes it. Faster forms of a step lie in `fast/` and are chosen in `choose.py`.
This package knows no engine, transport or file; change anything, as long as the golden numbers stay.
"""
