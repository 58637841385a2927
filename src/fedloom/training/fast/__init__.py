"""Faster forms of an optimiser step that give the same numbers: cached traces, CUDA graphs, Gram-matrix input layers, convolutions.

Each form has its own file. Removing a file would change results only by rounding. Only `training/choose.py` imports these files.
"""
