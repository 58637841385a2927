"""Tools for experiments, which compare methods, check a method, time engines, export models, and estimate costs on devices.

Each module implements one command; `cli` contains the command line. Tools do not import each other.
"""
