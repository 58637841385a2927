"""One experiment, the same for all methods and engines: the round loop, scoring, byte counts, checkpoints and run folders.

`loop.py` is the place to start. Methods and engines are called from here and never import it; what a run writes is read by `report`.
"""
