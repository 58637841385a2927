"""Faster forms of an optimiser step that give the same numbers: cached traces, CUDA graphs, Gram-matrix input layers, convolutions.

Each lives in its own file and could be deleted without changing a result beyond rounding. Only `training/choose.py` imports them.
"""
