"""One experiment, the same for all methods and engines: the round loop, scoring, byte counts, checkpoints and run folders.

Start with `loop.py`. This package calls methods and engines; methods and engines never import it. `report` reads the files that a run
writes.
"""
