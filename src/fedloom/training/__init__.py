"""One client's local update: batches, gradients, optimiser steps; and the same for several clients side by side (`lanes.py`).

`turn.py` is the place to start: plain SGD as the contract describes it. Knows no engine, transport or file.
"""
