"""Faster forms of an optimiser step that give the same numbers: cached traces, CUDA graphs, Gram-matrix input layers, convolutions.

Each lives in its own file and may be deleted without changing a result. Nothing outside `training` imports them, but what chooses them.
"""
