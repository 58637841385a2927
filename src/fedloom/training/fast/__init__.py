"""Faster forms of an optimiser step that give the same numbers: cached traces, CUDA graphs, Gram-matrix input layers, convolutions.

Each has its own file, which could be deleted without changing results beyond rounding. Only `training/choose.py` imports them.
"""
